"""What one optimizer step does, as plain data: schedules write it, the training step carries it out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """One sweep over the global batch: the gradient of `preference` * f + `sft` * (the SFT term).

    Attributes:
        preference: weight of the preference loss f; 0 leaves it out, and rows without a rejected response are
            allowed.
        sft: weight of the SFT term. Beside a preference term it is lambda in the unit `spo.lambda_unit`,
            under `spo.constraint`; alone it weighs g itself (nats per chosen token), which has no unit to
            choose.
    """

    preference: float
    sft: float


@dataclass(frozen=True)
class StepPlan:
    """The passes of one optimizer step, in order; their gradients add up, then the optimizer steps once.

    Attributes:
        passes: at least one.
        lambda_: the weight of the SFT term beside f in this step (the metric `spo/lambda`); 0 where there is
            none.
    """

    passes: tuple[Pass, ...]
    lambda_: float
