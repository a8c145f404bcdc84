"""`megatron-spo doctor`: what is installed, what is missing, and what that means."""

import argparse
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from megatron_spo.config.fp8 import RECIPES, obstacle
from megatron_spo.config.rules import installed


class Finding(NamedTuple):
    """One line of the table; `state` is ok, missing, or wrong."""

    name: str
    state: str
    found: str
    follows: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    print(report())


def report() -> str:
    """The table as text. Imports torch only where an NVIDIA driver is there to be asked through it."""
    gpu, apex = _gpu(), _apex()
    findings = [
        _python(),
        _package("torch", "torch", "nothing runs without it: make venv", required=True),
        gpu,
        _package("megatron-core", "megatron.core", "no training: pip install -e .", required=True),
        _package("transformers", "transformers", "no tokenizers, no generation: pip install -e .", required=True),
        _package("datasets", "datasets", "no data can be read: pip install -e .", required=True),
        _package(
            "transformer-engine",
            "transformer_engine",
            "torch's layers and no fp8: pip install --no-build-isolation -e '.[gpu]' on a GPU machine",
        ),
        apex,
        _adam(apex),
        _fp8(gpu),
        _package("nemo-toolkit", "nemo", "NeMo 2 checkpoints are converted without it (docs/convert.md)"),
        _package("wandb", "wandb", "logging.wandb stays off: pip install -e '.[wandb]'"),
        _package("lm-eval", "lm_eval", "no benchmark scores: pip install -e '.[eval]'"),
        _package("trl", "trl", "the tests that compare with it cannot run: pip install -e '.[dev]'"),
        _slurm(),
    ]
    widths = [max(len(finding[column]) for finding in findings) for column in range(3)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(finding, [*widths, 0], strict=True)).rstrip()
        for finding in findings
    ]
    return "\n".join([*lines, "", _verdict(findings)])


def _python() -> Finding:
    suits = sys.version_info[:2] in ((3, 11), (3, 12))
    return Finding(
        "python",
        "ok" if suits else "wrong",
        platform.python_version(),
        "" if suits else "3.11 or 3.12 is needed",
    )


def _package(name: str, module: str, without: str, *, required: bool = False) -> Finding:
    if not installed(module):
        return Finding(name, "missing", "-", without if required else f"optional; without it {without}")
    return Finding(name, "ok", _version(name), "")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _gpu() -> Finding:
    driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    on_cpu = "runs on the CPU (gloo); CUDA symbols of Megatron-Core are bridged"
    if not driver:
        return Finding("CUDA", "missing", "no NVIDIA driver", on_cpu)
    if not installed("torch"):
        return Finding("CUDA", "missing", "no torch to ask", on_cpu)
    import torch

    if not torch.cuda.is_available():
        reason = "torch is a CPU build" if torch.version.cuda is None else "torch finds no device"
        return Finding("CUDA", "missing", reason, on_cpu)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return Finding("CUDA", "ok", f"{torch.version.cuda}: {counted}", "")


def _apex() -> Finding:
    """NVIDIA's apex has `apex/optimizers` and, when built with its kernels, the module amp_C."""
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        return Finding(
            "apex",
            "missing",
            "-",
            "optional; NVIDIA's builds from its sources on a GPU machine",
        )
    if not any((Path(folder) / "optimizers").is_dir() for folder in folders):
        follows = "this is another package of that name, not NVIDIA's: pip uninstall apex"
        return Finding("apex", "wrong", _version("apex"), follows)
    if not installed("amp_C"):
        return Finding(
            "apex",
            "wrong",
            _version("apex"),
            "built without its CUDA kernels (amp_C): build it again with them",
        )
    return Finding("apex", "ok", _version("apex"), "")


def _adam(apex: Finding) -> Finding:
    """Which one Megatron-Core 0.16.1 takes (optimizer/__init__.py): by what is installed, not by a key."""
    if installed("transformer_engine"):
        return Finding("Adam", "ok", "Transformer Engine's, fused", "")
    if apex.state == "ok":
        return Finding("Adam", "ok", "apex's, fused", "")
    return Finding("Adam", "ok", "torch's", "")


def _fp8(gpu: Finding) -> Finding:
    """The recipes (precision.fp8) that the first GPU can run, and why not the others."""
    without = "optional; without it precision.fp8 stays null"
    if gpu.state != "ok":
        return Finding("fp8", "missing", "no NVIDIA GPU", without)
    import torch

    capability, cuda = torch.cuda.get_device_capability(0), str(torch.version.cuda)
    reasons = {recipe: obstacle(recipe, capability, cuda) for recipe in RECIPES}
    able = ", ".join(recipe for recipe, reason in reasons.items() if reason is None)
    unable = "; ".join(f"{recipe}: {reason}" for recipe, reason in reasons.items() if reason is not None)
    if not able or not installed("transformer_engine"):
        return Finding("fp8", "missing", f"this GPU can {able or 'none'}", f"{without}; needs transformer-engine")
    return Finding("fp8", "ok", able, unable)


def _slurm() -> Finding:
    found = [name for name in ("sinfo", "srun", "sbatch") if shutil.which(name)]
    if found:
        return Finding("SLURM", "ok", ", ".join(found), "")
    return Finding("SLURM", "missing", "-", "optional; without it one machine, through torchrun")


def _verdict(findings: list[Finding]) -> str:
    broken = [f.name for f in findings if f.state == "wrong" or (f.state == "missing" and not _may_lack(f))]
    return f"To be mended: {', '.join(broken)}." if broken else "Everything that is needed is there."


def _may_lack(finding: Finding) -> bool:
    return finding.name == "CUDA" or finding.follows.startswith("optional")
