"""Properties of the schedules and the keys of section `spo`. Does not import torch.

To add a schedule, add a `ScheduleSpec` here, a function in `megatron_spo.objective.schedules`, and its keys in
`SpoConfig`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from megatron_spo.config.data_source import Sources
from megatron_spo.config.section import NotNegative, Section, form_of_v

RUNNING_MIN = "running_min"


@dataclass(frozen=True)
class ScheduleSpec:
    """Properties of one schedule that do not need tensors.

    Attributes:
        name: the value of `spo.schedule`.
        summary: one line for the generated documentation.
        keys: keys of section `spo` that the schedule reads. Keys that no schedule lists are read with every schedule.
        preference: whether the schedule trains on the preference loss at all.
        one_term: whether a step computes only one of the two terms, preference loss or SFT loss.
        needs_gap: whether the schedule always needs the gap g - v.
        passes: number of forward and backward passes over the rows of a step.
        gradients_kept: number of fp32 copies of a rank's shard of gradients or weights that are kept during the last
            pass. After it, a schedule with several passes holds a gradient of each.
    """

    name: str
    summary: str
    keys: frozenset[str]
    preference: bool = True
    one_term: bool = False
    needs_gap: bool = False
    passes: int = 1
    gradients_kept: int = 0

    @property
    def has_lambda(self) -> bool:
        """Whether spo.lambda is the weight of the SFT term."""
        return "lambda" in self.keys

    @property
    def has_unit(self) -> bool:
        """Whether the SFT term is added to the preference loss in one pass, in spo.lambda_unit."""
        return "lambda_unit" in self.keys


def _spec(name: str, summary: str, keys: str = "", **more: Any) -> ScheduleSpec:
    return ScheduleSpec(name, summary, frozenset(keys.split()), **more)


_SPECS = (
    _spec("none", "the preference loss alone"),
    _spec("sft", "the SFT loss alone", "sft_data", preference=False, one_term=True),
    _spec("penalty", "preference loss + lambda * SFT term, lambda constant after an optional ramp",
          "lambda lambda_unit constraint epsilon ramp_steps sft_data"),
    _spec("dual", "preference loss + lambda * SFT term, lambda follows the gap (dual ascent)",
          "lambda lambda_unit epsilon lambda_max dual_lr sft_data", needs_gap=True),
    _spec("alternating", "some steps on the SFT loss, then some steps on the preference loss",
          "sft_steps preference_steps sft_data", one_term=True),
    _spec("lookahead", "the preference loss after an inner SFT step", "lambda lookahead_lr sft_data",
          passes=2, gradients_kept=2),
    _spec("barrier", "the preference loss, plus enough of the SFT gradient to make the SFT loss fall (dynamic barrier)",
          "epsilon barrier_rate sft_data", needs_gap=True, passes=2, gradients_kept=1),
)  # fmt: skip
SCHEDULE_SPECS: Mapping[str, ScheduleSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
ScheduleName = Literal["none", "sft", "penalty", "dual", "alternating", "lookahead", "barrier"]


def schedules_with(key: str) -> list[str]:
    """Returns the names of the schedules that read a key of section `spo`; [] if every schedule reads it."""
    return [name for name, spec in SCHEDULE_SPECS.items() if key in spec.keys]


class SpoConfig(Section):
    """The bilevel schedule: how a step uses the SFT objective (lower level)."""

    schedule: ScheduleName = "penalty"
    """how steps combine the preference loss and the SFT loss"""
    lambda_: float = Field(1.0, alias="lambda", ge=0)
    """weight of the SFT term (dual: initial weight), in units of spo.lambda_unit; >= 0"""
    lambda_unit: Literal["token", "relative"] = "relative"
    """token: lambda weighs the SFT loss per token; relative: in units of the preference loss's own pull on that loss"""
    constraint: Literal["none", "batch", "pair"] = "none"
    """penalty only: apply the SFT term always, or only if the batch or the pair is outside the safe region"""
    epsilon: float = Field(0.0, ge=0)
    """width of the safe region g <= v + epsilon, nats per chosen token; >= 0"""
    ramp_steps: int = Field(0, ge=0)
    """penalty only: optimizer steps over which lambda increases from 0; >= 0"""
    lambda_max: float = Field(10.0, gt=0)
    """dual only: maximum of lambda; > 0"""
    dual_lr: float = Field(0.1, gt=0)
    """dual only: change of lambda per step and per nat of gap; > 0"""
    sft_steps: int = Field(1, ge=1)
    """alternating only: consecutive steps on the SFT objective; >= 1"""
    preference_steps: int = Field(1, ge=1)
    """alternating only: consecutive steps on the preference loss; >= 1"""
    lookahead_lr: float = Field(1e-3, gt=0)
    """lookahead only: learning rate of the inner SFT step (a gradient step on the SFT loss per token); > 0"""
    barrier_rate: float = Field(100.0, ge=0)
    """barrier only: how fast the SFT loss must fall per nat of gap above epsilon; >= 0"""
    v: (
        Annotated[
            Annotated[NotNegative, Tag("one")] | Annotated[Literal["running_min"], Tag("word")],
            Discriminator(form_of_v),
        ]
        | None
    ) = None
    """optimal SFT loss, nats per chosen token; >= 0, or running_min: the lowest so far; null: that of the reference"""
    sft_data: Sources = []
    """SFT rows for the lower level (prompt and completion, or messages); format as data.train; []: chosen responses"""
    sft_batch_size: int | None = Field(None, ge=1)
    """rows of spo.sft_data per optimizer step over all processes; null: training.global_batch_size; >= 1"""

    @property
    def spec(self) -> ScheduleSpec:
        """Properties of the configured schedule."""
        return SCHEDULE_SPECS[self.schedule]
