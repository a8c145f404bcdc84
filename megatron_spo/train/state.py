"""The training state, apart from weights and optimizer."""

from dataclasses import asdict, dataclass
from typing import Any

from megatron_spo.model.experts import Load
from megatron_spo.objective.schedules import ScheduleState
from megatron_spo.objective.statistics import LossStatistics
from megatron_spo.train.anomalies import GradientNorms
from megatron_spo.train.monitor import MonitorState


@dataclass(frozen=True)
class Best:
    """Value of the best evaluation so far, by checkpoint.best, and the step after which it was made."""

    value: float
    step: int


@dataclass(frozen=True)
class TrainState:
    """Steps done and the state of schedule, loss and monitor; the position in the data follows from `step`."""

    step: int
    schedule: ScheduleState
    statistics: LossStatistics
    norms: GradientNorms = GradientNorms()
    evaluation_pending: bool = False
    """Whether the evaluation after this step is still pending, because the run was stopped before it."""
    best: Best | None = None
    router_load: Load | None = None
    """Router load of the last global batch; None before the first one, and if routers are not balanced."""
    monitor: MonitorState = MonitorState()

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation so far."""
        return None if self.best is None else self.best.step

    def to_dict(self) -> dict[str, Any]:
        """Returns the state as plain data for the checkpoint."""
        return {
            "step": self.step,
            "schedule": self.schedule.to_dict(),
            "statistics": self.statistics.to_dict(),
            "norms": asdict(self.norms),
            "evaluation_pending": self.evaluation_pending,
            "best": self.best and asdict(self.best),
            "router_load": self.router_load,
            "monitor": asdict(self.monitor),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "TrainState":
        """Inverse of `to_dict`."""
        return cls(
            state["step"],
            ScheduleState.from_dict(state["schedule"]),
            LossStatistics.from_dict(state["statistics"]),
            GradientNorms(**state["norms"]),
            state.get("evaluation_pending", state.get("evaluation_owed", False)),  # the older name
            state["best"] and Best(**state["best"]),
            state["router_load"],
            MonitorState.from_dict(state.get("monitor")),
        )
