"""Adapters on a model in one process: switched off they have no effect, and a linear layer may include its norm."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.config.schema import LoraConfig
from tests.model.test_against_transformers import pairs
from tests.support.megatron import load_model, megatron_sums, row_of
from tests.support.tiny import tiny_model


@pytest.fixture
def adapted(tmp_path):
    """A model whose adapters change its output."""
    tiny_model(tmp_path)
    model = load_model(tmp_path)
    from megatron_spo.model.lora import add_adapters

    lora = LoraConfig(rank=4, targets=["q_proj", "v_proj", "o_proj", "up_proj"])
    before = megatron_sums(model, row_of(pairs())).detach()
    add_adapters([model], read_model_shape(tmp_path), lora, seed=0)
    assert torch.equal(megatron_sums(model, row_of(pairs())), before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_B"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model, before


def test_switched_off_they_are_not_there(adapted):
    from megatron_spo.model.lora import adapters_off

    model, before = adapted
    row = row_of(pairs())
    assert (megatron_sums(model, row) - before).abs().max() > 0.1
    with adapters_off([model]), torch.no_grad():
        assert torch.equal(megatron_sums(model, row), before)
    assert (megatron_sums(model, row) - before).abs().max() > 0.1


def test_a_linear_layer_that_begins_with_its_norm(adapted):
    """As in Transformer Engine, the input of the layer is not the input of the adapters."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    class NormedLinear(ColumnParallelLinear):
        def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
            norm = self.layer_norm_weight
            return super().forward(F.rms_norm(input_, norm.shape, norm, self.config.layernorm_epsilon))

    model, _ = adapted
    expected = megatron_sums(model, row_of(pairs()))
    for layer in model.decoder.layers:
        norms = ("input_layernorm", layer.self_attention.linear_qkv), ("pre_mlp_layernorm", layer.mlp.linear_fc1)
        for name, linear in norms:
            linear.__class__, linear.layer_norm_weight = NormedLinear, getattr(layer, name).weight
            setattr(layer, name, torch.nn.Identity())
    torch.testing.assert_close(megatron_sums(model, row_of(pairs())), expected, rtol=1e-5, atol=1e-5)
