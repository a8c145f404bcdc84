"""The keys of section `monitor` and the rules that involve them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megatron_spo.config.section import Section

if TYPE_CHECKING:
    from megatron_spo.config.schema import Config


class MonitorConfig(Section):
    """Alarms during training, and generated answers to held-out prompts."""

    on_alarm: Literal["warn", "stop", "raise_lambda"] = "warn"
    """log the alarm; or also save and stop (exit code 3); or also multiply spo.lambda by 2 and continue"""
    chosen_fall: float = Field(0.03, gt=0)
    """alarm above this mean fall of the chosen log-prob (without a reference: spo/gap), nats per chosen token; > 0"""
    both_down: float = Field(0.05, gt=0, le=1)
    """alarm above this fraction of pairs in which both log-probs fell; > 0, <= 1 (1: off)"""
    generate_every: int = Field(0, ge=0)
    """optimizer steps between answers to data.eval prompts, starting before step 1; 0: off; >= 0"""
    generate_prompts: int = Field(32, ge=1)
    """number of prompts to answer in each data.eval set (the first ones); >= 1"""


def unused(config: "Config") -> dict[str, str]:
    """Returns the keys of section `monitor` that have no effect in this configuration, with their error messages."""
    found = {}
    if config.monitor.generate_every == 0:
        found["generate_prompts"] = "monitor.generate_every: 0"
    if not config.has_reference:
        found["both_down"] = "reference.cache: null"
        if config.spo.v is None:
            found["chosen_fall"] = "reference.cache: null and spo.v: null"
    return {f"monitor.{key}": f"monitor.{key} has no effect with {state}" for key, state in found.items()}


def _cannot_raise(config: "Config") -> bool:
    return config.monitor.on_alarm == "raise_lambda" and not (config.spo.spec.has_lambda and config.spo.lambda_ > 0)


MONITORING: tuple[tuple[Callable[["Config"], bool], str], ...] = (
    (
        _cannot_raise,
        "monitor.on_alarm: raise_lambda is not supported with spo.schedule: {c.spo.schedule} and spo.lambda = "
        "{c.spo.lambda_}; set monitor.on_alarm=stop, or spo.schedule to penalty, dual or lookahead and spo.lambda > 0",
    ),
    (
        lambda c: c.monitor.generate_every > 0 and not c.data.eval,
        "monitor.generate_every = {c.monitor.generate_every} requires data.eval; set data.eval, or "
        "monitor.generate_every=0",
    ),
)
"""Predicates of unsupported combinations and their messages, in which {c.section.key} is filled in."""
