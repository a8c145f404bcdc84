"""Fits by group: differences of parameters with intervals, and common exponents."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_spo.cli import main
from megatron_spo.scaling.additive import POWER
from megatron_spo.scaling.groups import Grouped, fit_groups
from megatron_spo.scaling.law import Ask
from megatron_spo.scaling.points import Points
from tests.scaling.test_fit import power_points, write_csv


def group(alpha: float, seed: int, noise: float = 0.005, shared: float = 0.0) -> dict[str, np.ndarray]:
    """Returns points of 1.5 + 30 / x^alpha; `shared` is the noise that all groups have in common."""
    x = np.geomspace(1e3, 1e7, 40)
    both, own = (np.random.default_rng([kind, seed if kind else 0]).standard_normal(40) for kind in (0, 1))
    return {"x": x, "loss": (1.5 + 30 * x**-alpha) * np.exp(noise * own + shared * both)}


def fitted(*groups: dict[str, np.ndarray]) -> Grouped:
    named = {name: Points(points) for name, points in zip("abc", groups, strict=False)}
    return fit_groups(POWER, "method", named, Ask(), bootstrap=200)


def test_other_exponents_differ_and_equal_ones_do_not() -> None:
    found = fitted(group(0.3, 1), group(0.3, 2), group(0.25, 3)).report
    compared = {(one["of"], one["minus"]): one["alpha"] for one in found["differences"]}
    assert not compared["b", "a"]["differs"]
    assert compared["c", "a"]["differs"] and compared["c", "b"]["differs"]
    low, high = compared["c", "a"]["interval"]
    assert low < -0.05 < high < 0


def test_common_exponents_lie_between_and_fit_worse() -> None:
    found = fitted(group(0.3, 1), group(0.3, 2)).report["common_exponents"]
    low, high = found["intervals"]["alpha"]
    assert low < 0.3 < high
    assert high - low < 0.03
    assert found["by_group"]["a"]["E"] == pytest.approx(1.5, rel=0.02)
    other = fitted(group(0.4, 1), group(0.2, 2)).report["common_exponents"]
    assert 0.2 < other["parameters"]["alpha"] < 0.4
    sizes = other["mean_absolute_residual"]
    assert sizes["common"] > 1.5 * sizes["own"]


def test_noise_that_the_groups_share_does_not_hide_a_difference() -> None:
    noise = {"noise": 0.001, "shared": 0.01}
    found = fitted(group(0.3, 1, **noise), group(0.29, 2, **noise)).report
    assert found["paired"]
    low, high = found["differences"][0]["alpha"]["interval"]
    alone = found["groups"]["a"]["intervals"]["alpha"]
    assert high - low < 0.6 * (alone[1] - alone[0])  # 1.4 times as wide if drawn independently
    assert low < -0.01 < high < 0


def test_groups_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = power_points(seed=1), power_points(seed=2)
    table = {name: [*a[name], *b[name]] for name in a}
    points = write_csv(tmp_path / "points.csv", table | {"method": ["dpo"] * 40 + ["spo"] * 40})
    options = ["--law", "power", "--by", "method", "--bootstrap", "100", "--plot", str(tmp_path / "fit.pdf")]
    assert main(["scaling", "fit", str(points), "--out", str(tmp_path / "fit.json"), *options]) == 0
    said = capsys.readouterr().out
    assert "alpha of spo minus dpo: " in said and "common exponents" in said
    found = json.loads((tmp_path / "fit.json").read_text())
    assert set(found["groups"]) == {"dpo", "spo"}
    assert not found["paired"]  # the groups have other x
    assert (tmp_path / "fit.pdf").read_bytes().startswith(b"%PDF")
