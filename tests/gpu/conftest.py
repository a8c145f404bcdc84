"""The runs that the tests of this folder share, and a line for each test in the file SPO_GPU_RESULTS."""

import os
import re
from collections.abc import Generator
from pathlib import Path

import pytest

from megatron_spo.config.fp8 import RECIPES
from tests.gpu.bench import DRY, Bench, Group, has_engine, reference, report_versions, train

NEEDS_GPU = re.compile(r"NVIDIA GPU|CUDA|transformer_engine|assert 'cpu'|'cuda'|FusedAdam|memory/allocated")
"""What the errors of a machine without a GPU say."""
FP32, TORCH, ENGINE = "precision.dtype=fp32", "precision.layers=torch", "precision.layers=transformer_engine"
SIMPO = ["loss.name=simpo", "spo.lambda_unit=token"]
DUAL = ["loss.name=alpha_dpo", "spo.schedule=dual", "spo.lambda_unit=token"]
LAYOUTS = {
    "tp2": ["parallel.tensor=2"],
    "tp2-sp": ["parallel.tensor=2", "parallel.sequence=true"],
    "pp2": ["parallel.pipeline=2"],
    "pp2-vpp2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "dp2": [],
    "cp2": ["parallel.context=2"],
}


def _fp8(recipe: str) -> Group:
    keys = [f"precision.fp8={recipe}"]
    if recipe == "delayed":  # has no reference
        keys += ["loss.name=simpo", "reference.cache=null"]
        begin = ("train", ["output={folder}/fp8-delayed-resumed", *keys, "training.steps=3"])
        return Group(
            {
                "fp8-delayed": train("fp8-delayed", "none", *keys),
                "fp8-delayed-begin": begin,
                "fp8-delayed-resumed": train("fp8-delayed-resumed", "none", *keys),
                "bf16-delayed": train("bf16-delayed", "none", ENGINE, *keys[1:]),
            }
        )
    return Group(
        {
            f"cache-{recipe}": reference(f"cache-{recipe}", *keys),
            f"fp8-{recipe}": train(f"fp8-{recipe}", f"cache-{recipe}", *keys),
            f"refused-{recipe}": train(f"refused-{recipe}", f"cache-{recipe}", ENGINE),
            f"cache-bf16-{recipe}": reference("cache-engine", ENGINE),
            f"bf16-{recipe}": train(f"bf16-{recipe}", "cache-engine", ENGINE),
        }
    )


def _layouts(precision: str, cache: str, names: list[str]) -> dict[str, tuple[str, list[str]]]:
    return {
        f"{name}-{cache}": train(f"{name}-{cache}", f"two-{cache}", precision, *LAYOUTS[name])
        for name in names
    }  # fmt: skip


def _groups() -> dict[str, Group]:
    def numbers(where: str) -> dict[str, tuple[str, list[str]]]:
        return {
            f"{where}-cache-fp32": reference(f"{where}-cache-fp32", FP32),
            f"{where}-fp32": train(f"{where}-fp32", f"{where}-cache-fp32", FP32),
            f"{where}-fp32-simpo": train(f"{where}-fp32-simpo", f"{where}-cache-fp32", FP32, *SIMPO),
            f"{where}-fp32-dual": train(f"{where}-fp32-dual", f"{where}-cache-fp32", FP32, *DUAL),
            f"{where}-cache-bf16": reference(f"{where}-cache-bf16", TORCH),
            f"{where}-bf16": train(f"{where}-bf16", f"{where}-cache-bf16", TORCH),
        }

    small_rows = ["data.row_length=64", "training.steps=3"]
    return {
        "cpu": Group(numbers("cpu"), environment={"CUDA_VISIBLE_DEVICES": ""}),
        "gpu": Group(
            {
                **numbers("gpu"),
                "layers-torch": ("layers", ["reference.cache=null", "loss.name=simpo", TORCH]),
                "fresh": ("fresh", ["output={folder}/fresh", "reference.cache=null", "loss.name=simpo"]),
                "resave": ("resave", ["output={folder}/gpu-bf16", "reference.cache={folder}/gpu-cache-bf16", TORCH]),
                "begin": ("train", [*train("resumed", "gpu-cache-bf16", TORCH)[1], "training.steps=3"]),
                "resumed": train("resumed", "gpu-cache-bf16", TORCH),
                "waits": ("waits", [*train("waits", "gpu-cache-bf16", TORCH)[1], *small_rows]),
            }
        ),
        "engine": Group(
            {
                "layers-engine": ("layers", ["reference.cache=null", "loss.name=simpo", ENGINE]),
                "engine-cache": reference("engine-cache", ENGINE),
                "engine": train("engine", "engine-cache", ENGINE),
                "torch-cache": reference("torch-cache", TORCH),
                "torch": train("torch", "torch-cache", TORCH),
                "to-engine-begin": ("train", [*train("to-engine", "torch-cache", TORCH)[1], "training.steps=3"]),
                "to-engine": train("to-engine", "engine-cache", ENGINE),
                "to-torch-begin": ("train", [*train("to-torch", "engine-cache", ENGINE)[1], "training.steps=3"]),
                "to-torch": train("to-torch", "torch-cache", TORCH),
                "engine-waits": ("waits", [*train("engine-waits", "engine-cache", ENGINE)[1], *small_rows]),
            }
        ),
        **{recipe: _fp8(recipe) for recipe in RECIPES},
        "two": Group(
            {
                "two-cache": reference("two-fp32", FP32),
                **_layouts(FP32, "fp32", list(LAYOUTS)),
            },
            processes=2,
        ),
        "two-engine": Group(
            {
                "two-cache-engine": reference("two-engine", ENGINE),
                **_layouts(ENGINE, "engine", ["tp2-sp", "pp2-vpp2", "dp2"]),
                "two-cache-fp8": reference("two-fp8", "precision.fp8=tensorwise"),
                **_layouts("precision.fp8=tensorwise", "fp8", ["tp2-sp", "pp2-vpp2", "dp2"]),
            },
            processes=2,
        ),
    }


@pytest.fixture(autouse=True)
def _engine(request: pytest.FixtureRequest) -> None:
    """Skips tests marked `engine` if Transformer Engine cannot be imported."""
    if request.node.get_closest_marker("engine") and not has_engine():
        pytest.skip("no Transformer Engine")


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, record_testsuite_property) -> Bench:
    made = Bench(tmp_path_factory.mktemp("gpu"), _groups())
    made.prepare()
    report_versions(record_testsuite_property)
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In a dry run, a test that failed because there is no GPU has done what it can."""
    report = yield
    if DRY and report.failed and call.excinfo is not None and NEEDS_GPU.search(str(call.excinfo.value)):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, "reached the first call that needs a GPU")
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Writes the test, its result, and what it measured as soon as it has run."""
    results = os.environ.get("SPO_GPU_RESULTS")
    if results is None or not report.nodeid.startswith("tests/gpu/") or (report.when != "call" and report.passed):
        return
    names = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}
    result = names[report.outcome]
    measured = [f"{name} {value}" for name, value in report.user_properties if name != "cpu seconds"]
    if report.skipped and isinstance(report.longrepr, tuple):
        measured.append(str(report.longrepr[2]).removeprefix("Skipped: "))
        result = "reached" if measured[-1].startswith("reached") else result
    if report.failed:
        measured.append(str(report.longrepr).strip().splitlines()[-1])
    with Path(results).open("a") as file:
        print(report.nodeid.removeprefix("tests/gpu/"), result, ", ".join(measured), sep="\t", file=file)
