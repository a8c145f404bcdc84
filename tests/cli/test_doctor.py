"""The doctor command: what is installed, what is missing, and other packages with the same name."""

import sys
from pathlib import Path

import pytest

from megatron_spo import cli
from megatron_spo.commands import doctor
from megatron_spo.runtime.megatron_versions import TESTED


def state_of(name: str) -> str:
    lines = [line for line in doctor.report().splitlines() if line.startswith(f"{name} ")]
    assert len(lines) == 1
    return lines[0]


def test_exits_0_and_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in (
        "python",
        "torch",
        "CUDA",
        "megatron-core",
        "transformer-engine",
        "apex",
        "Adam",
        "fp8",
        "nemo-toolkit",
        "wandb",
    ):
        assert f"\n{name} " in f"\n{text}"
    assert "SLURM" in text
    assert text.endswith("All required packages are installed.\n")


def test_apex_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)  # set by tests that run Megatron without a GPU
    monkeypatch.setattr(doctor, "installed", lambda module: module != "amp_C")
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    assert "not NVIDIA's; run pip uninstall apex" in state_of("apex")
    assert "Missing or wrong: apex." in doctor.report()
    (package / "optimizers").mkdir()
    assert "without its CUDA kernels" in state_of("apex")
    monkeypatch.setattr(doctor, "installed", lambda module: True)
    assert state_of("apex").split()[1] == "ok"
    monkeypatch.setattr(doctor, "installed", lambda module: module != "transformer_engine")
    assert state_of("Adam").split(maxsplit=2)[2] == "apex's, fused"
    assert "apex" not in sys.modules


def test_what_is_missing_and_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda module: False)
    assert "required for all commands" in state_of("torch")
    assert "optional; without it" in state_of("wandb")
    assert "Missing or wrong: torch, megatron-core, transformers, datasets." in doctor.report()


def test_which_adam_and_which_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda module: False)
    assert state_of("Adam").split(maxsplit=2)[2] == "torch's, fused on a GPU"
    monkeypatch.setattr(doctor, "installed", lambda module: True)
    assert state_of("Adam").split(maxsplit=2)[2] == "Transformer Engine's, fused"
    gpu = doctor.Finding("CUDA", "ok", "13.0: 1 x NVIDIA H100", "")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    state, able, unable = doctor._fp8(gpu)[1:]
    assert (state, able) == ("ok", "delayed, tensorwise, blockwise")
    assert unable.startswith("mxfp8: it requires a GPU of compute capability 10.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (8, 0))
    assert doctor._fp8(gpu)[1:3] == ("missing", "this GPU supports none")


@pytest.mark.parametrize(
    "version, state, follows",
    [
        ("0.16.1", "ok", "tested with this version"),
        ("0.19.2", "ok", "tested with this version"),
        ("0.18.0", "ok", "not tested with this version; tested: 0.16.1, "),
        ("0.15.3", "wrong", "not supported; install a tested version: 0.16.1, "),
        ("0.20.0", "wrong", "not supported; install a tested version: 0.16.1, "),
    ],
)
def test_versions_of_megatron(monkeypatch: pytest.MonkeyPatch, version: str, state: str, follows: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    found = state_of("megatron-core").split(maxsplit=3)
    assert found[1:3] == [state, version] and found[3].startswith(follows)


def test_the_package_allows_the_tested_versions() -> None:
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    oldest, newest = TESTED[0], TESTED[-1].split(".")
    assert f'"megatron-core>={oldest},<{newest[0]}.{int(newest[1]) + 1}"' in setup


def test_what_torch_compile_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, no_gpu = doctor.Finding("CUDA", "ok", "", ""), doctor.Finding("CUDA", "missing", "", "")
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setattr(doctor, "installed", lambda module: True)
    monkeypatch.setattr(doctor, "_version", lambda name: "3.7.1")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._compiler(gpu)[1:] == ("ok", f"triton 3.7.1, {tmp_path}/gcc", "")
    monkeypatch.setenv("CC", "absent-compiler")
    assert doctor._compiler(gpu)[1:3] == ("missing", "no C compiler")
    assert doctor._compiler(gpu).follows.endswith("takes more memory and time; install gcc or set CC")
    monkeypatch.setattr(doctor, "installed", lambda module: False)
    assert doctor._compiler(gpu).follows.endswith("pip install triton and install gcc or set CC")
    assert doctor._compiler(no_gpu)[2:] == ("no triton, no C compiler", "optional; only used with a GPU")


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sinfo", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert state_of("SLURM").split(maxsplit=2)[1:] == ["ok", "sinfo, srun"]
