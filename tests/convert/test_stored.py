"""Reading parts of stored tensors that several processes have written."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_spo.checkpoint.stored import StoredTensors
from megatron_spo.errors import UserError

WEIGHT = torch.arange(48.0).view(3, 4, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save({"weight": WEIGHT, "bias": torch.ones(5, dtype=torch.bfloat16)}, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def test_layer_by_layer_or_whole(folder: Path) -> None:
    stored = StoredTensors(folder)
    assert stored.keys() == {"weight", "bias"}
    assert stored.dtype("bias") == torch.bfloat16
    for layer in range(3):
        part = stored.read("weight", layer)
        assert torch.equal(part, WEIGHT[layer])
        assert part.untyped_storage().nbytes() == WEIGHT[layer].nbytes
    assert torch.equal(stored.read("weight", None), WEIGHT)
    assert torch.equal(stored.read("bias", None), torch.ones(5, dtype=torch.bfloat16))


def test_a_tensor_of_which_a_part_is_gone(folder: Path) -> None:
    stored = StoredTensors(folder)
    stored._tensors["weight"].chunks[0].sizes = torch.Size([2, 4, 4])
    assert torch.equal(stored.read("weight", 1), WEIGHT[1])
    with pytest.raises(UserError, match="has only part of weight"):
        stored.read("weight", 2)
