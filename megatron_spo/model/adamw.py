"""AdamW whose step count lives in the parameter group."""

from typing import Any

import torch
from torch.optim.adamw import adamw


class GroupStepAdamW(torch.optim.AdamW):
    """torch's AdamW, with `step` in each group instead of in each parameter's state.

    Megatron's distributed optimizer (megatron-core 0.16.1, distrib_optimizer.py) stores and loads the moments of a
    parameter and expects the count in the group, as in the fused Adam of Transformer Engine and apex. With neither
    installed, torch's own AdamW fails to save a fresh optimizer and to load a used one.
    """

    def _fill_states(self) -> None:
        for group in self.param_groups:
            group.setdefault("step", 0)
            for parameter in group["params"]:
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter.data)
                    state["exp_avg_sq"] = torch.zeros_like(parameter.data)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update by torch's functional AdamW."""
        assert closure is None
        self._fill_states()
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

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the group's `step` repeated in each state, where Megatron reads it."""
        self._fill_states()
        state = super().state_dict()
        steps = {index: group["step"] for group in state["param_groups"] for index in group["params"]}
        state["state"] = {i: {**s, "step": torch.tensor(float(steps[i]))} for i, s in state["state"].items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`; the count is taken out of the states after torch has checked them."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            found = [int(self.state[p].pop("step", 0)) for p in group["params"]]
            group["step"] = int(group.get("step") or max(found, default=0))


def keep_step_in_group(optimizer: Any) -> None:
    """Replace torch's AdamW inside each of Megatron's optimizers; one from Transformer Engine or apex stays, with its
    count and moments made now, so that it can be saved before its first step as well.

    The constructor refuses the real groups (main parameters are views, not leaves), so they are assigned, as Megatron
    does itself. Must run before the first step.
    """
    for inner in optimizer.chained_optimizers:
        if type(inner.optimizer) is torch.optim.AdamW:
            placeholder = torch.nn.Parameter(torch.empty(0))
            defaults = {key: inner.optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
            replacement = GroupStepAdamW([placeholder], **defaults)
            replacement.param_groups = inner.optimizer.param_groups
            inner.optimizer = replacement
        else:
            inner.init_state_fn(inner.optimizer, inner.config)
            for group in inner.optimizer.param_groups:
                group["step"] = 0
