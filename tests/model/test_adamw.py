"""AdamW with the step count in the group updates as torch's does."""

from typing import Any

import pytest
import torch

from megatron_spo.model import adamw


@pytest.mark.parametrize("kernel", ["foreach", "fused"])
def test_updates_as_torch_does(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fused` is used on a GPU, but exists on a CPU too."""
    kind: dict[str, Any] = {kernel: True}
    monkeypatch.setattr(adamw, "_kernel", lambda parameters: kind)
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 50), torch.randn(4, 3, 50)
    ours, theirs = ([torch.nn.Parameter(row.clone()) for row in start] for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer, reference = adamw.GroupStepAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings, **kind)
    optimizer.fill_states()
    for step in gradients:
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
        optimizer.step()
        reference.step()
    assert optimizer.param_groups[0]["step"] == len(gradients)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
