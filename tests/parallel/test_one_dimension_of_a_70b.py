"""Trains models with one dimension as large as in Llama-3-70B and the others small, and checks the planned memory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_spo.config.load import load_config
from megatron_spo.config.model_shape import read_model_shape
from megatron_spo.config.topology import make_topology
from megatron_spo.planner.at_start import memory_at_start
from megatron_spo.planner.memory import Setting
from megatron_spo.planner.rows import measured_lengths
from tests.support.processes import ROOT, launch, read_metrics
from tests.support.tiny import tiny_run, tiny_tokenizer

STEPS = 2
SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Dimension:
    """Differences from the small model, number of processes, and layout."""

    sizes: dict[str, int]
    processes: int
    parallel: dict[str, Any]


DIMENSIONS = {
    "80 layers": Dimension({"num_hidden_layers": 80}, 4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    # The feed-forward network is narrow to limit memory and time.
    "hidden 8192": Dimension(
        {"hidden_size": 8192, "intermediate_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 64,
         "num_key_value_heads": 8}, 2, {"tensor": 2, "sequence": True},
    ),
    "vocabulary 128256": Dimension({"hidden_size": 512, "vocab_size": 128256}, 2, {"tensor": 2}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DIMENSIONS)
def test_it_trains_in_the_memory_that_was_planned(name: str, tmp_path: Path) -> None:
    dimension = DIMENSIONS[name]
    tiny_tokenizer(tmp_path / "random")
    (tmp_path / "random" / "config.json").write_text(json.dumps({**SMALL, **dimension.sizes}))
    path = tiny_run(
        tmp_path,
        pairs=8,
        model={"path": str(tmp_path / "random"), "init": "random"},
        reference=None,
        loss={"name": "simpo"},
        parallel=dimension.parallel,
        training={"global_batch_size": 4, "steps": STEPS},
    )
    worker = ROOT / "tests" / "parallel" / "measured_run.py"
    done = launch([str(worker), str(tmp_path), str(path)], dimension.processes, cold=True)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [line["loss"] for (kind, _, _), line in read_metrics(tmp_path / "run").items() if kind == "train"]
    assert len(losses) == STEPS and all(0 < loss < 100 for loss in losses)

    config, shape = load_config(path), read_model_shape(tmp_path / "random")
    lengths = measured_lengths(config.data, config.data.train, config.model.path, "preference")
    setting = Setting(config, shape, make_topology(config.parallel, dimension.processes), "cpu")
    planned = memory_at_start(setting, [(lengths, config.training.global_batch_size)]).total
    most = max(json.loads((tmp_path / f"{rank}.json").read_text())["most"] for rank in range(dimension.processes))
    print(f"{name}: planned {planned / 2**30:.2f} GiB, measured {most / 2**30:.2f}")
    assert most == pytest.approx(planned, rel=0.15, abs=0.1 * 2**30)
