"""The keys of monitoring, and the rules between them and others."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megatron_spo.config.section import Section

if TYPE_CHECKING:
    from megatron_spo.config.schema import Config


class MonitorConfig(Section):
    """What is watched while it trains: bounds of alarms, and answers to held-out prompts."""

    on_alarm: Literal["warn", "stop", "raise_lambda"] = "warn"
    """log the alarm; or also save and stop (exit code 3); or also multiply spo.lambda by 2 and continue"""
    chosen_fall: float = Field(0.03, gt=0)
    """alarm: mean fall of the chosen answers' log-prob (or spo/gap without a reference), nats per chosen token; > 0"""
    both_down: float = Field(0.05, gt=0, le=1)
    """alarm: share of pairs in which both answers fell; > 0, <= 1 (1: none)"""
    generate_every: int = Field(0, ge=0)
    """optimizer steps between answers to prompts of data.eval, the first before step 1; 0: none; >= 0"""
    generate_prompts: int = Field(32, ge=1)
    """prompts of each set of data.eval to be answered, the first ones; >= 1"""


def unused(config: "Config") -> dict[str, str]:
    """Keys of monitoring that have no effect in this configuration, each with the message for whoever sets it."""
    found = {}
    if config.monitor.generate_every == 0:
        found["generate_prompts"] = "monitor.generate_every: 0"
    if not config.has_reference:
        found["both_down"] = "reference.cache: null"
        if config.spo.v is None:
            found["chosen_fall"] = "reference.cache: null and spo.v: null"
    return {f"monitor.{key}": f"monitor.{key} has no effect with {beside}" for key, beside in found.items()}


def _cannot_raise(config: "Config") -> bool:
    return config.monitor.on_alarm == "raise_lambda" and not (config.spo.spec.has_lambda and config.spo.lambda_ > 0)


MONITORING: tuple[tuple[Callable[["Config"], bool], str], ...] = (
    (
        _cannot_raise,
        "monitor.on_alarm: raise_lambda multiplies spo.lambda, which spo.schedule: {c.spo.schedule} with spo.lambda = "
        "{c.spo.lambda_} does not have; set on_alarm=stop, or a schedule among penalty, dual and lookahead with "
        "spo.lambda > 0",
    ),
    (
        lambda c: c.monitor.generate_every > 0 and not c.data.eval,
        "monitor.generate_every = {c.monitor.generate_every} without data.eval; name held-out data, or remove it",
    ),
)
"""Predicate of a combination that is refused, and its message; {c.section.key} in it is filled in."""
