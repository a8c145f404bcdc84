"""The training loop."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_spo.checkpoint.folder import wait_for_removals
from megatron_spo.checkpoint.save import SaveFailed, Saver
from megatron_spo.config.schema import Config
from megatron_spo.data.loader import Batch
from megatron_spo.errors import Anomaly, NotSaved, UserError
from megatron_spo.meter import duration
from megatron_spo.model.optimizer import learning_rate
from megatron_spo.objective.schedules import observe, plan_step, raise_lambda
from megatron_spo.objective.step_plan import Role
from megatron_spo.runtime.clock import Clock
from megatron_spo.runtime.progress import Progress
from megatron_spo.train.anomalies import BadStep, alarm
from megatron_spo.train.memory import PeakMemory
from megatron_spo.train.monitor import MonitorState, check, check_answers
from megatron_spo.train.pair_shifts import Decode, held_out
from megatron_spo.train.run_directory import RunDirectory
from megatron_spo.train.state import Best, TrainState
from megatron_spo.train.step import DataInUse, Engine, Share
from megatron_spo.train.step_lines import StepLines, shown_metrics
from megatron_spo.train.stop import StopRequest

LOG = logging.getLogger(__name__)

RAISE_FACTOR = 2.0
"""What an alarm multiplies lambda by with monitor.on_alarm: raise_lambda."""
RETRY = 10.0
"""Seconds between attempts to write the last checkpoint."""
LOWER_IS_BETTER = ("loss", "loss/preference", "loss/sft", "spo/gap", "spo/both_down")

AtPeak = Callable[[str, NDArray[np.int64]], float]
"""(name of a data set, indices of pairs) -> seconds that they would take on all GPUs at peak FLOP/s."""


@dataclass(frozen=True)
class Training:
    """The objects that one training run works with."""

    config: Config
    engine: Engine
    saver: Saver
    train: DataInUse
    sft: DataInUse | None
    evals: Sequence[DataInUse]
    directory: RunDirectory
    decode: Decode
    answer: Callable[[TrainState], Mapping[str, float]] | None
    """Answers held-out prompts with the current weights and logs the scores. Returns the share of correct answers per
    set that has them, on all ranks; all ranks must call it together. None if no prompts are answered."""
    steps: int
    stop: StopRequest
    progress: Progress
    clock: Clock
    lines: StepLines
    memory: PeakMemory
    at_peak: AtPeak | None


def run(job: Training, state: TrainState) -> TrainState:
    """Trains from `state` to the last step, with the configured checkpoints, evaluations and log lines.

    Raises:
        Stopped: on every rank, because of a signal or the time limit; everything is saved.
        Anomaly: on every rank, if training.on_anomaly or monitor.on_alarm is "stop".
    """
    config, known = job.config, state.monitor.raised
    if state.step == 0:  # the values before training, with which later ones are compared
        state = _answer(job, evaluate(job, state))
    if state.evaluation_pending:
        state = _measure(job, state)
        if state.step == job.steps:  # no later step would save the best evaluation
            _save(job, state, surely=True, due=False)
    while state.step < job.steps:
        with job.stop.timing("step"):
            state, metrics = _step(job, state)
        last = state.step == job.steps
        if metrics:
            if state.step % config.logging.every == 0 or last:
                job.directory.log("train", state.step, metrics)
            state = _warn(job, state, *check(config.monitor, state.monitor, state.step, job.train.name, metrics))
        job.lines.after(state.step, metrics)
        due = any(_due(job, state.step))
        stop = job.stop.reason(*(["evaluation"] if due else []), *([] if last else ["step"]))
        state = replace(state, evaluation_pending=due)
        if due and not stop:
            state = _measure(job, state)
        alarms = [text for name, text in state.monitor.raised.items() if name not in known]
        known = state.monitor.raised
        halt = bool(alarms) and config.monitor.on_alarm == "stop" and not last
        best_yet = state.best is not None and state.best.step == state.step
        checkpoint_due = best_yet or _falls_on(config.checkpoint.every, state.step)
        _save(job, state, surely=last or halt or bool(stop), due=checkpoint_due)
        if halt:
            raise Anomaly(
                f"{'; '.join(alarms)}. Training stopped because of monitor.on_alarm=stop; everything is saved. The "
                "same command resumes past the alarm. To avoid the alarm, start again in another output folder "
                "with a higher spo.lambda or a lower optimizer.lr"
            )
        if stop and (state.evaluation_pending or not last):
            job.stop.end(stop, state.step)
    return state


def _due(job: Training, step: int) -> tuple[bool, bool]:
    """Returns whether after this step an evaluation is due, and whether answers to held-out prompts are due."""
    last, config = step == job.steps, job.config
    evaluation = bool(job.evals) and (last or _falls_on(config.training.eval_every, step))
    return evaluation, job.answer is not None and (last or _falls_on(config.monitor.generate_every, step))


def _measure(job: Training, state: TrainState) -> TrainState:
    """Runs what is due after a step: the evaluation and the answers to held-out prompts."""
    evaluation, answers = _due(job, state.step)
    with job.stop.timing("evaluation"):
        if evaluation:
            state = evaluate(job, state)
        if answers:
            state = _answer(job, state)
    return replace(state, evaluation_pending=False)


def _answer(job: Training, state: TrainState) -> TrainState:
    """Answers held-out prompts and raises the alarms on their scores."""
    if job.answer is None:
        return state
    job.progress.phase(f"answers after step {state.step}", times=4)
    for data, exact_match in job.answer(state).items():
        found = check_answers(state.monitor, state.step, data, exact_match)
        state = _warn(job, state, *found)
    return state


def _warn(job: Training, state: TrainState, monitor: MonitorState, alarms: Sequence[dict[str, Any]]) -> TrainState:
    """Logs these alarms and raises lambda if configured; returns the new state."""
    config, schedule = job.config, state.schedule
    raises = config.monitor.on_alarm == "raise_lambda"
    if alarms and raises:
        schedule = raise_lambda(config.spo, schedule, RAISE_FACTOR)
    for line in alarms:
        if schedule != state.schedule:
            line["message"] += f"; lambda is multiplied by {RAISE_FACTOR:g}"
        elif raises:
            line["message"] += f"; lambda stays at {schedule.lambda_:g}: it is 0 or already at spo.lambda_max"
        job.directory.log("alarm", state.step, line)
        if job.directory.is_main:
            LOG.warning(line["message"])
    return replace(state, monitor=monitor, schedule=schedule)


def evaluate(job: Training, state: TrainState) -> TrainState:
    """Logs the metrics of every held-out set and writes the results of each pair."""
    config = job.config
    pass_ = plan_step(config.spo, state.step, state.schedule).upper
    job.progress.phase(f"evaluation after step {state.step}")
    for data in job.evals:
        begin = time.perf_counter()
        try:
            metrics, shifts = job.engine.evaluate(pass_, data, state=state, shown=job.lines.shown)
        except BadStep as bad:
            _raise_alarm(job, bad, state, state.step)
            continue
        seconds = time.perf_counter() - begin
        job.directory.log("eval", state.step, {"name": data.name, **metrics, "seconds": seconds})
        job.lines.say(f"evaluation after step {state.step} on {data.name}", *shown_metrics(metrics), duration(seconds))
        if shifts is not None and job.directory.is_main:
            found = held_out(data.loader.dataset, shifts, state.step, job.decode)
            job.directory.write_held_out(data.name, found)
        state = _warn(job, state, *check(config.monitor, state.monitor, state.step, data.name, metrics))
        if data is job.evals[0] and state.step > 0:  # the untrained model is no checkpoint
            state = replace(state, best=_better(config.checkpoint.best, metrics, state))
    return state


def _better(metric: str | None, metrics: dict[str, float], state: TrainState) -> Best | None:
    """Returns the best evaluation so far, including the one with these metrics."""
    if metric is None:
        return state.best
    if metric not in metrics:
        raise UserError(
            f"checkpoint.best = {metric} is not measured in this run; set it to one of {', '.join(metrics)}"
        )
    value, best = metrics[metric], state.best
    if best is None or (value < best.value if metric in LOWER_IS_BETTER else value > best.value):
        return Best(value, state.step)
    return best


def _save(job: Training, state: TrainState, *, surely: bool, due: bool) -> None:
    """Completes the checkpoint that is being written, if it is ready or must be, and starts one if it is due.

    `surely`: training ends here, so the checkpoint must be on disk before this returns.
    """
    if surely or (due and job.saver.is_open):
        job.progress.phase(f"saving step {state.step}", times=4)
    _complete(job, state, wait=surely or due)
    if surely:
        with job.stop.timing("save"):
            _save_now(job, state)
    elif due:
        with _reported(job, state):
            job.saver.start(state, in_background=job.config.checkpoint.async_)
            _announce(job, state)
        _complete(job, state, wait=not job.config.checkpoint.async_)


def _complete(job: Training, state: TrainState, *, wait: bool) -> None:
    with _reported(job, state):
        if job.saver.finished(wait=wait):
            _saved(job, state)


def _raise_alarm(job: Training, bad: BadStep, state: TrainState, step: int) -> None:
    """Logs a bad step or evaluation. First completes a checkpoint that is being written, as training may end here.

    Raises:
        Anomaly: on every rank, if training.on_anomaly is "stop".
    """
    _complete(job, state, wait=True)
    alarm(bad, step, job.directory, job.config.training.on_anomaly)


@contextlib.contextmanager
def _reported(job: Training, state: TrainState) -> Iterator[None]:
    """Turns a checkpoint that cannot be written into a warning and an alarm line; training continues."""
    try:
        yield
    except SaveFailed as error:
        reason = f"no checkpoint could be written to {job.directory.checkpoints}: {error}"
        job.directory.log("alarm", state.step, {"reason": reason})
        if job.directory.is_main:
            LOG.warning(f"step {state.step}: {reason}. Training continues; free disk space there")


def _save_now(job: Training, state: TrainState) -> None:
    """Writes the last checkpoint; retries for `training.hang_timeout` so that a user can free disk space.

    Raises:
        NotSaved: on every rank, if the last attempt fails.
    """
    attempts = max(1, math.ceil(job.config.training.hang_timeout * 60 / RETRY))
    for left in range(attempts - 1, -1, -1):
        try:
            job.saver.start(state, in_background=False)
            _announce(job, state)
            job.saver.finished(wait=True)
            break
        except SaveFailed as error:
            where = f"step {state.step} could not be saved in {job.directory.checkpoints}: {error}"
            if left == 0:
                raise NotSaved(
                    f"{where}. Its weights are lost; the same command resumes from the previous checkpoint"
                ) from error
            if job.directory.is_main:
                LOG.warning(
                    f"{where}. Its weights are still in memory; free disk space there or make the folder writable. "
                    f"Retrying every {RETRY:g} seconds, {left} more times"
                )
        time.sleep(RETRY)
        job.progress.tick()
    _saved(job, state)
    wait_for_removals()


def _announce(job: Training, state: TrainState) -> None:
    job.lines.say(f"saving step {state.step}: {job.saver.nbytes / 1e9:.2g} GB")


def _saved(job: Training, state: TrainState) -> None:
    job.directory.restore()
    job.directory.status("running", state.step, checkpoint=job.saver.last_saved, steps=job.steps)
    job.lines.say(f"saved {job.saver.last_saved} in {duration(job.saver.seconds)}")


def _step(job: Training, state: TrainState) -> tuple[TrainState, dict[str, float]]:
    """Runs one step and returns the new state and its metrics; a skipped step only advances the step count and has no
    metrics."""
    config = job.config
    job.progress.phase(f"step {state.step + 1}")
    job.clock.start()
    with job.clock.phase("data"):
        shares = _shares(job, state.step)
    plan = plan_step(config.spo, state.step, state.schedule)
    lr = learning_rate(state.step, job.steps, config.optimizer)
    limit = state.norms.limit(config.training.spike_factor)
    try:
        outcome = job.engine.train_step(plan, *shares, state=state, lr=lr, largest_norm=limit)
    except BadStep as bad:
        _raise_alarm(job, bad, state, state.step + 1)
        return replace(state, step=state.step + 1, norms=state.norms.skipped()), {}
    sums, metrics = outcome.sums, outcome.metrics
    schedule, statistics = state.schedule.saw(metrics["loss/sft"]), state.statistics
    if "spo/gap" in metrics:
        schedule = observe(config.spo, schedule, metrics["spo/gap"])
    if job.engine.keeps_statistics and "loss/preference" in metrics:
        statistics = statistics.update(sums["statistic"], sums["statistic_squared"], shares[0].batch.pairs)
    metrics |= _use_of_data(job, state.step, [share.batch for share in shares if share is not None])
    metrics |= job.clock.read() | job.memory.read()
    metrics["tokens_per_second"] = metrics["tokens"] / metrics["seconds"]
    if job.at_peak is not None:
        ideal = sum(job.at_peak(share.data.name, share.batch.indices) for share in shares if share is not None)
        metrics["mfu"] = ideal / metrics["seconds"]
    state = replace(
        state,
        step=state.step + 1,
        schedule=schedule,
        statistics=statistics,
        norms=state.norms.taken(metrics["grad_norm"]),
        router_load=outcome.router_load,
    )
    return state, metrics


def _falls_on(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _shares(job: Training, step: int) -> tuple[Share, Share | None]:
    """Returns the global batches of a step: the pairs, and the SFT rows if they are a separate set."""
    pairs = job.train.loader.batch(step)
    if job.sft is None:
        return Share.of(job.train, pairs, Role.BOTH), None
    sft = job.sft.loader.batch(step)
    return Share.of(job.train, pairs, Role.PREFERENCE), Share.of(job.sft, sft, Role.SFT)


def _use_of_data(job: Training, step: int, batches: Sequence[Batch]) -> dict[str, float]:
    tokens = sum(batch.tokens for batch in batches)
    room = sum(batch.tokens / batch.row_fill for batch in batches)
    epochs = {"epoch": (step + 1) / job.train.loader.steps_per_epoch}
    if job.sft is not None:
        epochs["sft_epoch"] = (step + 1) / job.sft.loader.steps_per_epoch
    return {"tokens": tokens, "row_fill": tokens / room, **epochs}
