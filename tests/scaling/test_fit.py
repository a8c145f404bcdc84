"""Fits of laws with known parameters, published ones among them, and points that are refused."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import least_squares

from megatron_spo.cli import main
from megatron_spo.commands.scaling import LAW_NAMES
from megatron_spo.errors import UserError
from megatron_spo.scaling.additive import CHINCHILLA, DELTA, POWER, PURE_POWER
from megatron_spo.scaling.fit import LAWS, fit
from megatron_spo.scaling.law import Ask, Law, Unidentified
from megatron_spo.scaling.overoptimization import OVEROPTIMIZATION
from megatron_spo.scaling.points import Points
from megatron_spo.scaling.repeats import REPEATS, REPEATS_EXCESS, Repeats
from megatron_spo.scaling.stability import STABILITY

# Besiroglu et al. 2024 (arXiv 2404.10102): estimate and standard error
PUBLISHED = {
    "E": (1.8172, 0.03),
    "A": (482.01, 124.58),
    "B": (2085.43, 1293.23),
    "alpha": (0.3478, 0.02),
    "beta": (0.3658, 0.02),
}
KNOWN = {name: value for name, (value, _) in PUBLISHED.items()}
NOISE = 0.008  # of log loss, about the size of their residuals


def chinchilla_points(
    values: Mapping[str, float] = KNOWN, *, noise: float = NOISE, seed: int = 0, count: int = 240
) -> dict[str, np.ndarray]:
    """Returns as many points as in Besiroglu et al., over the range of sizes and compute of Hoffmann et al."""
    generator = np.random.default_rng(seed)
    sizes = np.geomspace(44e6, 16e9, 30)[generator.integers(0, 30, count)]
    flops = np.geomspace(6e18, 3e21, 9)[generator.integers(0, 9, count)]
    points = {"N": sizes, "D": flops / (6 * sizes), "loss": np.ones(count)}
    return points | {
        "loss": CHINCHILLA.predict(dict(values), points) * np.exp(noise * generator.standard_normal(count))
    }


def power_points(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = 10 ** generator.uniform(3, 7, 40)
    return {"x": x, "loss": (1.5 + 30 * x**-0.3) * np.exp(0.005 * generator.standard_normal(40))}


def overoptimization_points(beta: float = 0.3) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    d = 10 ** generator.uniform(0, 1.5, 40)
    return {"kl": d**2, "reward": d * (0.9 - beta * np.log(d)) + 0.1 * generator.standard_normal(40)}


def stability_points(end: float = 400.0) -> dict[str, np.ndarray]:
    """Returns runs of at most `end` steps; the slope of log steps is -1 in log lr and 2 in log(1 + lambda)."""
    generator = np.random.default_rng(0)
    lr, spread = 10 ** generator.uniform(-5, -3, 200), generator.choice([0, 0.25, 0.5, 1, 2], 200)
    steps = np.exp(-3 - np.log(lr) + 2 * np.log1p(spread) + 0.3 * generator.standard_normal(200))
    ended = {"steps": np.minimum(steps, end), "crossed": (steps < end).astype(float)}
    return {"lr": lr, "lambda": spread, **ended}


def write_csv(path: Path, points: Mapping[str, Sequence[object] | np.ndarray]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(points)
        writer.writerows(zip(*points.values(), strict=True))
    return path


def test_published_law_comes_out(tmp_path: Path) -> None:
    points = write_csv(tmp_path / "points.csv", chinchilla_points())
    options = ["--law", "chinchilla", "--plot", str(tmp_path / "fit.svg"), "--flops", "5.76e23", "--bootstrap", "300"]
    assert main(["scaling", "fit", str(points), "--out", str(tmp_path / "fit.json"), *options]) == 0
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["law"] == "chinchilla"
    for name, (value, error) in PUBLISHED.items():
        assert abs(found["parameters"][name] - value) < 1.96 * error, name
        low, high = found["intervals"][name]
        assert low < value < high, name
    assert found["residuals"]["root_mean_square"] == pytest.approx(NOISE, rel=0.15)
    assert found["held_out"]["points"] >= 40
    assert found["held_out"]["mean_absolute"] < 1.5 * NOISE
    best = found["compute_optimal"]["at"][0]
    assert 6 * best["N"] * best["D"] == pytest.approx(5.76e23)
    assert best["D"] / best["N"] == pytest.approx(20, rel=0.25)  # their result at Chinchilla's budget
    assert all(best[f"{name}_interval"][0] < best[name] < best[f"{name}_interval"][1] for name in ("N", "D", "loss"))
    assert "<svg" in (tmp_path / "fit.svg").read_text()


@pytest.mark.parametrize("seed", range(4))
def test_the_minimum_is_that_of_another_solver(seed: int) -> None:
    """The fit equals scipy's least_squares with the Huber loss of log L, started from the true values."""
    points = chinchilla_points(seed=seed)
    found = CHINCHILLA.estimate(points)

    def errors(vector: np.ndarray) -> np.ndarray:
        values = dict(zip(KNOWN, [*np.exp(vector[:3]), *vector[3:]], strict=True))
        return CHINCHILLA.residuals(values, points)

    start = [*np.log([KNOWN[name] for name in ("E", "A", "B")]), KNOWN["alpha"], KNOWN["beta"]]
    scale = [0.1, 1.0, 1.0, 0.05, 0.05]
    other = least_squares(errors, start, loss="huber", f_scale=DELTA, x_scale=scale, xtol=1e-12, ftol=1e-12)
    own = np.abs(errors(np.array([*np.log([found[n] for n in ("E", "A", "B")]), found["alpha"], found["beta"]])))
    cost = np.where(own > DELTA, DELTA * own - DELTA**2 / 2, own**2 / 2).sum()
    assert cost <= other.cost * (1 + 1e-4)


@pytest.mark.parametrize(
    "law",
    [
        {"E": 0.4, "A": 20.0, "B": 900.0, "alpha": 0.25, "beta": 0.45},
        {"E": 2.5, "A": 5000.0, "B": 100.0, "alpha": 0.5, "beta": 0.2},
    ],
)
def test_other_laws_without_noise_come_out_exactly(law: dict[str, float]) -> None:
    assert CHINCHILLA.estimate(chinchilla_points(law, noise=0)) == pytest.approx(law, rel=1e-4)


def test_units_do_not_matter() -> None:
    points = chinchilla_points()
    plain = CHINCHILLA.estimate(points)
    millions = {"N": points["N"] / 1e6, "D": points["D"] / 1e9, "loss": points["loss"] / np.log(2)}
    other = CHINCHILLA.estimate(millions)
    for name in ("alpha", "beta"):
        assert other[name] == pytest.approx(plain[name], rel=1e-6)
    assert other["E"] * np.log(2) == pytest.approx(plain["E"], rel=1e-6)
    assert other["A"] * np.log(2) * 1e6 ** plain["alpha"] == pytest.approx(plain["A"], rel=1e-5)


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(20):
        low, high = fit(POWER, Points(power_points(seed=seed)), Ask(), bootstrap=100).report["intervals"]["alpha"]
        covered += low < 0.3 < high
    assert covered >= 15  # 19 expected; fewer with probability 0.0003 were the coverage 0.95


def test_power_law() -> None:
    report = fit(POWER, Points(power_points()), Ask(), bootstrap=200).report
    assert report["parameters"] == pytest.approx({"E": 1.5, "A": 30, "alpha": 0.3}, rel=0.05)
    assert "compute_optimal" not in report


def test_published_power_laws_come_out() -> None:
    """Kaplan et al. (arXiv 2001.08361): L = (8.8e13 / N)^0.076 and L = (5.4e13 / D)^0.095, over their ranges."""
    for exponent, scale, low, high in ((0.076, 8.8e13, 768, 1.5e9), (0.095, 5.4e13, 2.2e7, 2.3e10)):
        x = np.geomspace(low, high, 30)
        loss = (scale / x) ** exponent * np.exp(0.01 * np.random.default_rng(0).standard_normal(30))
        report = fit(PURE_POWER, Points({"x": x, "loss": loss}), Ask(), bootstrap=200).report
        first, last = report["intervals"]["alpha"]
        assert first < exponent < last
        assert last - first < 0.003
        lowest, highest = report["intervals"]["A"]
        assert lowest < scale**exponent < highest


def repeated_points(law: Repeats, values: dict[str, float], noise: float = 0.005) -> dict[str, np.ndarray]:
    """Returns runs of the sizes and numbers of epochs of Muennighoff et al., on their and on larger amounts of data."""
    rows = [
        (n, different * epochs, different)
        for different in (1e8, 4e8, 1.5e9, 6e9, 2.5e10)
        for n in np.geomspace(7e6, 9e9, 8)
        for epochs in (1, 2, 4, 8, 16, 40)
    ]
    points = dict(zip(("N", "D", "U"), np.array(rows).T, strict=True))
    scatter = np.exp(noise * np.random.default_rng(0).standard_normal(len(rows)))
    return points | {"loss": law.predict(values, points) * scatter}


MUENNIGHOFF = {
    "E": np.exp(0.6254804), "A": np.exp(6.255414), "B": np.exp(7.3049974), "alpha": 0.3526596, "beta": 0.3526596,
    "R_D": 15.387756, "R_N": 5.309743,
}  # fmt: skip
"""Their published parameters (arXiv 2305.16264, appendix A)."""


@pytest.mark.parametrize("law", [REPEATS, REPEATS_EXCESS], ids=lambda law: law.name)
def test_published_law_of_repeated_data_comes_out(law: Repeats) -> None:
    found = fit(law, Points(repeated_points(law, MUENNIGHOFF)), Ask(), bootstrap=100)
    for name, (low, high) in found.report["intervals"].items():
        assert low < MUENNIGHOFF[name] < high, name
    low, high = found.report["intervals"]["R_D"]
    assert high / low < 2
    assert found.report["worth_of_epochs"]["4"] == pytest.approx(0.93, abs=0.02)  # computed by hand from their law
    once = {name: column[:1] for name, column in repeated_points(law, MUENNIGHOFF).items()}
    plain = CHINCHILLA.predict(MUENNIGHOFF, once)
    if law is REPEATS:
        assert law.predict(MUENNIGHOFF, once) == pytest.approx(plain)  # one epoch is Chinchilla's law
    else:
        assert law.predict(MUENNIGHOFF, once) > plain  # 7M parameters exceed the optimum of 100M tokens, 5.1M


def test_repeats_are_needed_for_their_worth() -> None:
    points = repeated_points(REPEATS, MUENNIGHOFF)
    single = {name: column[points["D"] == points["U"]] for name, column in points.items()}
    with pytest.raises(Unidentified, match="0 points repeat their data"):
        fit(REPEATS, Points(single), Ask())
    with pytest.raises(UserError, match="U must not exceed D; point 1"):
        fit(REPEATS, Points({**points, "U": 2 * points["D"]}), Ask())


def test_a_refused_fit_shows_its_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = {"x": np.geomspace(1e3, 3e3, 20), "loss": 3 - 1e-3 * np.arange(20) + 0.01 * np.sin(np.arange(20))}
    files = [str(write_csv(tmp_path / "points.csv", points)), "--out", str(tmp_path / "fit.json")]
    picture = tmp_path / "fit.png"
    options = ["--law", "power", "--bootstrap", "100", "--plot", str(picture)]
    assert main(["scaling", "fit", *files, *options]) == 2
    assert "too wide" in (said := capsys.readouterr().err) and "have the points and what was found" in said
    found = json.loads((tmp_path / "fit.json").read_text())
    assert "too wide" in found["refused"] and found["intervals"]["alpha"] and found["parameters"]["E"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_overoptimization() -> None:
    report = fit(OVEROPTIMIZATION, Points(overoptimization_points()), Ask(), bootstrap=200).report
    assert report["parameters"] == pytest.approx({"alpha": 0.9, "beta": 0.3}, rel=0.03)
    assert report["peak"]["kl"] == pytest.approx(np.exp(2 * (0.9 / 0.3 - 1)), rel=0.05)
    assert report["peak"]["within_points"]


def test_stability_counts_runs_that_never_crossed() -> None:
    points = stability_points()
    assert 0.2 < points["crossed"].mean() < 0.8
    ask = Ask(stable_steps=[1000], at={"lr": 1e-4})
    found = fit(STABILITY, Points(points), ask, bootstrap=200).report
    truth = {"c": -3.0, "c_lr": -1.0, "c_lambda": 2.0, "sigma": 0.3}
    for name, value in truth.items():
        low, high = found["intervals"][name]
        assert low < value < high, name
    needed = np.expm1((np.log(1000) + 1.2816 * 0.3 + 3 + np.log(1e-4)) / 2)
    stable = found["stable_lambda"][0]
    assert stable["lambda_interval"][0] < needed < stable["lambda_interval"][1]
    ended = {**points, "crossed": np.ones(200)}  # treats censored runs as crossings
    assert abs(STABILITY.estimate(ended)["c_lambda"] - 2) > 4 * abs(found["parameters"]["c_lambda"] - 2)


def line_of_sizes() -> dict[str, np.ndarray]:
    points = chinchilla_points()
    points["D"] = 20 * points["N"]
    return points | {"loss": CHINCHILLA.predict(KNOWN, points)}


REFUSED: dict[str, tuple[Law, dict[str, Any], str]] = {
    "few N": (CHINCHILLA, {**chinchilla_points(), "N": np.repeat([1e8, 1e9], 120)}, "N has 2 distinct values"),
    "D proportional": (CHINCHILLA, line_of_sizes(), "D is a power of N in all points (exponent 1.00)"),
    "rising": (CHINCHILLA, chinchilla_points({**KNOWN, "B": 1e-3, "beta": -0.3}), "does not fall with D"),
    "no curvature": (
        POWER,
        {"x": np.geomspace(1e3, 3e3, 20), "loss": 3 - 1e-3 * np.arange(20) + 0.01 * np.sin(np.arange(20))},
        "has the interval",
    ),
    "few points": (POWER, {name: column[:3] for name, column in power_points().items()}, "3 points, but at least 4"),
    "no extrapolation": (
        POWER,
        {"x": np.repeat([1.0, 2.0, 3.0], 4), "loss": np.repeat([3.0, 2.5, 2.4], 4)},
        "without the 4 largest points",
    ),
    "no bend": (OVEROPTIMIZATION, overoptimization_points(0.0), "no over-optimization"),
    "all censored": (STABILITY, stability_points(1.0), "all are censored"),
    "one side": (
        STABILITY,
        {"steps": np.arange(1.0, 17), "crossed": np.repeat([1.0, 0.0], 8), "rows": np.repeat([150.0, 2400.0], 8)},
        "all runs that crossed the bound have the same rows",
    ),
    "nothing varies": (STABILITY, {"steps": np.arange(1.0, 9), "crossed": np.ones(8)}, "no cause varies"),
    "together": (
        STABILITY,
        {**stability_points(), "beta": stability_points()["lr"] * 3},
        "lr, beta, lambda vary together",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_points_cannot_determine_is_refused(case: str) -> None:
    law, points, reason = REFUSED[case]
    with pytest.raises(Unidentified) as refusal:
        fit(law, Points(points), Ask(), bootstrap=100)
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ("N,D\n1,2\n", [], "column 'loss' is missing; the file has N, D. Set --column loss=NAME"),
        ("N,D,loss\n1,2,3\n1,2,nan\n", [], "points.csv line 3: loss = 'nan' is not a finite number"),
        ("N,D,loss\n1,2,\n", [], "points.csv line 2: loss = '' is not a finite number"),
        ("N,D,loss\n1,2,-3\n", [], "loss must be positive; point 1 has -3"),
        ("N,D,loss\n", [], "has no rows"),
        ("N,D,loss,state\n1,2,3,failed\n", [], "no row has the state done"),
        ("N,D,loss\n1,2,3\n", ["--column", "x=loss"], "--column x=...: the law has no column 'x'"),
        ("N,D,loss\n1,2,3\n", ["--stable-steps", "5"], "--stable-steps is not supported with --law chinchilla"),
        ("N,D,loss\n1,2,3\n", ["--flops", "-5"], "must be positive, not -5"),
        ("N,D,loss\n1,2,3\n", ["--bootstrap", "5"], "--bootstrap 5 must be at least 100"),
        ("N,D,loss\n1,2,3\n", ["--by", "method"], "column 'method' is missing; the file has N, D, loss"),
        ("N,D,loss\n1,2,3\n", ["--by", "N"], "--by N: the column has 1 values; it must have 2 to 12"),
        ("N,D,loss\n1,2,3\n", ["--only", "N=7"], "no row of these values has the state done"),
        ("N,D,loss\n1,2,3\n", ["--plot", "fit.gif"], "--plot fit.gif: the name must end in .svg, .png, .pdf"),
    ],
)
def test_wrong_input_gets_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str, options: list[str], said: str
) -> None:
    (tmp_path / "points.csv").write_text(rows)
    files = [str(tmp_path / "points.csv"), "--law", "chinchilla", "--out", str(tmp_path / "fit.json")]
    assert main(["scaling", "fit", *files, *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "fit.json").exists()


def test_tables_of_studies_are_read_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = stability_points()
    renamed = {"optimizer.lr": points["lr"], "spo.lambda": points["lambda"], "until": points["steps"]}
    rows: dict[str, Any] = {**renamed, "crossed": ["True" if one else "False" for one in points["crossed"]]}
    table = {name: [*column, ""] for name, column in rows.items()} | {"state": ["done"] * 200 + ["failed"]}
    write_csv(tmp_path / "table.csv", table)
    options = ["--law", "stability", "--column", "steps=until", "--stable-steps", "500", "--at", "lr=1e-4"]
    files = [str(tmp_path / "table.csv"), "--out", str(tmp_path / "fit.json"), "--plot", str(tmp_path / "fit.svg")]
    assert main(["scaling", "fit", *files, *options, "--bootstrap", "100"]) == 0
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["columns"]["steps"] == "until" and found["columns"]["lambda"] == "spo.lambda"
    assert (found["points"], found["left_out"]) == (200, 1)
    assert found["stable_lambda"][0]["steps"] == 500
    assert f"500 steps: lambda = {found['stable_lambda'][0]['lambda']:.3g} keeps a run" in capsys.readouterr().out


def test_a_plot_has_the_format_of_its_name_and_budgets_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = write_csv(tmp_path / "points.csv", chinchilla_points())
    files = [str(points), "--law", "chinchilla", "--out", str(tmp_path / "fit.json"), "--bootstrap", "100"]
    for name, start in {"fit.png": b"\x89PNG\r\n", "fit.pdf": b"%PDF-", "fit.svg": b"<svg"}.items():
        assert main(["scaling", "fit", *files, "--plot", str(tmp_path / name), "--flops", "1e21"]) == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    best = json.loads((tmp_path / "fit.json").read_text())["compute_optimal"]["at"][0]
    printed = capsys.readouterr().out
    assert f"1e+21 FLOPs: N = {best['N']:.3g} (" in printed and f"and D = {best['D']:.3g} (" in printed
    assert main(["scaling", "fit", *files, "--plot", str(tmp_path / "fit.jpg")]) == 2
    assert "fit.jpg: the name must end in .svg, .png, .pdf" in capsys.readouterr().err
    assert main(["scaling", "fit", *files[:-3], str(tmp_path), "--bootstrap", "100"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_command_line_names_all_laws() -> None:
    assert tuple(LAWS) == LAW_NAMES
