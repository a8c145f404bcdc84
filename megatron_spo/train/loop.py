"""The training loop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from megatron_spo.config.schema import Config
from megatron_spo.model.wrap import Trainable, learning_rate
from megatron_spo.objective.schedules import observe, plan_step
from megatron_spo.train import checkpoint
from megatron_spo.train.run_directory import RunDirectory
from megatron_spo.train.state import TrainState
from megatron_spo.train.step import DataInUse, Engine

Listener = Callable[[str, int, dict[str, float]], None]
"""Called with (kind, step, metrics) for every line of metrics.jsonl."""


@dataclass(frozen=True)
class Job:
    """What one training run works with."""

    config: Config
    engine: Engine
    trainable: Trainable
    train: DataInUse
    evals: Sequence[DataInUse]
    directory: RunDirectory
    listeners: Sequence[Listener]
    steps: int


def run(job: Job, state: TrainState) -> TrainState:
    """Train from `state` to the last step; checkpoints, evaluations and log lines on their cadences."""
    config, directory = job.config, job.directory
    with tqdm(total=job.steps, initial=state.step, unit="step", disable=not _shows_bar(job)) as bar:
        while state.step < job.steps:
            state, metrics = _step(job, state)
            last = state.step == job.steps
            if state.step % config.logging.every == 0 or last:
                _log(job, "train", state.step, metrics)
                bar.set_postfix_str(_summary(metrics))
            bar.update()
            if last or (config.training.eval_every and state.step % config.training.eval_every == 0):
                evaluate(job, state)
            if last or (config.checkpoint.every and state.step % config.checkpoint.every == 0):
                path = checkpoint.save(directory.checkpoints, job.trainable, state, keep=config.checkpoint.keep)
                directory.status("running", state.step, checkpoint=path.name, steps=job.steps)
    return state


def evaluate(job: Job, state: TrainState) -> None:
    """Log the metrics of every held-out set."""
    passes = plan_step(job.config.spo, state.step, state.schedule).passes
    pass_ = next((one for one in passes if one.preference), passes[0])
    for data in job.evals:
        begin = time.perf_counter()
        metrics = job.engine.evaluate(pass_, data, statistics=state.statistics)
        _log(job, "eval", state.step, {**metrics, "seconds": time.perf_counter() - begin}, name=data.name)


def _step(job: Job, state: TrainState) -> tuple[TrainState, dict[str, float]]:
    config, begin = job.config, time.perf_counter()
    batch = job.train.loader.batch(state.step)
    plan = plan_step(config.spo, state.step, state.schedule)
    lr = learning_rate(state.step, job.steps, config.optimizer)
    outcome = job.engine.train_step(plan, job.train, batch, statistics=state.statistics, lr=lr)
    sums, metrics = outcome.sums, outcome.metrics
    schedule, statistics = state.schedule, state.statistics
    if "spo/gap" in metrics:
        schedule = observe(config.spo, schedule, metrics["spo/gap"])
    if job.engine.keeps_statistics and "loss/preference" in metrics:
        statistics = statistics.update(sums["statistic"], sums["statistic_squared"], batch.pairs)
    metrics |= {
        "tokens": batch.tokens,
        "row_fill": batch.row_fill,
        "epoch": (state.step + 1) / job.train.loader.steps_per_epoch,
        "seconds": time.perf_counter() - begin,
    }
    return TrainState(state.step + 1, schedule, statistics), metrics


def _log(job: Job, kind: str, step: int, metrics: dict[str, float], **labels: str) -> None:
    job.directory.log(kind, step, {**labels, **metrics})
    for listener in job.listeners:
        listener(kind if not labels else f"{kind}/{labels['name']}", step, metrics)


def _shows_bar(job: Job) -> bool:
    return job.directory.is_main and job.config.logging.progress


def _summary(metrics: dict[str, float]) -> str:
    """The numbers that matter, for the progress bar."""
    shown = {"loss": "loss", "rewards/accuracies": "acc", "spo/gap": "gap", "spo/lambda": "lambda",
             "spo/both_down": "both_down"}  # fmt: skip
    return "  ".join(f"{label} {metrics[name]:.3g}" for name, label in shown.items() if name in metrics)
