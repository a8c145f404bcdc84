"""`python tools/bench/checkpoint.py`: time to save and load a checkpoint, relative to plain file access.

One process, a random Llama with its optimizer (main parameters and both moments in fp32). The operations take turns;
the result is the median over the rounds:

    write        write the same number of bytes to one file, and fsync
    save         save a checkpoint while training waits: shards, checksums, fsync
    start        the time that training waits if the checkpoint is written in the background (checkpoint.async)
    read         read the bytes again (possibly from the page cache, as for `load`)
    load         compare checksums and read tensors into model and optimizer
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import LlamaConfig

from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.config.schema import OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_spo.config.spo import SpoConfig
from megatron_spo.config.topology import make_topology
from megatron_spo.runtime import processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds [%(default)s]")
    parser.add_argument("--hidden", type=int, default=768, help="width of the model [%(default)s]")
    parser.add_argument("--folder", type=Path, default=None, help="where to write [the system's temporary folder]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ways, size = _ways(Path(folder), options.hidden)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                seconds[name].append(way())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{size / 2**20:.0f} MiB{'seconds':>17s}{'MiB/s':>10s}{'of plain':>10s}")
    for name, median in medians.items():
        plain = medians["read" if name in ("read", "load") else "write"]
        print(f"{name:12s}{median:12.3f}{size / median / 2**20:10.0f}{median / plain:10.2f}")


def _ways(folder: Path, hidden: int) -> tuple[dict[str, Callable[[], float]], int]:
    """Returns the timed operations, each of which returns its seconds, and the bytes of a checkpoint."""
    processes.start(make_topology(ParallelConfig(), 1), seed=0, threads=0)
    from megatron_spo.checkpoint.folder import step_name
    from megatron_spo.checkpoint.load import find
    from megatron_spo.checkpoint.load import load as load_into
    from megatron_spo.checkpoint.save import Saver
    from megatron_spo.model.build import build_model
    from megatron_spo.model.optimizer import make_trainable
    from megatron_spo.model.settings import transformer_config
    from megatron_spo.model.weights import fill_randomly
    from megatron_spo.objective.schedules import initial_state
    from megatron_spo.objective.statistics import LossStatistics
    from megatron_spo.train.state import TrainState

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=8 * hidden // 3 // 64 * 64, num_hidden_layers=8, vocab_size=32000,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
    )  # fmt: skip
    config.save_pretrained(folder)
    shape = read_model_shape(folder)
    chunks = build_model(shape, transformer_config(shape, ParallelConfig(), PrecisionConfig(dtype="bf16")))
    fill_randomly(chunks[0], shape, 0)
    trainable = make_trainable(chunks, chunks[0].config, OptimizerConfig(), overlap=False)
    checkpoints, plain_file = folder / "checkpoints", folder / "plain"
    saver = Saver(checkpoints, trainable, {"config": {}, "data": {}}, keep=1)
    state = TrainState(1, initial_state(SpoConfig()), LossStatistics())

    def save() -> float:
        begin = time.perf_counter()
        saver.start(state, in_background=False)
        saver.finished(wait=True)
        return time.perf_counter() - begin

    def start() -> float:
        begin = time.perf_counter()
        saver.start(state, in_background=True)
        seconds = time.perf_counter() - begin
        saver.finished(wait=True)
        return seconds

    def load() -> float:
        begin = time.perf_counter()
        found = find(checkpoints, scales=False)
        assert found is not None
        load_into(found, trainable)
        return time.perf_counter() - begin

    save()
    size = sum(path.stat().st_size for path in (checkpoints / step_name(1)).iterdir())
    block = os.urandom(2**24)

    def write() -> float:
        begin = time.perf_counter()
        with plain_file.open("wb") as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.write(block[: size % len(block)])
            file.flush()
            os.fsync(file.fileno())
        return time.perf_counter() - begin

    def read() -> float:
        begin = time.perf_counter()
        with plain_file.open("rb") as file:
            while file.read(len(block)):
                pass
        return time.perf_counter() - begin

    assert shutil.disk_usage(folder).free > 4 * size, f"{folder}: needs {4 * size} bytes of free disk space"
    return {"write": write, "save": save, "start": start, "read": read, "load": load}, size


if __name__ == "__main__":
    main()
