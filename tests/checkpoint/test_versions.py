"""A checkpoint that was written with one version of Megatron-Core is resumed with another, bit for bit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_spo.cli import main
from tests.parallel.test_resume import set_back
from tests.support.processes import ROOT, Job, largest_difference, run_jobs
from tests.support.tiny import tiny_run

OTHER = os.environ.get("SPO_TESTS_OTHER_MEGATRON", "")
"""Folder with another version of Megatron-Core than the installed one (tools/test_megatron.sh)."""
PATHS = {"installed": str(ROOT), "other": f"{ROOT}{os.pathsep}{OTHER}"}
pytestmark = pytest.mark.skipif(not OTHER, reason="only make test-megatron installs another version of Megatron-Core")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each version, a run of 4 steps, and one whose last two steps are resumed with the other version."""
    folder = tmp_path_factory.mktemp("versions")
    config = tiny_run(
        folder,
        pairs=20,
        shape={"num_hidden_layers": 2},
        loss={"name": "simpo"},
        spo={"schedule": "dual"},
        checkpoint={"every": 2, "keep": 9},
    )

    def train(name: str) -> Job:
        return ("train", str(config), [f"output={folder}/{name}", "parallel.tensor=2"])

    run_jobs([("reference", str(config), []), train("installed")], 2, cold=True, PYTHONPATH=PATHS["installed"])
    run_jobs([train("other")], 2, cold=True, PYTHONPATH=PATHS["other"])
    for name, resumed_with in (("installed", "other"), ("other", "installed")):
        shutil.copytree(folder / name, folder / f"{name}-resumed")
        set_back(folder / f"{name}-resumed", 2)
        run_jobs([train(f"{name}-resumed")], 2, cold=True, PYTHONPATH=PATHS[resumed_with])
    return folder


def test_two_versions_ran(runs: Path) -> None:
    provenance = [json.loads((runs / name / "provenance.json").read_text()) for name in PATHS]
    assert provenance[0]["versions"]["megatron-core"] != provenance[1]["versions"]["megatron-core"]


@pytest.mark.parametrize("first", PATHS)
def test_the_other_version_resumes_bit_for_bit(runs: Path, first: str) -> None:
    whole, resumed = runs / first, runs / f"{first}-resumed"
    assert largest_difference(resumed, whole)[0] == 0
    tensors = []
    for run in (whole, resumed):
        target = run.with_name(f"{run.name}-hf")
        assert main(["convert", str(run), str(target), "--to", "hf"]) == 0
        tensors.append(load_file(target / "model.safetensors"))
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][key]) for key, tensor in tensors[0].items())
