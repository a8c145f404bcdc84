"""Both kinds of layers have the same checkpoint keys, and the fp8 settings are Megatron's."""

from pathlib import Path

import pytest

from megatron_spo.config.fp8 import RECIPES
from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.config.schema import PrecisionConfig
from tests.support.megatron import engine_keys, load_model, one_process, sharded_keys
from tests.support.tiny import tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_checkpoint_keys_are_those_of_transformer_engine(tmp_path: Path, family: str) -> None:
    tiny_model(tmp_path, family)
    assert sharded_keys(load_model(tmp_path)) == engine_keys(read_model_shape(tmp_path))


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_fp8_settings_are_megatrons(recipe: str | None) -> None:
    one_process()
    from megatron.core.transformer import TransformerConfig

    from megatron_spo.model.settings import _fp8

    made = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2, **_fp8(PrecisionConfig(fp8=recipe)))
    assert (made.fp8 is None) == (recipe is None)
    assert not made.fp8_param and not made.fp8_dot_product_attention
    if recipe is not None:
        assert made.fp8_recipe == recipe
