"""Where a run's metric lines go besides metrics.jsonl. A sink that fails is not used any more; training continues."""

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_spo.errors import Stopped

LOG = logging.getLogger(__name__)

Line = Mapping[str, Any]


class Sink(Protocol):
    """Receives the lines and tables of a run; its methods may raise any exception."""

    def line(self, kind: str, step: int, values: Line) -> None:
        """Receives a line of metrics.jsonl: numbers by metric name, and texts such as the name of the set."""

    def table(self, name: str, step: int, rows: Sequence[Line]) -> None:
        """Receives rows with texts, all with the same columns: the worst held-out pairs, or answers."""

    def close(self, report: Path, code: int) -> None:
        """Ends the run with the command's exit code; the report exists if the run reached its last step."""


class Sinks:
    """All sinks of a run; removes those that fail."""

    def __init__(self) -> None:
        self._sinks: list[Sink] = []

    def open(self, kind: type[Sink], *arguments: Any, **more: Any) -> None:
        """Creates a sink of this kind with these arguments and adds it."""
        self._tolerate(kind, lambda: self._sinks.append(kind(*arguments, **more)))

    def line(self, kind: str, step: int, values: Line) -> None:
        """As `Sink.line`."""
        self._each(lambda sink: sink.line(kind, step, values))

    def table(self, name: str, step: int, rows: Sequence[Line]) -> None:
        """As `Sink.table`."""
        self._each(lambda sink: sink.table(name, step, rows))

    def close(self, report: Path, code: int) -> None:
        """As `Sink.close`."""
        self._each(lambda sink: sink.close(report, code))
        self._sinks.clear()

    def _each(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            if not self._tolerate(type(sink), lambda sink=sink: action(sink)):  # type: ignore[misc]
                self._sinks.remove(sink)

    def _tolerate(self, kind: type[Sink], action: Callable[[], object]) -> bool:
        try:
            action()
        except Exception as error:  # third-party libraries, the network or the disk
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            LOG.warning(f"{kind.__name__} failed and is not used any more ({reason}); metrics.jsonl has every line")
            return False
        return True


STEP = "train/global_step"
"""Name of the step, as in transformers' trainers, so that runs of both share an axis."""
SAME_IN_TRL = {"policy/entropy": "entropy"}
"""Metrics that TRL has by another name."""


def named(kind: str, values: Line, sets: Sequence[str]) -> dict[str, float]:
    """Returns the numbers of a line under the names that they have in TRL, if they have the same meaning there.

    These are `train/loss` and, for held-out data, `eval/loss`; with several held-out sets, `eval/SET_loss`.
    """
    data = values.get("name") or values.get("data")
    prefix = f"{kind}/" if data is None else f"{kind}/{data}_" if len(sets) > 1 else f"{kind}/"
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    if kind == "eval":
        numbers["runtime"] = numbers.pop("seconds")
    return {prefix + SAME_IN_TRL.get(name, name.removeprefix(f"{kind}/")): one for name, one in numbers.items()}


class WeightsAndBiases:
    """One W&B run per run directory, however often the command is started; the file `wandb_id` keeps its id."""

    def __init__(self, folder: Path, *, mode: str, project: str, config: Line, sets: Sequence[str]) -> None:
        """Starts or continues the run; `sets` are the names of the held-out sets."""
        import wandb

        self._sets = sets
        kept = folder / "wandb_id"
        if not kept.exists():
            kept.write_text(secrets.token_hex(8))
        self._wandb = wandb
        self._run = wandb.init(
            id=kept.read_text(),
            resume="allow" if mode == "online" else None,  # offline, `wandb sync` merges the parts by their id
            project=project,
            name=folder.resolve().name,
            mode=mode,  # type: ignore[arg-type]
            dir=folder,
            config=dict(config),
        )
        # W&B's own step counter would reject the steps that are repeated after a restart.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def line(self, kind: str, step: int, values: Line) -> None:
        if kind == "alarm" and "alarm" in values:
            self._run.alert(title=f"{values['alarm']} on {values['data']}", text=values["message"])
            self._run.log({STEP: step, f"alarm/{values['data']}/{values['alarm']}": values["value"]})
            return
        self._run.log({STEP: step, **named(kind, values, self._sets)})

    def table(self, name: str, step: int, rows: Sequence[Line]) -> None:
        table = self._wandb.Table(columns=[*rows[0]], data=[list(row.values()) for row in rows])
        self._run.log({STEP: step, name: table})

    def close(self, report: Path, code: int) -> None:
        if report.exists():
            artifact = self._wandb.Artifact(f"report-{self._run.id}", type="report")
            artifact.add_file(str(report))
            self._run.log_artifact(artifact)
        if code == Stopped.code:
            self._run.mark_preempting()  # the same command resumes the run
        self._run.finish(exit_code=code)


class TensorBoard:
    """Writes event files to the folder `tensorboard` of the run directory."""

    def __init__(self, folder: Path, *, after_step: int, sets: Sequence[str]) -> None:
        """Continues after a step; `sets` are the names of the held-out sets."""
        from torch.utils.tensorboard import SummaryWriter

        self._sets = sets
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)

    def line(self, kind: str, step: int, values: Line) -> None:
        if kind == "alarm" and "alarm" in values:
            self._writer.add_text(f"alarm/{values['data']}", values["message"], step)
            return
        for metric, value in named(kind, values, self._sets).items():
            self._writer.add_scalar(metric, value, step)
        self._writer.flush()

    def table(self, name: str, step: int, rows: Sequence[Line]) -> None:
        text = "\n\n".join("\n".join(f"    {key}: {value!r}" for key, value in row.items()) for row in rows)
        self._writer.add_text(name, text, step)

    def close(self, report: Path, code: int) -> None:
        self._writer.close()
