"""Runs that several GPU tests look at: each group is one launch, made when a test first asks for one of its runs."""

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

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@cache
def has_engine() -> bool:
    """Whether Transformer Engine can be imported, in a process of its own: a broken one can take the process along."""
    if not torch.cuda.is_available() or not installed("transformer_engine"):
        return False
    tried = subprocess.run(
        [sys.executable, "-c", "import transformer_engine.pytorch"], capture_output=True, check=False
    )
    return tried.returncode == 0


def able_recipes() -> list[str]:
    """The fp8 recipes that the first GPU can run; all of them where there is none, so that they show as skipped."""
    if not torch.cuda.is_available():
        return list(RECIPES)
    capability, cuda = torch.cuda.get_device_capability(0), str(torch.version.cuda)
    return [recipe for recipe in RECIPES if obstacle(recipe, capability, cuda) is None]


@dataclass(frozen=True)
class Group:
    """Runs of one launch: name -> (command, overrides); `{folder}` in an override is the bench's folder."""

    runs: dict[str, tuple[str, list[str]]]
    processes: int = 1
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Bench:
    """A folder with a small model and data, and what was run there."""

    folder: Path
    groups: dict[str, Group]
    launched: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        """Model (sides that suit every recipe's blocks), pairs and the configuration that the runs share."""
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
        """The metrics of a training run; the test fails where the run did."""
        self._need(run)
        return read_metrics(self.folder / run)

    def result(self, run: str) -> Any:
        """What a probe returned; the test fails where the probe did."""
        self._need(run)
        return json.loads((self.folder / f"{run}.json").read_text())

    def error(self, run: str) -> str:
        """What a run that must fail said ("" where it did not fail)."""
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
    """Largest relative difference over all lines, of each of these metrics."""
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
    """A training run into the folder `name` with the reference cache `cache`."""
    return "train", [f"output={{folder}}/{name}", f"reference.cache={{folder}}/{cache}", *overrides]


def reference(cache: str, *overrides: str) -> tuple[str, list[str]]:
    """Fill the reference cache `cache`."""
    return "reference", [f"reference.cache={{folder}}/{cache}", *overrides]


def report_versions(record: Any) -> None:
    """Write down what the numbers were measured on."""
    record("gpu", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none")
    record("torch", torch.__version__)
    record("visible", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
