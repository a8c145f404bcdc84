"""AdamW with the step count in the group updates as torch's does."""

import pytest
import torch

from megatron_spo.model import adamw


@pytest.mark.parametrize("kernel", ["foreach", "fused"])
def test_updates_as_torch_does(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fused` is used on a GPU, but exists on a CPU too."""
    monkeypatch.setattr(adamw, "_kernel", lambda parameters: {kernel: True})
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 50), torch.randn(4, 3, 50)
    ours, theirs = ([torch.nn.Parameter(row.clone()) for row in start] for _ in range(2))
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = [adamw.GroupStepAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings, **{kernel: True})]
    optimizers[0].fill_states()
    for step in gradients:
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    assert optimizers[0].param_groups[0]["step"] == len(gradients)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
