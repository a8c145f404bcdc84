"""`python tools/bench/data.py`: tokenising, planning, the reference cache, and the time that a step waits for data.

The cache of a million pairs is of real rows: one tokenised file, repeated to a million pairs.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import curves
import measure
import numpy as np
from measure import MIXES, Result

from megatron_spo.data.dataset import TokenizedSet

PEAK = """
import pathlib, sys, threading, time
sys.path.insert(0, sys.argv[1])
import data, memory
peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, memory.resident("RssAnon"))
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
data.tokenise(pathlib.Path(sys.argv[2]))
print(peak)
"""
"""Measures the peak of anonymous memory: the system can reclaim pages of mapped files at any time."""


def main() -> None:
    options = measure.parser(__doc__).parse_args()
    with measure.workplace() as folder:
        results = _tokenising(folder / "texts", 2_000 if options.quick else 10_000)
        results += _cache(folder / "texts", 20_000 if options.quick else 1_000_000)
        results += _training(folder / "training", quick=options.quick)
    count = 10_000 if options.quick else 1_000_000
    results.append(Result("plan", curves.plan_seconds(count), "s", f"an epoch of {count} pairs for 8 ranks"))
    measure.report(results, options.json)


def tokenise(folder: Path) -> TokenizedSet:
    """Returns the tokenised pairs of a folder."""
    from megatron_spo.config.load import load_config
    from megatron_spo.data.dataset import build_dataset
    from megatron_spo.data.tokenize import load_tokenizer

    config = load_config(folder / "config.yaml", [], world_size=1)
    return build_dataset(config.data.train, config.data, load_tokenizer(config.model.path))


def _write_pairs(folder: Path, count: int, mix: str) -> Path:
    prompt, response = MIXES[mix]
    measure.write_pairs(folder / "pairs.jsonl", count, prompt=prompt, response=response, seed=count)
    return folder / "pairs.jsonl"


def _tokenising(folder: Path, count: int) -> list[Result]:
    """Measures the speed, the memory that more pairs need, and a second call, which maps the files of the first."""
    peaks, files = [], []
    for size in (count, 2 * count):
        some = folder / str(size)
        measure.write_model(some / "model", hidden=64)
        files.append(os.path.getsize(_write_pairs(some, size, "reason")))
        measure.write_config(some)
        script = [sys.executable, "-c", PEAK, str(Path(__file__).parent), str(some)]
        peaks.append(int(subprocess.run(script, check=True, capture_output=True, text=True).stdout))
    _write_pairs(some, count - 1, "reason")  # a file that was not tokenised before
    first = measure.cpu_seconds(lambda: tokenise(some), repeats=1)
    again = measure.cpu_seconds(lambda: tokenise(some))
    grown = (peaks[1] - peaks[0]) / 2**20
    return [
        Result("tokenise", (count - 1) / first, "pairs/s", "300 letters per pair"),
        Result("tokenise/again", again, "s", "the same pairs, from the files of the first call"),
        Result(
            "tokenise/memory", grown, "MiB", f"peak without mapped files, {(files[1] - files[0]) / 1e6:.1f} MB more"
        ),
    ]


def _cache(folder: Path, count: int) -> list[Result]:
    from megatron_spo.data.dataset import TokenizedSet
    from megatron_spo.reference.cache import ReferenceFingerprint, ReferenceWriter, cache_folder, open_reference

    source = tokenise(next(path for path in folder.iterdir() if path.name.isdigit()))
    times = count // len(source)
    dataset = TokenizedSet(source._sources * times, [1.0] * times)
    fingerprint = ReferenceFingerprint("weights", "tokenizer", "truncation", "fp32", dataset.fingerprint)
    cache, rng = folder / "cache", np.random.default_rng(0)
    writer = ReferenceWriter.open(cache, "train", fingerprint, dataset, chunk=2**16)
    for chunk in writer.missing_chunks():
        sums = -rng.random((2, len(writer.chunk_indices(chunk))))
        writer.write_chunk(chunk, *sums)
    writer.finish()
    opened = measure.cpu_seconds(lambda: open_reference(cache, "train", fingerprint, dataset), repeats=5)
    store = open_reference(cache, "train", fingerprint, dataset)
    batches = [rng.integers(0, len(dataset), 64) for _ in range(2000)]
    taken = []
    for batch in batches:
        begin = time.process_time_ns()
        store.get(batch)
        taken.append((time.process_time_ns() - begin) / 1e3)
    size = sum(file.stat().st_size for file in cache_folder(cache, "train", fingerprint).iterdir())
    note = f"{len(dataset)} pairs"
    return [
        Result("cache/64 random pairs", float(np.median(taken)), "us", note),
        Result("cache/open", 1e3 * opened, "ms", note),
        Result("cache/size", size / 1e6, "MB", note),
    ]


def _training(folder: Path, *, quick: bool) -> list[Result]:
    """Measures the share of a step that waits for data, and the speed of the reference pass.

    The latter is relative to a plain forward pass on the same rows, without reading and writing. Timers wrap the
    functions that the commands call.
    """
    from megatron_spo.data.loader import Loader
    from megatron_spo.model.forward import score_rows
    from megatron_spo.reference import fill
    from megatron_spo.reference.cache import ReferenceWriter

    measure.write_model(folder / "model", hidden=64 if quick else 256)
    _write_pairs(folder, 64 if quick else 384, "chat")
    config = measure.write_config(folder, training={"global_batch_size": 16, "steps": 4})
    forward, scored = _Clock(score_rows), _Clock(fill.score_rows)
    written, batch = _Clock(ReferenceWriter.write_chunk), _Clock(Loader.batch)

    def both(chunks: Any, rows: Any, *, runtime: Any, begun: Any) -> Any:
        forward(chunks, rows, runtime=runtime)
        return scored(chunks, rows, runtime=runtime, begun=begun)

    with (
        measure.replaced(fill, "score_rows", both),
        measure.replaced(ReferenceWriter, "write_chunk", written.method()),
    ):
        measure.command("reference", str(config))
    with measure.replaced(Loader, "batch", batch.method()):
        turn = measure.train(config, folder / "run")
    whole = written.ends[-1] - forward.begins[0] - sum(forward.taken)
    return [
        Result("cache/build", sum(forward.taken) / whole, "x", "speed of building it over that of the forward pass"),
        Result("step/waits for data", sum(batch.taken[1:]) / sum(turn.seconds), "x", "share of a step, width 256"),
    ]


class _Clock:
    """Wraps a function and records the begin and end of its calls in processor seconds."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.begins: list[float] = []
        self.ends: list[float] = []

    @property
    def taken(self) -> list[float]:
        return [end - begin for begin, end in zip(self.begins, self.ends, strict=True)]

    def method(self) -> Callable[..., Any]:
        """Returns a plain function, which works as a method."""
        return lambda *arguments, **named: self(*arguments, **named)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.begins.append(time.process_time())
        try:
            return self._function(*arguments, **named)
        finally:
            self.ends.append(time.process_time())


if __name__ == "__main__":
    main()
