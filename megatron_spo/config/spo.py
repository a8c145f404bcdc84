"""The schedules: what the configuration knows about each, and the keys of section `spo`. No torch.

A new schedule is a `ScheduleSpec` here, a function in `megatron_spo.objective.schedules`, and its own keys in
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
    """The facts of one schedule that do not need tensors.

    Attributes:
        name: the value of `spo.schedule`.
        summary: one line for the generated documentation.
        keys: keys of section `spo` that it reads; those in no schedule's list are read with every schedule.
        preference: whether it trains on the preference loss at all.
        one_term: whether a step computes only one of the two terms, preference loss or SFT loss.
        needs_gap: whether it needs the gap g - v, whatever the other keys say.
        passes: forward and backward passes over the rows of a step.
        gradients_kept: fp32 copies of a rank's shard of the gradient that it keeps within a step.
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
        """Whether spo.lambda weighs its SFT term."""
        return "lambda" in self.keys

    @property
    def has_unit(self) -> bool:
        """Whether its SFT term stands next to the preference loss in one pass, in spo.lambda_unit."""
        return "lambda_unit" in self.keys


def _spec(name: str, summary: str, keys: str = "", **more: Any) -> ScheduleSpec:
    return ScheduleSpec(name, summary, frozenset(keys.split()), **more)


_SPECS = (
    _spec("none", "the preference loss alone"),
    _spec("sft", "the SFT loss alone", "sft_data", preference=False, one_term=True),
    _spec("penalty", "preference loss + lambda * SFT term",
          "lambda lambda_unit constraint epsilon ramp_steps sft_data"),
    _spec("dual", "the same, with a lambda that follows the gap (dual ascent)",
          "lambda lambda_unit epsilon lambda_max dual_lr sft_data", needs_gap=True),
    _spec("alternating", "some steps on the SFT loss, then some on the preference loss",
          "sft_steps preference_steps sft_data", one_term=True),
    _spec("lookahead", "the preference loss after an inner SFT step", "lambda lookahead_lr sft_data",
          passes=2, gradients_kept=3),
    _spec("barrier", "the preference loss, and as much of the SFT loss as makes it fall (dynamic barrier)",
          "epsilon barrier_rate sft_data", needs_gap=True, passes=2, gradients_kept=2),
)  # fmt: skip
SCHEDULE_SPECS: Mapping[str, ScheduleSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
ScheduleName = Literal["none", "sft", "penalty", "dual", "alternating", "lookahead", "barrier"]


def schedules_with(key: str) -> list[str]:
    """Names of the schedules that read a key of section `spo`; [] for a key that is read with every schedule."""
    return [name for name, spec in SCHEDULE_SPECS.items() if key in spec.keys]


class SpoConfig(Section):
    """The bilevel schedule: how the SFT objective (lower level) enters a step."""

    schedule: ScheduleName = "penalty"
    """preference loss alone, SFT alone, or both"""
    lambda_: float = Field(1.0, alias="lambda", ge=0)
    """weight of the SFT term (dual: its start), in spo.lambda_unit; >= 0"""
    lambda_unit: Literal["token", "relative"] = "relative"
    """token: weight on the SFT loss per token; relative: in units of the preference loss's own pull"""
    constraint: Literal["none", "batch", "pair"] = "none"
    """penalty only: apply the SFT term always, or only where the batch or the pair left the safe region"""
    epsilon: float = Field(0.0, ge=0)
    """width of the safe region g <= v + epsilon, nats per chosen token; >= 0"""
    ramp_steps: int = Field(0, ge=0)
    """penalty only: optimizer steps over which lambda rises from 0; >= 0"""
    lambda_max: float = Field(10.0, gt=0)
    """dual only: largest lambda; > 0"""
    dual_lr: float = Field(0.1, gt=0)
    """dual only: change of lambda per step and nat of gap; > 0"""
    sft_steps: int = Field(1, ge=1)
    """alternating only: consecutive steps on the SFT objective; >= 1"""
    preference_steps: int = Field(1, ge=1)
    """alternating only: consecutive steps on the preference loss; >= 1"""
    lookahead_lr: float = Field(1e-3, gt=0)
    """lookahead only: length of the inner SFT step, relative to the gradient of the SFT loss per token; > 0"""
    barrier_rate: float = Field(100.0, ge=0)
    """barrier only: how fast the SFT loss must fall, per nat of gap beyond epsilon; >= 0"""
    v: (
        Annotated[
            Annotated[NotNegative, Tag("one")] | Annotated[Literal["running_min"], Tag("word")],
            Discriminator(form_of_v),
        ]
        | None
    ) = None
    """best SFT loss, nats per chosen token: >= 0, or running_min (lowest batch so far); null: the reference's own"""
    sft_data: Sources = []
    """SFT rows (prompt, completion; or messages) as lower level; forms as data.train; []: the chosen responses"""
    sft_batch_size: int | None = Field(None, ge=1)
    """rows of spo.sft_data per optimizer step; null: training.global_batch_size; >= 1"""

    @property
    def spec(self) -> ScheduleSpec:
        """The facts of its schedule."""
        return SCHEDULE_SPECS[self.schedule]
