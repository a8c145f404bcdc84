"""Without a GPU, layers are torch's, and settings that need a GPU are refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_spo.config.schema import PrecisionConfig
from megatron_spo.errors import UserError
from megatron_spo.runtime import cpu_bridge, device, env, processes
from megatron_spo.runtime.device import check_device, to_device, uses_transformer_engine
from tests.support.megatron import one_process
from tests.support.processes import launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def test_auto_takes_torch() -> None:
    for dtype in ("bf16", "fp32"):
        precision = PrecisionConfig(dtype=dtype)
        assert not uses_transformer_engine(precision)
        check_device(precision)


@pytest.mark.parametrize("keys", [{"fp8": "tensorwise"}, {"layers": "transformer_engine"}])
def test_what_needs_a_gpu_is_refused(keys: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"needs an NVIDIA GPU, but torch finds none .*; set precision.fp8=null"):
        check_device(PrecisionConfig.model_validate(keys))


def test_to_device() -> None:
    cpu_bridge.install()
    tensor = to_device(np.arange(6)[::2], torch.device("cpu"), torch.float32)
    assert tensor.dtype == torch.float32 and tensor.tolist() == [0, 2, 4]


@pytest.mark.parametrize(("given", "left"), [("1", None), ("0", "0"), (None, None)])
def test_tf32_cannot_be_forced(given: str | None, left: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if given is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", given)
    env.use_fp32()
    assert os.environ.get("NVIDIA_TF32_OVERRIDE") == left


def test_groups_of_one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron asks for no backend, so that its groups would inherit all those of the default group."""
    asked = []
    monkeypatch.setattr(dist, "new_group", lambda *ranks, **options: asked.append((ranks, options)))
    with processes._groups_of("nccl"):
        dist.new_group([0, 1], backend=None, timeout=None)
    dist.new_group(ranks=[0])
    assert asked == [(([0, 1],), {"backend": "nccl", "timeout": None}), ((), {"ranks": [0]})]


def test_bf16_on_a_gpu_requires_its_attention_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"requires the attention kernel of torch 2.10 or later, but torch is \d"):
        check_device(PrecisionConfig(dtype="bf16", layers="torch"))
    check_device(PrecisionConfig(dtype="fp32", layers="torch"))
    assert not device.can_compile()  # without Triton


@pytest.mark.parametrize("name", ["dist_all_gather_func", "dist_reduce_scatter_func"])
def test_one_process_exchanges_neither_weights_nor_gradients_with_itself(name: str) -> None:
    one_process()
    from megatron.core.distributed import param_and_grad_buffer

    operation, whole, other = getattr(param_and_grad_buffer, name), torch.ones(8), torch.zeros(8)
    assert operation(whole, whole, group=dist.group.WORLD, async_op=True) is None
    operation(other, whole, group=dist.group.WORLD)
    assert torch.equal(other, whole)


def test_packages_of_gpu_kernels_are_hidden_without_a_gpu(tmp_path: Path) -> None:
    """Megatron would use their optimizer, which cannot run."""
    for package in cpu_bridge.HIDDEN:
        (tmp_path / f"{package}.py").write_text("raise RuntimeError('must not be imported')")
    script = "from megatron_spo.runtime import cpu_bridge; cpu_bridge.install(); import megatron.core.optimizer"
    (tmp_path / "script.py").write_text(script)
    done = launch([str(tmp_path / "script.py")], 1, cold=True)
    assert done.returncode == 0, done.stderr
