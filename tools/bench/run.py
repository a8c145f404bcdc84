"""`make bench`: runs every benchmark that needs no GPU, and compares the results with the limits in floors.json.

Takes about 14 minutes on two idle cores. Prints a table per benchmark and writes results.json and two plots to --out.
The exit code is 1 if a number violates its limit or a benchmark failed. On a busy machine, omit `layouts`, which
measures wall-clock time; the others measure processor time.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import MIXES

HERE = Path(__file__).parent
BENCHMARKS = ("speed", "schedules", "layouts", "memory", "data", "start", "curves")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="what to run [all]")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the results [%(default)s]")
    parser.add_argument("--data", type=Path, help="preference pairs for fill and balance")
    parser.add_argument("--model", type=Path, help="model folder in Hugging Face format: also run real.py with it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes to test the code, not compared with limits")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    more: dict[str, list[str]] = {
        "schedules": ["--no-memory"],
        "layouts": ["--data", str(options.data)] if options.data else [],
        "curves": ["--svg", str(options.out / "curves.svg")],
        "real": ["--model", str(options.model)],
    }
    begin, failed = time.perf_counter(), False
    for name in [*options.only, *(["real"] if options.model else [])]:
        print(f"\n== {name}", flush=True)
        found = _run(name, [*more.get(name, []), *(["--quick"] if options.quick else [])])
        failed |= found is None
        results += found or []
        (options.out / "results.json").write_text(json.dumps({"machine": _machine(), "results": results}, indent=1))
        print(f"({time.perf_counter() - begin:.0f} s since the start)", flush=True)
    values = {result["name"]: result["value"] for result in results}
    if "speed" in options.only and not failed:
        draw_speed(values, options.out / "speed.svg")
    if options.quick:
        return int(failed)
    return int(failed) or _compare(values, whole=set(options.only) == set(BENCHMARKS))


def _run(name: str, arguments: Sequence[str]) -> list[dict[str, Any]] | None:
    """Runs a benchmark in its own process; returns its results, or None (after printing its output) if it failed."""
    root = str(HERE.parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": root}
    with tempfile.NamedTemporaryFile(suffix=".json") as file, tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, str(HERE / f"{name}.py"), "--json", file.name, *arguments]
        if subprocess.run(command, env=environment, stderr=said, check=False).returncode:
            said.seek(0)
            print(f"error: {name} failed:\n{said.read()[-4000:]}", file=sys.stderr)
            return None
        return json.loads(Path(file.name).read_text())["results"]


def broken(values: Mapping[str, float], floors: Mapping[str, Mapping[str, float]], *, whole: bool) -> list[str]:
    """Returns a line for each number that violates its limit; in a `whole` run, a missing number is a violation."""
    lines = []
    for name, limits in floors.items():
        wanted = " ".join(f"{kind.replace('_', ' ')} {limit:g}" for kind, limit in limits.items())
        value = values.get(name)
        if value is None:
            lines += [f"{name}: not measured, must be {wanted}"] if whole else []
        elif not limits.get("at_least", value) <= value <= limits.get("at_most", value):
            lines.append(f"{name}: {value:.4g}, must be {wanted}")
    return lines


def _compare(values: Mapping[str, float], *, whole: bool) -> int:
    floors = json.loads((HERE / "floors.json").read_text())
    lines = broken(values, floors, whole=whole)
    looked_at = len(floors) if whole else len(floors.keys() & values.keys())
    print(f"\n{looked_at - len(lines)} of {looked_at} numbers are within their limits (floors.json)")
    for line in lines:
        print(f"OUTSIDE ITS LIMIT  {line}")
    return 1 if lines else 0


def draw_speed(values: Mapping[str, float], path: Path) -> None:
    """Draws pairs per second relative to TRL with its reference model, for each length mix."""
    import matplotlib

    from megatron_spo.report.figures import PALETTE, STYLE, file_svg, new_figure

    bars = {"trl": "TRL", "trl-given": "TRL, reference precomputed", "ours": "megatron-spo"}
    mixes = [mix for mix in MIXES if f"{mix}/trl" in values]
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure()
        for place, (way, label) in enumerate(bars.items()):
            heights = [values[f"{mix}/{way}"] / values[f"{mix}/trl"] for mix in mixes]
            at = [i + 0.27 * (place - 1) for i in range(len(mixes))]
            axes.bar(at, heights, 0.25, label=label, color=PALETTE[(7, 5, 0)[place]])
            for x, height in zip(at, heights, strict=True):
                axes.text(x, height + 0.05, f"{height:.1f}", ha="center", fontsize=9)
        axes.set(title="pairs/s, relative to TRL's DPOTrainer", xticks=range(len(mixes)), xticklabels=mixes)
        axes.set_ylim(top=1.4 * axes.get_ylim()[1])  # space for the legend
        axes.legend(frameon=False, loc="upper right")
        path.write_text(file_svg(figure))


def _machine() -> dict[str, Any]:
    """Returns a description of the machine."""
    import torch

    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.partition(":")[2].strip() for line in described.splitlines() if "model name" in line), "")
    return {"cpu": model or platform.processor(), "cores": os.cpu_count(), "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(main())
