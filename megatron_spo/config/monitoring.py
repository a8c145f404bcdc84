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
    """say it; or save and end too (exit code 3); or multiply spo.lambda by monitor.raise_factor too, and go on"""
    raise_factor: float = Field(2.0, gt=1)
    """raise_lambda only: what an alarm multiplies lambda by; > 1"""
    chosen_fall: float = Field(0.03, gt=0)
    """alarm: mean fall of the chosen answers' log-prob (or spo/gap without a reference), nats per chosen token; > 0"""
    both_down: float = Field(0.05, gt=0, le=1)
    """alarm: share of pairs in which both answers fell; > 0, <= 1 (1: none)"""
    entropy_factor: float = Field(3.0, gt=1)
    """alarm: token entropy of a set so many times its first one, or as small a part of it; > 1"""
    answers_fall: float = Field(0.05, gt=0, le=1)
    """alarm: share of data.eval's prompts answered rightly before training and no longer now; > 0, <= 1 (1: none)"""
    generate_every: int = Field(0, ge=0)
    """optimizer steps between answers to prompts of data.eval, the first before step 1; 0: none; >= 0"""
    generate_prompts: int = Field(32, ge=1)
    """prompts of each set of data.eval to be answered, the first ones; >= 1"""
    generate_engine: Literal["transformers", "vllm"] = "transformers"
    """what computes the answers; vllm where it is installed"""


def unused(config: "Config") -> dict[str, str]:
    """Keys of monitoring that have no effect in this configuration, each with the message for whoever sets it."""
    found = {}
    if config.monitor.on_alarm != "raise_lambda":
        found["raise_factor"] = f"monitor.on_alarm: {config.monitor.on_alarm}; it belongs to raise_lambda"
    if config.monitor.generate_every == 0:
        found |= dict.fromkeys(("generate_prompts", "generate_engine", "answers_fall"), "monitor.generate_every: 0")
    if not config.spo.spec.preference:
        found["entropy_factor"] = f"spo.schedule: {config.spo.schedule}, which lowers the entropy on purpose"
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
