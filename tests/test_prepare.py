"""What train and reference ask for alike."""

import pytest

from megatron_spo.config.data_source import DataSource
from megatron_spo.config.schema import Config, PrecisionConfig
from megatron_spo.data.loader import row_multiples
from megatron_spo.prepare import _eval_names
from megatron_spo.reference.fingerprint import numerics


def test_numerics_names_whatever_changes_digits() -> None:
    assert numerics(PrecisionConfig(dtype="fp32"), experts=False) == "fp32"
    assert numerics(PrecisionConfig(layers="torch"), experts=False) == "bf16"
    assert numerics(PrecisionConfig(layers="transformer_engine"), experts=False) == "bf16, Transformer Engine"
    assert numerics(PrecisionConfig(fp8="blockwise"), experts=False) == "bf16, Transformer Engine, fp8 blockwise"


@pytest.mark.parametrize(
    ("fp8", "parallel", "tokens"),
    [
        (None, {}, 1),
        (None, {"tensor": 4, "sequence": True, "context": 2}, 16),
        ("tensorwise", {}, 16),
        ("mxfp8", {"tensor": 4}, 32),
        ("blockwise", {"tensor": 4}, 16),
        ("blockwise", {"tensor": 4, "sequence": True}, 512),
        ("tensorwise", {"tensor": 2, "sequence": True, "context": 2}, 128),
    ],
)
def test_rows_fall_into_the_blocks_of_fp8_on_every_rank(fp8: str | None, parallel: dict, tokens: int) -> None:
    sections = {"model": {"path": "model"}, "data": {"train": "pairs.jsonl"}, "parallel": parallel}
    config = Config.model_validate({"output": "run", **sections, "precision": {"fp8": fp8}})
    assert row_multiples(config).tokens == tokens


def test_held_out_sets_of_one_name_are_told_apart() -> None:
    paths = ["a/test-2.jsonl", "test.jsonl", "b/test.jsonl", "train.jsonl", "train-2.jsonl"]
    names = _eval_names([DataSource(path=path) for path in paths], reserved=("train",))
    assert names == ["test-2", "test", "test-3", "train-2", "train-2-2"]
