"""`megatron-spo doctor`: shows which packages and devices are available, and what is missing."""

import argparse
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from megatron_spo.config.fp8 import RECIPES, obstacle
from megatron_spo.config.rules import installed
from megatron_spo.runtime import env
from megatron_spo.runtime.megatron_versions import TESTED


class Finding(NamedTuple):
    """One line of the table. `state` is ok, missing or wrong; `follows` is the consequence and the remedy."""

    name: str
    state: str
    found: str
    follows: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds no options."""


def run(options: argparse.Namespace) -> None:
    """Prints the table."""
    print(report())


def report() -> str:
    """Returns the table as text. Imports torch only if there is an NVIDIA driver."""
    gpu, apex = _gpu(), _apex()
    findings = [
        _python(),
        _package("torch", "torch", "required for all commands; run make venv", required=True),
        gpu,
        _megatron(),
        _package(
            "transformers",
            "transformers",
            "required for tokenizers and generation; run pip install -e .",
            required=True,
        ),
        _package("datasets", "datasets", "required to read data; run pip install -e .", required=True),
        _package(
            "transformer-engine",
            "transformer_engine",
            "torch computes the layers, without fp8; run pip install --no-build-isolation -e '.[gpu]' on a GPU machine",
        ),
        apex,
        _compiler(gpu),
        _adam(apex),
        _fp8(gpu),
        _package("nemo-toolkit", "nemo", "NeMo 2 checkpoints are still converted (docs/convert.md)"),
        _package("wandb", "wandb", "logging.wandb must be off; run pip install -e '.[wandb]'"),
        _package("lm-eval", "lm_eval", "evaluate --tasks is not available; run pip install -e '.[eval]'"),
        _package("trl", "trl", "tests that compare with TRL are skipped; run pip install -e '.[dev]'"),
        _slurm(),
    ]
    return f"{tabulate(findings, tablefmt='plain', disable_numparse=True)}\n\n{_verdict(findings)}"


def _python() -> Finding:
    suits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding(
        "python",
        "ok" if suits else "wrong",
        platform.python_version(),
        "" if suits else "Python 3.11, 3.12 or 3.13 is required",
    )


def _package(name: str, module: str, without: str, *, required: bool = False) -> Finding:
    if not installed(module):
        return Finding(name, "missing", "-", without if required else f"optional; without it {without}")
    return Finding(name, "ok", _version(name), "")


def _megatron() -> Finding:
    found = _package("megatron-core", "megatron.core", "required for training; run pip install -e .", required=True)
    if found.state != "ok" or found.found in TESTED:
        return found._replace(follows=found.follows or "tested with this version")
    if _minor(found.found) in map(_minor, TESTED):
        return found._replace(follows=f"not tested with this version; tested: {', '.join(TESTED)}")
    return found._replace(state="wrong", follows=f"not supported; install a tested version: {', '.join(TESTED)}")


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _gpu() -> Finding:
    driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    on_cpu = "runs on the CPU (gloo); CUDA functions of Megatron-Core are replaced"
    if not driver:
        return Finding("CUDA", "missing", "no NVIDIA driver", on_cpu)
    if not installed("torch"):
        return Finding("CUDA", "missing", "torch is not installed", on_cpu)
    import torch

    if not torch.cuda.is_available():
        reason = "torch is a CPU build" if torch.version.cuda is None else "torch finds no GPU"
        return Finding("CUDA", "missing", reason, on_cpu)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return Finding("CUDA", "ok", f"{torch.version.cuda}: {counted}", "")


def _apex() -> Finding:
    """Checks for NVIDIA's apex: it has `apex/optimizers` and, if built with CUDA kernels, the module amp_C."""
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        return Finding(
            "apex",
            "missing",
            "-",
            "optional; build NVIDIA's apex from source on a GPU machine",
        )
    if not any((Path(folder) / "optimizers").is_dir() for folder in folders):
        follows = "this is another package with the same name, not NVIDIA's; run pip uninstall apex"
        return Finding("apex", "wrong", _version("apex"), follows)
    if not installed("amp_C"):
        return Finding(
            "apex",
            "wrong",
            _version("apex"),
            "built without its CUDA kernels (amp_C); rebuild it with them",
        )
    return Finding("apex", "ok", _version("apex"), "")


def _compiler(gpu: Finding) -> Finding:
    """Checks for what torch.compile needs to make kernels for a GPU: Triton, which compiles C code when it starts."""
    compiler = env.c_compiler()
    found = {"triton": _version("triton") if installed("triton") else None, "C compiler": compiler}
    absent = [name for name, value in found.items() if value is None]
    if not absent:
        return Finding("torch.compile", "ok", f"triton {found['triton']}, {compiler}", "")
    remedies = {"triton": "pip install triton", "C compiler": "install gcc or set CC"}
    remedy = " and ".join(remedies[name] for name in absent)
    if gpu.state != "ok":
        return Finding("torch.compile", "missing", f"no {', no '.join(absent)}", "optional; only used with a GPU")
    follows = f"optional; without it SwiGLU is not fused, which takes more memory and time; {remedy}"
    return Finding("torch.compile", "missing", f"no {', no '.join(absent)}", follows)


def _adam(apex: Finding) -> Finding:
    """Returns which Adam Megatron-Core uses (optimizer/__init__.py); it depends on the installed packages."""
    if installed("transformer_engine"):
        return Finding("Adam", "ok", "Transformer Engine's, fused", "")
    if apex.state == "ok":
        return Finding("Adam", "ok", "apex's, fused", "")
    return Finding("Adam", "ok", "torch's, fused on a GPU", "")


def _fp8(gpu: Finding) -> Finding:
    """Returns the recipes (precision.fp8) that the first GPU supports, and why it does not support the others."""
    without = "optional; without it precision.fp8 must be null"
    if gpu.state != "ok":
        return Finding("fp8", "missing", "no NVIDIA GPU", without)
    import torch

    capability, cuda = torch.cuda.get_device_capability(0), str(torch.version.cuda)
    reasons = {recipe: obstacle(recipe, capability, cuda) for recipe in RECIPES}
    able = ", ".join(recipe for recipe, reason in reasons.items() if reason is None)
    unable = "; ".join(f"{recipe}: {reason}" for recipe, reason in reasons.items() if reason is not None)
    if not able or not installed("transformer_engine"):
        return Finding(
            "fp8", "missing", f"this GPU supports {able or 'none'}", f"{without}; requires transformer-engine"
        )
    return Finding("fp8", "ok", able, unable)


def _slurm() -> Finding:
    found = [name for name in ("sinfo", "srun", "sbatch") if shutil.which(name)]
    if found:
        return Finding("SLURM", "ok", ", ".join(found), "")
    return Finding("SLURM", "missing", "-", "optional; without it jobs run on one machine with torchrun")


def _verdict(findings: list[Finding]) -> str:
    broken = [f.name for f in findings if f.state == "wrong" or (f.state == "missing" and not _may_lack(f))]
    return f"Missing or wrong: {', '.join(broken)}." if broken else "All required packages are installed."


def _may_lack(finding: Finding) -> bool:
    return finding.name == "CUDA" or finding.follows.startswith("optional")
