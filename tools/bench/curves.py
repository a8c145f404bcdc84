"""`python tools/bench/curves.py`: how the cost of a step grows, compared with the law that it should follow.

Each curve changes one size. The law is the number of floating-point operations that the planner counts as necessary
(megatron_spo/planner/flops.py); for planning, it is time linear in the number of pairs. Slopes are fitted to the
logarithms of both. Seconds are of one thread, the least of several measurements.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
from measure import Result
from work import Model, lognormal_lengths, necessary_flops, random_rows

from megatron_spo.data.packing import Sampler, plan_rows


@dataclass(frozen=True)
class Curve:
    """Measured seconds over a size, and the law, which should be proportional to them."""

    name: str
    sizes: tuple[float, ...]
    seconds: tuple[float, ...]
    law: tuple[float, ...]

    def slopes(self) -> tuple[float, float]:
        """Returns the log-log slopes of the measurement and of the law."""
        x = np.log(self.sizes)
        measured, expected = (float(np.polyfit(x, np.log(y), 1)[0]) for y in (self.seconds, self.law))
        return measured, expected


Settings = tuple[dict[str, int], list[tuple[int, int, int]], int]
"""Model shape, (prompt, chosen, rejected) lengths of the pairs in tokens, and pairs per row."""


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--svg", type=Path, help="SVG file for a plot of the curves")
    options = parser.parse_args()
    with measure.workplace() as folder:
        curves = [*_model_curves(folder, quick=options.quick), planning(quick=options.quick)]
    results = []
    for curve in curves:
        slope, expected = curve.slopes()
        points = ", ".join(f"{x:g}: {y:.3g} s" for x, y in zip(curve.sizes, curve.seconds, strict=True))
        results.append(Result(f"slope/{curve.name}", slope, "", f"law {expected:.2f}; {points}"))
        results.append(Result(f"slope apart/{curve.name}", abs(slope - expected), ""))
    measure.report(results, options.json, curves=[vars(curve) for curve in curves])
    if options.svg:
        draw(curves, options.svg)


def _model_curves(folder: Path, *, quick: bool) -> Iterator[Curve]:
    few = 2 if quick else None
    tokens = 1024 if quick else 8192

    def curve(name: str, sizes: Sequence[float], settings: Callable[[Any], Settings]) -> Curve:
        taken, law = [], []
        for size in sizes[:few]:
            shape, lengths, per_row = settings(size)
            seconds, flops = _step(folder / name.replace(" ", "-") / str(size), shape, lengths, per_row)
            taken.append(seconds)
            law.append(flops)
        return Curve(name, tuple(sizes[:few]), tuple(taken), tuple(law))

    narrow = {"hidden": 128, "layers": 2, "vocab": 1024}
    pair = (64, 96, 96)
    yield curve(
        "tokens per row", [512, 1024, 2048, 4096, 8192], lambda row: (narrow, [pair] * (tokens // 256), row // 256)
    )
    yield curve(
        "tokens per pair",
        [128, 256, 512, 1024, 2048],
        lambda t: (narrow, [(t // 4, 3 * t // 8, 3 * t // 8)] * (tokens // t), max(1, 2048 // t)),
    )
    yield curve(
        "response share",
        [0.125, 0.25, 0.5, 0.75],
        lambda s: ({**narrow, "vocab": 8192}, [(round(512 * (1 - s)), *2 * (round(256 * s),))] * (tokens // 1024), 4),
    )
    yield curve(
        "vocabulary",
        [1024, 4096, 16384, 65536],
        lambda v: ({**narrow, "vocab": v}, [pair] * (tokens // 1024), 4),
    )
    yield curve("layers", [2, 4, 8, 16], lambda n: ({**narrow, "layers": n}, [pair] * (tokens // 512), 8))


def _step(
    folder: Path, shape: dict[str, int], lengths: list[tuple[int, int, int]], per_row: int
) -> tuple[float, float]:
    """Returns the seconds of a step and its necessary floating-point operations."""
    measure.write_model(folder / "model", **shape)
    model = Model(measure.write_config(folder))
    rows = random_rows(shape["vocab"], lengths, max(1, per_row))
    model.step(rows)
    return measure.cpu_seconds(lambda: model.step(rows), repeats=2), necessary_flops(model.config, model.shape, rows)


def planning(*, quick: bool) -> Curve:
    """Measures the planning of an epoch of batches of 256 pairs: their order, and their rows on 8 ranks."""
    sizes = (1000, 10_000) if quick else (1000, 10_000, 100_000, 1_000_000)
    return Curve("pairs planned", sizes, tuple(plan_seconds(size) for size in sizes), sizes)


def plan_seconds(count: int) -> float:
    """Returns the processor seconds of planning an epoch."""
    tokens = lognormal_lengths(count, *measure.MIXES["chat"]).sum(1)

    def plan() -> None:
        sampler = Sampler([count], [1.0], seed=0, global_batch_size=256)
        for step in range(sampler.steps_per_epoch):
            plan_rows(tokens[sampler.indices_of_step(step)], row_length=4096, ranks=8)

    return measure.cpu_seconds(plan, repeats=1)


def draw(curves: list[Curve], path: Path) -> None:
    """Draws each curve over its size, with the law scaled to fit the measurements."""
    import matplotlib

    from megatron_spo.report.figures import PALETTE, STYLE, file_svg, new_figure

    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(len(curves))
        figure.set_size_inches(2.9 * len(curves), 3.0)
        for axes, curve in zip(panels, curves, strict=True):
            axes.plot(curve.sizes, curve.law, "--", color=PALETTE[7], label="law")
            scale = math.exp(np.mean(np.log(curve.law) - np.log(curve.seconds)))
            measured = [scale * y for y in curve.seconds]
            axes.plot(curve.sizes, measured, "o-", color=PALETTE[0], label="measured")
            axes.set(xscale="log", yscale="log", title=curve.name)
            low, high = min(*curve.law, *measured), max(*curve.law, *measured)
            if high < 4 * low:
                axes.set_ylim(low / 2, high * 2)
            axes.tick_params(labelleft=False, left=False, which="both")
            axes.set_xticks([curve.sizes[0], curve.sizes[-1]], labels=[f"{curve.sizes[0]:g}", f"{curve.sizes[-1]:g}"])
            axes.minorticks_off()
            axes.grid(alpha=0.2)
        panels[0].legend(frameon=False)
        path.write_text(file_svg(figure))


if __name__ == "__main__":
    main()
