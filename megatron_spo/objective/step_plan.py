"""The plan of one optimizer step as plain data: a schedule makes it, the training step executes it."""

from dataclasses import dataclass
from enum import Flag, auto


class Role(Flag):
    """The terms of the objective that a data set is used for: one set for both terms, or one set for each."""

    PREFERENCE = auto()
    SFT = auto()
    BOTH = PREFERENCE | SFT


@dataclass(frozen=True)
class Shift:
    """Moves the weights to theta - `step` * (the gradient in `slot`) during one pass."""

    slot: str
    step: float


@dataclass(frozen=True)
class Pass:
    """One pass over the global batch: the gradient of `preference` * f + `sft` * (the SFT term).

    Attributes:
        preference: weight of the preference loss f; 0 omits it and allows rows without a rejected response.
        sft: weight of the SFT term. With a preference term it is lambda in the unit `spo.lambda_unit`, under
            `spo.constraint`; alone it weighs g itself (nats per chosen token), whatever the unit.
        slot: name under which the gradient is kept.
        shift: where the gradient is taken; None means at the current weights.
    """

    preference: float
    sft: float
    slot: str = "step"
    shift: Shift | None = None

    def weighs(self, role: Role) -> bool:
        """Returns whether the pass uses rows of this role."""
        return bool((self.preference and Role.PREFERENCE in role) or (self.sft and Role.SFT in role))


@dataclass(frozen=True)
class Add:
    """The step's gradient is the sum of coefficient * gradient over the slots."""

    parts: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Barrier:
    """The step's gradient is f + l * g, with the smallest l >= 0 that gives <f + l g, g> >= `rate`."""

    f: str
    g: str
    rate: float


@dataclass(frozen=True)
class StepPlan:
    """The passes of one optimizer step, in order, and how their gradients are combined for the optimizer.

    Attributes:
        passes: at least one. Metrics are measured at the current weights; those of a data set in the first such pass
            that uses it.
        lambda_: weight of the SFT term relative to f in this step (the metric `spo/lambda`); 0 if there is none.
            `Barrier` computes its own.
        combine: None uses the gradient of the only pass.
    """

    passes: tuple[Pass, ...]
    lambda_: float
    combine: Add | Barrier | None = None

    @property
    def upper(self) -> Pass:
        """The pass with the preference loss, or the first pass if there is none."""
        return next((one for one in self.passes if one.preference), self.passes[0])
