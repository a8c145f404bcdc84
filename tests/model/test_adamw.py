"""AdamW with the step count in the group updates as torch's does."""

import torch

from megatron_spo.model import adamw


def test_updates_as_torch_does() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 50), torch.randn(4, 3, 50)
    ours, theirs = ([torch.nn.Parameter(row.clone()) for row in start] for _ in range(2))
    own = adamw.GroupStepAdamW(ours, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    of_torch = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    own.fill_states()
    for step in gradients:
        for parameters, optimizer in ((ours, own), (theirs, of_torch)):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    assert own.param_groups[0]["step"] == len(gradients)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
