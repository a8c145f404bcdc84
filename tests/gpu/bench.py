"""Runs shared by several GPU tests. Each group is one launch, started when a test first needs one of its runs."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_spo.config.fp8 import RECIPES, obstacle
from megatron_spo.config.rules import installed
from tests.support.processes import ROOT, launch, read_metrics
from tests.support.tiny import tiny_run

WORKER = ROOT / "tests" / "gpu" / "worker.py"
Metrics = dict[tuple[str, str, int], dict[str, float]]

DRY = bool(os.environ.get("SPO_GPU_DRY"))
"""Set by `gpu_check.sh --dry`: tests run up to the first call that needs a GPU."""

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not (DRY or torch.cuda.is_available()), reason="no NVIDIA GPU")]


@cache
def has_engine() -> bool:
    """Returns whether Transformer Engine can be imported; tried in another process, as a broken one can crash it."""
    if DRY:
        return True
    if not torch.cuda.is_available() or not installed("transformer_engine"):
        return False
    tried = subprocess.run(
        [sys.executable, "-c", "import transformer_engine.pytorch"], capture_output=True, check=False
    )
    return tried.returncode == 0


def able_recipes() -> list[str]:
    """Returns the fp8 recipes that the first GPU can run; without a GPU all, so that they show as skipped."""
    if not torch.cuda.is_available():
        return list(RECIPES)
    capability, cuda = torch.cuda.get_device_capability(0), str(torch.version.cuda)
    return [recipe for recipe in RECIPES if obstacle(recipe, capability, cuda) is None]


@dataclass(frozen=True)
class Group:
    """The runs of one launch: name -> (command, overrides); `{folder}` in an override is the bench's folder."""

    runs: dict[str, tuple[str, list[str]]]
    processes: int = 1
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Bench:
    """A folder with a small model and data, and the runs in it."""

    folder: Path
    groups: dict[str, Group]
    launched: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        """Creates the model (its sizes fit the blocks of every recipe), the pairs and the shared configuration."""
        sides = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
        tiny_run(
            self.folder,
            family="qwen3",
            shape={**sides, "scale": 0.05},
            pairs=24,
            held_out=8,
            data={"shuffle": False},
            optimizer={"lr": 3e-4, "weight_decay": 0.01},
            precision=None,
            training={"global_batch_size": 24, "steps": 5},
        )

    def metrics(self, run: str) -> Metrics:
        """Returns the metrics of a training run; the test fails if the run failed."""
        self._need(run)
        return read_metrics(self.folder / run)

    def result(self, run: str) -> Any:
        """Returns the result of a probe; the test fails if the probe failed."""
        self._need(run)
        return json.loads((self.folder / f"{run}.json").read_text())

    def error(self, run: str) -> str:
        """Returns the error of a run that must fail ("" if it did not fail)."""
        self._launch(run)
        path = self.folder / f"{run}.error"
        return path.read_text() if path.exists() else ""

    def _need(self, run: str) -> None:
        error = self.error(run)
        if error:
            pytest.fail(f"{run}: {error}", pytrace=False)

    def _launch(self, run: str) -> None:
        name, group = next((name, group) for name, group in self.groups.items() if run in group.runs)
        if name not in self.launched:
            jobs = [
                (key, command, [override.format(folder=self.folder) for override in overrides])
                for key, (command, overrides) in group.runs.items()
            ]
            variables: dict[str, Any] = group.environment
            done = launch([str(WORKER), str(self.folder), json.dumps(jobs)], group.processes, cold=True, **variables)
            self.launched[name] = "" if done.returncode == 0 else f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        if self.launched[name]:
            pytest.fail(f"the launch of {name} broke:\n{self.launched[name]}", pytrace=False)


def differences(got: Metrics, expected: Metrics, *names: str) -> dict[str, float]:
    """Returns the largest relative difference over all lines for each of these metrics."""
    assert got.keys() == expected.keys()
    return {
        name: max(
            abs(got[key][name] - line[name]) / max(1.0, abs(line[name]))
            for key, line in expected.items()
            if name in line
        )
        for name in names
    }


def train(name: str, cache: str, *overrides: str) -> tuple[str, list[str]]:
    """Returns a training run with output folder `name` and reference cache `cache`."""
    return "train", [f"output={{folder}}/{name}", f"reference.cache={{folder}}/{cache}", *overrides]


def reference(cache: str, *overrides: str) -> tuple[str, list[str]]:
    """Returns a run that fills the reference cache `cache`."""
    return "reference", [f"reference.cache={{folder}}/{cache}", *overrides]


def report_versions(record: Any) -> None:
    """Records the hardware and versions with which the numbers were measured."""
    record("gpu", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none")
    record("torch", torch.__version__)
    record("visible", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
