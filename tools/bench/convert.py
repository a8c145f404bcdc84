"""`python tools/bench/convert.py`: time and memory of conversions, relative to a plain copy of the same bytes.

A random Llama in several files is written first. Each operation runs in its own process, which reports its seconds
(without the start of Python) and its peak memory (or that of any of its workers). The operations take turns; the
results are the median of the seconds over the rounds, and the least and greatest peak memory:

    copy         read and write every file in blocks, one after another, and fsync
    import       Hugging Face -> Megatron
    export       Megatron -> Hugging Face, after comparing the checksums of the source
    N workers    the same with several processes
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from megatron_spo.checkpoint.lazy import Lazy
from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.convert.export import convert
from megatron_spo.convert.formats.hugging_face import HuggingFace
from megatron_spo.convert.sides import SideFiles
from megatron_spo.convert.source import Model
from megatron_spo.model import hf_files
from megatron_spo.model.families import full_shape, mappings

NOISE = torch.randint(-(2**15), 2**15, (2**22,), dtype=torch.int16).view(torch.bfloat16)


@dataclass(frozen=True)
class Noise(Lazy):
    """A tensor of random bits."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    def fill(self, start: int, out: Tensor) -> None:
        flat = out.view(-1)
        for at in range(0, len(flat), len(NOISE)):
            part = flat[at : at + len(NOISE)]
            part.copy_(NOISE[: len(part)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds [%(default)s]")
    parser.add_argument("--layers", type=int, default=14, help="layers of width 2048; 14 give 2.4 GB [%(default)s]")
    parser.add_argument("--workers", type=int, default=2, help="processes of the last two operations [%(default)s]")
    parser.add_argument("--ways", nargs="+", default=[], help="prefixes of the operations to run [all]")
    parser.add_argument("--folder", type=Path, default=None, help="where to write [the system's temporary folder]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = make_model(folder / "hf", options.layers)
        assert shutil.disk_usage(folder).free > 4 * size, f"{folder}: needs {4 * size} bytes of free disk space"
        convert(folder / "hf", folder / "megatron", "megatron")
        several = f"{options.workers} workers"
        ways: dict[str, tuple[Callable[..., object], tuple[object, ...]]] = {
            "copy": (copy, (folder / "hf", folder / "out")),
            "import": (convert_with, (folder / "hf", folder / "out", "megatron", 1)),
            "export": (convert_with, (folder / "megatron", folder / "out", "hf", 1)),
            f"import, {several}": (convert_with, (folder / "hf", folder / "out", "megatron", options.workers)),
            f"export, {several}": (convert_with, (folder / "megatron", folder / "out", "hf", options.workers)),
        }
        chosen = [way for way in ways if way == "copy" or not options.ways or way.startswith(tuple(options.ways))]
        results: dict[str, list[tuple[float, int]]] = {way: [] for way in chosen}
        for _ in range(options.rounds):
            for way in chosen:
                function, arguments = ways[way]
                results[way].append(measured(function, *arguments))
                shutil.rmtree(folder / "out")
    plain = statistics.median(seconds for seconds, _ in results["copy"])
    print(f"{size / 2**30:.2f} GiB{'seconds':>21s}{'MiB/s':>10s}{'of copy':>10s}{'peak MiB':>12s}")
    for way, figures in results.items():
        seconds = statistics.median(seconds for seconds, _ in figures)
        low, high = (pick(peak for _, peak in figures) / 2**20 for pick in (min, max))
        print(f"{way:20s}{seconds:10.2f}{size / seconds / 2**20:10.0f}{plain / seconds:10.0%}{low:6.0f}-{high:.0f}")


def make_model(folder: Path, layers: int) -> int:
    """Writes a Llama of random bits to a Hugging Face folder; returns the bytes of its tensors."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, vocab_size=128256,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    config.save_pretrained(folder)
    shape, form = read_model_shape(folder), HuggingFace()
    tensors = {
        name: Noise(size)
        for row in mappings(shape)
        for name, size in zip(row.sources, row.transform.shapes(full_shape(row, shape, shape.vocab)), strict=True)
    }
    model = Model("hf", shape, tensors, (folder / "config.json").read_text(), SideFiles(()), ())
    shards = form.shards(model, 2**29)
    form.finish(folder, model, {shard.name: form.write(folder / shard.name, shard.items) for shard in shards})
    return sum(tensor.nbytes for tensor in tensors.values())


def copy(source: Path, target: Path) -> None:
    """Copies the files of a folder."""
    target.mkdir()
    block = memoryview(bytearray(2**24))
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as read, (target / path.name).open("wb", buffering=0) as write:
            while count := read.readinto(block):
                write.write(block[:count])
            os.fsync(write.fileno())


def convert_with(source: Path, target: Path, to: str, workers: int) -> None:
    """Converts into files of at most 0.5 GiB, so that every worker gets some."""
    hf_files.SHARD_BYTES = 2**29
    convert(source, target, to, workers=workers)


def measured(function: Callable[..., object], *arguments: object) -> tuple[float, int]:
    """Returns the seconds and peak bytes of a call in its own process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, function, arguments))
    process.start()
    result = ours.recv()
    process.join()
    return result


def _measure(pipe: Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    begin = time.perf_counter()
    function(*arguments)
    seconds = time.perf_counter() - begin
    # not ru_maxrss of this process: on Linux it starts at that of the parent process
    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    pipe.send((seconds, 1024 * max(int(own.split()[1]), workers)))


if __name__ == "__main__":
    main()
