"""The cost of a step in counts that do not depend on the machine: operations, allocations, collectives, fetches."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megatron_spo.model import logprobs
from megatron_spo.planner.flops import forward_flops, step_flops
from megatron_spo.train.step import Engine
from tests.bench.collectives import ROWS
from tests.bench.counters import Fetches, Operators, inside_steps
from tests.support.processes import launch
from tests.support.tiny import tiny_model, write_jsonl

LAYERS = 4


def folder_with(tmp_path: Path, vocab: int = 262, **sections: dict) -> Path:
    """Writes a tiny model, pairs, and a configuration with one pair per row."""
    import measure

    tiny_model(tmp_path / "model", vocab_size=vocab)
    pairs = [{"prompt": f"{i}+11=", "chosen": "12345", "rejected": "54321"} for i in range(10, 26)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    merged: dict[str, dict[str, Any]] = {
        "reference": {"cache": None},
        "loss": {"name": "simpo"},
        "data": {"row_length": 20, "max_length": 20},
    }
    for name, section in sections.items():
        merged[name] = {**merged.get(name, {}), **section}
    return measure.write_config(tmp_path, **merged)


def test_a_step_multiplies_no_more_than_the_formula_says(tmp_path: Path) -> None:
    """torch's counter does not know the attention kernel for CPUs; tests/planner/test_flops.py counts its products."""
    from work import Model, needed, random_rows

    model = Model(folder_with(tmp_path))
    rows = random_rows(262, [(20, 10, 14), (9, 30, 21), (8, 12, 5)], per_row=2)
    with FlopCounterMode(display=False) as counter:
        model.step(rows)
    expected = 0.0
    for row in rows:
        step = step_flops(model.config, forward_flops(model.shape, needed(row), necessary=True))
        expected += model.shape.layers * step.linear + step.head
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


def test_the_head_never_holds_logits_of_all_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from work import Model, random_rows

    vocab = 4096
    model = Model(folder_with(tmp_path, vocab))
    rows = random_rows(vocab, [(5, 150, 150)], per_row=1)
    weights = {p.numel() for p in model.trainable.chunks[0].parameters()}
    buffers = {buffer.grad_data.numel() for buffer in model.trainable.wrapped[0].buffers}

    def largest() -> int:
        with Operators(known=[*weights, *buffers]) as seen:
            model.step(rows)
        return seen.largest

    assert largest() >= 300 * vocab  # few logits are computed at once, and the counter sees them
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 16 * vocab)
    assert largest() < 300 * vocab / 4


def test_nothing_is_fetched_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step fetches only its sums and the gradient norm, however many rows it has; on a GPU, each fetch would wait.

    torch's AdamW reads its step count, which is on the CPU, twice for each parameter.
    """
    import measure

    config = folder_with(tmp_path, training={"steps": 2})
    counts = []
    for pairs in (2, 8):
        modes = [Fetches(), Fetches()]
        monkeypatch.setattr(Engine, "train_step", inside_steps(modes))
        measure.command("train", str(config), f"output={tmp_path}/{pairs}", f"training.global_batch_size={pairs}")
        monkeypatch.undo()
        counts.append(modes[1].count)
    assert counts[0] == counts[1]
    parameters = 6 * LAYERS + 3
    assert sum(counts[0].values()) <= 2 * parameters + 4, counts[0]


def test_collectives_of_a_step(tmp_path: Path) -> None:
    """A layout has no collectives but those that it needs per row and layer, or once per step."""
    folder_with(tmp_path, training={"steps": 2})
    script = str(Path(__file__).with_name("collectives.py"))
    done = launch([script, str(tmp_path), str(tmp_path / "counts.json")], processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads((tmp_path / "counts.json").read_text())
    # gradients are scattered to the optimizer's shards, weights gathered; sums of the metrics and the gradient norm
    once = {"reduce_scatter_tensor_coalesced_": 1, "allgather_into_tensor_coalesced_": 1, "allreduce_": 2}
    alone = {"allreduce_": 2}  # one replica has all gradients and weights
    # two blocks per layer, forward and backward; the embedding; the head: largest logit, sums, gradient
    tensor = 4 * LAYERS + 1 + 3
    for rows in ROWS:
        assert counts[f"data {rows}"] == once
        assert counts[f"tensor {rows}"] == {**alone, "allreduce_": 2 + rows * tensor}
        # a row's activations forward, their gradient back
        assert counts[f"pipeline {rows}"] == {**alone, "send": rows, "recv_": rows}
