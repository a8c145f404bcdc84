"""Runs TRL's DPOTrainer from the package index on the same pairs in the same order, and times its steps.

One function is patched: on a CPU, TRL applies the output layer to every position, on a GPU only to response positions.
`trl.trainer.utils._use_triton` decides which; it is replaced to return True, so that TRL computes the same as on a GPU.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset, disable_progress_bars
from measure import Turn, replaced
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

MICRO_BATCH = 8


@dataclass(frozen=True)
class Machine:
    """The clock, the dtype of the weights, whether a GPU is used, and whether operations run in bf16."""

    clock: Callable[[], float] = time.process_time
    dtype: torch.dtype = torch.float32
    on_gpu: bool = False
    autocast: bool = False


CPU = Machine()
KEPT = ("loss", "logps/chosen", "logps/rejected")
"""Metrics that are kept of each step."""


class _Stamps(TrainerCallback):
    def __init__(self, clock: Callable[[], float]) -> None:
        self.turn, self._before, self._clock = Turn(), 0.0, clock

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = self._clock()
        if self._before:
            self.turn.seconds.append(now - self._before)
        self._before = now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.turn.lines.append({name: logs[name] for name in KEPT})


def steps(
    folder: Path,
    pairs: list[dict[str, str]],
    *,
    batch: int,
    lr: float,
    precomputed: bool,
    machine: Machine = CPU,
    **more: Any,
) -> Turn:
    """Runs one training step per `batch` pairs; the reference pass of `precomputed` is not timed.

    Args:
        folder: The model.
        pairs: The pairs, in their order.
        batch: Pairs per step.
        lr: Learning rate.
        precomputed: Whether TRL computes the reference's log-probs before training, instead of in every step.
        machine: Clock and precision.
        more: `peft_config`, which trains adapters; all others are settings of DPOConfig.
    """
    disable_progress_bars()
    adapters = more.pop("peft_config", None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=machine.dtype)
    micro = min(batch, MICRO_BATCH)
    stamps = _Stamps(machine.clock)
    settings = DPOConfig(
        output_dir=f"{tempfile.gettempdir()}/trl",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        gradient_checkpointing=False,  # on by default; off in TRL's favour, as it costs a third more work
        train_sampling_strategy="sequential",
        max_length=None,
        num_train_epochs=1,
        learning_rate=lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=machine.on_gpu or machine.autocast,
        use_cpu=not machine.on_gpu,
        disable_tqdm=True,
        precompute_ref_log_probs=precomputed,
        dataloader_num_workers=0,
        seed=0,
        **more,
    )
    separate = not precomputed and adapters is None
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with replaced(trl.trainer.utils, "_use_triton", lambda device: True), quiet[0], quiet[1]:
        trainer = DPOTrainer(
            model=model,
            ref_model=AutoModelForCausalLM.from_pretrained(folder, dtype=machine.dtype) if separate else None,
            args=settings,
            train_dataset=Dataset.from_list(pairs),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
            callbacks=[stamps],
            peft_config=adapters,
        )
        torch.set_num_threads(1)
        trainer.train()
    return stamps.turn
