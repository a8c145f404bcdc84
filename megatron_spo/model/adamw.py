"""AdamW whose step count lives in the parameter group."""

from typing import Any

import torch
from torch.optim.adamw import adamw


class GroupStepAdamW(torch.optim.AdamW):
    """torch's AdamW, with `step` in each group instead of in each parameter's state.

    As in the fused Adam of Transformer Engine and apex, so that a checkpoint holds one count and the moments.
    """

    def fill_states(self) -> None:
        """Make count and moments, so that an optimizer can be saved and loaded before its first step."""
        for group in self.param_groups:
            group["step"] = 0
            for parameter in group["params"]:
                state = self.state[parameter]
                state["exp_avg"] = torch.zeros_like(parameter.data)
                state["exp_avg_sq"] = torch.zeros_like(parameter.data)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update by torch's functional AdamW."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            count = torch.tensor(float(group["step"]))
            group["step"] += 1
            if not parameters:
                continue
            adamw(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                [count.clone() for _ in parameters],
                foreach=len(parameters) > 1,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def keep_step_in_group(optimizer: Any) -> None:
    """Replace torch's AdamW inside each of Megatron's optimizers; one from Transformer Engine or apex stays. Count and
    moments are made now, so that an optimizer can be saved before its first step as well.

    The constructor refuses the real groups (main parameters are views, not leaves), so they are assigned, as Megatron
    does itself. Must run before the first step.
    """
    for inner in optimizer.chained_optimizers:
        if type(inner.optimizer) is torch.optim.AdamW:
            placeholder = torch.nn.Parameter(torch.empty(0))
            defaults = {key: inner.optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
            replacement = GroupStepAdamW([placeholder], **defaults)
            replacement.param_groups = inner.optimizer.param_groups
            replacement.fill_states()
            inner.optimizer = replacement
        else:
            inner.init_state_fn(inner.optimizer, inner.config)
            for group in inner.optimizer.param_groups:
                group["step"] = 0
