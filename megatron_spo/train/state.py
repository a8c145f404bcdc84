"""Everything that changes with training, besides weights and optimizer."""

from dataclasses import asdict, dataclass
from typing import Any

from megatron_spo.model.experts import Load
from megatron_spo.objective.schedules import ScheduleState
from megatron_spo.objective.statistics import LossStatistics
from megatron_spo.train.anomalies import GradientNorms
from megatron_spo.train.monitor import MonitorState


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, by checkpoint.best, and the step it was made after."""

    value: float
    step: int


@dataclass(frozen=True)
class TrainState:
    """Steps done, and what the schedule and the loss remember of them; the position in the data follows from `step`."""

    step: int
    schedule: ScheduleState
    statistics: LossStatistics
    norms: GradientNorms = GradientNorms()
    evaluation_owed: bool = False
    """The run was stopped before the evaluation that belongs to this step."""
    best: Best | None = None
    router_load: Load | None = None
    """Of the last global batch; None before the first, and where routers are not balanced."""
    monitor: MonitorState = MonitorState()

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation so far."""
        return None if self.best is None else self.best.step

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return {
            "step": self.step,
            "schedule": self.schedule.to_dict(),
            "statistics": self.statistics.to_dict(),
            "norms": asdict(self.norms),
            "evaluation_owed": self.evaluation_owed,
            "best": self.best and asdict(self.best),
            "router_load": self.router_load,
            "monitor": asdict(self.monitor),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "TrainState":
        """The inverse of `to_dict`."""
        return cls(
            state["step"],
            ScheduleState.from_dict(state["schedule"]),
            LossStatistics.from_dict(state["statistics"]),
            GradientNorms(**state["norms"]),
            state["evaluation_owed"],
            state["best"] and Best(**state["best"]),
            state["router_load"],
            MonitorState.from_dict(state.get("monitor")),
        )
