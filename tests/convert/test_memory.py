"""A conversion holds only a few blocks of rows, whatever the size and number of tensors and the speed of the disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_spo.checkpoint.lazy import Lazy
from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.convert.formats.hugging_face import HuggingFace
from megatron_spo.convert.sides import SideFiles
from megatron_spo.convert.source import Model
from megatron_spo.model.families import full_shape, mappings
from tests.support.processes import launch
from tests.support.tiny import tiny_model

MEASURE = """
import io, sys, time
from pathlib import Path
from megatron_spo.convert.export import convert

class SlowFile(io.FileIO):
    def write(self, content):
        time.sleep(len(content) * float(sys.argv[4]) / 2**20)
        return super().write(content)

whole_open = Path.open
Path.open = lambda self, mode="r", *more, **named: (
    SlowFile(self, "w") if mode == "wb" else whole_open(self, mode, *more, **named)
)

def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
print(peak() - before)
"""


def held(folder: Path, source: str, to: str, *, seconds_per_mib: float = 0) -> float:
    """Returns the peak memory of a conversion in its own process, in MiB, imported modules included."""
    (folder / "measure.py").write_text(MEASURE)
    arguments = [str(folder / "measure.py"), str(folder / source), str(folder / to), to, str(seconds_per_mib)]
    done = launch(arguments, 1, cold=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
def test_memory_does_not_follow_the_size(tmp_path: Path) -> None:
    """Embedding and head of 300 MB each are converted within 200 MB."""
    tiny_model(tmp_path / "model", vocab_size=600_000, hidden_size=128, num_hidden_layers=1)
    for source, to in (("model", "megatron"), ("megatron", "hf"), ("hf", "nemo")):
        assert held(tmp_path, source, to) < 200, f"{source} -> {to}"


class Zeros(Lazy):
    """A tensor of zeros."""

    dtype = torch.bfloat16

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def fill(self, start: int, out: Tensor) -> None:
        out.zero_()


@pytest.mark.slow
def test_memory_does_not_follow_the_number_of_tensors(tmp_path: Path) -> None:
    """90 tensors of 4 MiB each are written to a disk that is much slower than the one they are read from."""
    folder, form = tmp_path / "model", HuggingFace()
    tiny_model(folder, hidden_size=512, intermediate_size=4096, num_hidden_layers=1)
    config = (folder / "config.json").read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 30')
    (folder / "config.json").write_text(config)
    shape = read_model_shape(folder)
    tensors: dict[str, Lazy] = {
        name: Zeros(size)
        for row in mappings(shape)
        for name, size in zip(row.sources, row.transform.shapes(full_shape(row, shape, shape.vocab)), strict=True)
    }
    model = Model("hf", shape, tensors, config, SideFiles(()), ())
    (shard,) = form.shards(model, 2**40)
    form.finish(folder, model, {shard.name: form.write(folder / shard.name, shard.items)})
    for source, to in (("model", "megatron"), ("megatron", "hf")):
        assert held(tmp_path, source, to, seconds_per_mib=0.01) < 200, f"{source} -> {to}"
