"""What one optimizer step does, as plain data: schedules write it, the training step carries it out."""

from dataclasses import dataclass
from enum import Flag, auto


class Role(Flag):
    """The terms of the objective that a data set feeds: one set feeds both, or each has its own."""

    PREFERENCE = auto()
    SFT = auto()
    BOTH = PREFERENCE | SFT


@dataclass(frozen=True)
class Shift:
    """Weights moved to theta - `step` * (the gradient in `slot`) for the time of one pass."""

    slot: str
    step: float


@dataclass(frozen=True)
class Pass:
    """One sweep over the global batch: the gradient of `preference` * f + `sft` * (the SFT term).

    Attributes:
        preference: weight of the preference loss f; 0 leaves it out, and rows without a rejected response are allowed.
        sft: weight of the SFT term. Beside a preference term it is lambda in the unit `spo.lambda_unit`, under
            `spo.constraint`; alone it weighs g itself (nats per chosen token), which has no unit to choose.
        slot: name under which the gradient is kept.
        shift: where the gradient is taken, if not at the present weights.
    """

    preference: float
    sft: float
    slot: str = "step"
    shift: Shift | None = None

    def weighs(self, role: Role) -> bool:
        """Whether rows of this role enter the pass."""
        return bool((self.preference and Role.PREFERENCE in role) or (self.sft and Role.SFT in role))


@dataclass(frozen=True)
class Add:
    """The step's gradient is the sum of coefficient * slot."""

    parts: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Barrier:
    """The step's gradient is f + l * g, with the smallest l >= 0 that gives <f + l g, g> >= `rate`."""

    f: str
    g: str
    rate: float


@dataclass(frozen=True)
class StepPlan:
    """The passes of one optimizer step, in order, and how their gradients become the one that the optimizer takes.

    Attributes:
        passes: at least one; the metrics of a step are measured at the present weights, those of a data set in the
            first such pass that weighs it.
        lambda_: the weight of the SFT term beside f in this step (the metric `spo/lambda`); 0 where there is none.
            `Barrier` finds its own.
        combine: None takes the gradient of the only pass.
    """

    passes: tuple[Pass, ...]
    lambda_: float
    combine: Add | Barrier | None = None

    @property
    def upper(self) -> Pass:
        """The pass that weighs the preference loss, or the first where none does."""
        return next((one for one in self.passes if one.preference), self.passes[0])
