"""Rows of random tokens, their necessary floating-point operations, and a model that trains on them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from megatron_spo.config.load import load_config
from megatron_spo.config.model_shape import ModelShape, read_model_shape
from megatron_spo.config.schema import Config
from megatron_spo.config.topology import make_topology
from megatron_spo.data.dataset import build_dataset
from megatron_spo.data.loader import Loader
from megatron_spo.data.rows import Example, PackedRow, build_row
from megatron_spo.planner.flops import forward_flops, step_flops
from megatron_spo.planner.rows import RowSize, segments_of
from megatron_spo.runtime import processes


def needed(row: PackedRow) -> RowSize:
    """Returns the size of a packed row in the form that planner/flops.py counts."""
    _, s, c, r = row.segments.T
    visible = (s * (s + 1) + c * (c + 1) + r * (r + 1)) // 2 + s * (c + r)
    padding = len(row.tokens) - row.real_tokens
    return RowSize(
        len(row.tokens), row.real_tokens, len(row.targets), int(visible.sum()), segments_of(s, c, r, padding)
    )


def necessary_flops(config: Config, shape: ModelShape, rows: Sequence[PackedRow]) -> float:
    """Returns the floating-point operations of a training step on these rows, without padding and recomputation."""
    total = 0.0
    for row in rows:
        step = step_flops(config, forward_flops(shape, needed(row), necessary=True), necessary=True)
        total += shape.layers * (step.linear + step.attention) + step.head
    return total


def random_pair(rng: np.random.Generator, vocab: int, prompt: int, chosen: int, rejected: int) -> Example:
    """Returns a pair of random tokens whose answers differ from their first token on."""
    start = rng.integers(0, vocab, prompt)
    sides = [np.concatenate([start, rng.integers(0, vocab, length)]).astype(np.int32) for length in (chosen, rejected)]
    sides[1][prompt] = (sides[0][prompt] + 1) % vocab
    return Example(sides[0], sides[1], prompt, prompt)


def random_rows(vocab: int, lengths: Sequence[tuple[int, int, int]], per_row: int) -> list[PackedRow]:
    """Returns rows of `per_row` pairs each, with the given (prompt, chosen, rejected) lengths."""
    rng = np.random.default_rng(0)
    pairs = [(i, random_pair(rng, vocab, *one)) for i, one in enumerate(lengths)]
    return [build_row(pairs[i : i + per_row], multiple=1) for i in range(0, len(pairs), per_row)]


def lognormal_lengths(count: int, prompt: int, response: int, longest: int = 4096) -> NDArray[np.int64]:
    """Returns (prompt, chosen, rejected) lengths [count, 3] of a length mix, at most `longest` tokens per pair."""
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.normal(0, 0.5, (count, 3))) * [prompt, response, response]
    return np.clip(drawn.astype(np.int64), 2, longest // 3)


class Model:
    """A model with random weights and its optimizer, for the shape in a folder, in this process."""

    def __init__(self, config: Path, *overrides: str, seed: int = 0) -> None:
        self.config = load_config(config, list(overrides), world_size=1)
        self.shape = read_model_shape(Path(self.config.model.path))
        self.runtime = processes.start(make_topology(self.config.parallel, 1), seed=seed, threads=1)
        from megatron_spo.model.build import build_model  # after the bridge, which `start` installs
        from megatron_spo.model.optimizer import make_trainable
        from megatron_spo.model.settings import transformer_config
        from megatron_spo.model.weights import fill_randomly

        settings = transformer_config(self.shape, self.config.parallel, self.config.precision)
        chunks = build_model(self.shape, settings)
        for chunk in chunks:
            fill_randomly(chunk, self.shape, seed)
        self.trainable = make_trainable(chunks, settings, self.config.optimizer, overlap=False)

    def step(self, rows: Sequence[PackedRow]) -> float:
        """Runs one step of DPO (reference: zero) on these rows with clipping and AdamW; returns the loss."""
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        from megatron_spo.model.forward import run_rows
        from megatron_spo.train import gradients

        pairs = sum(len(row.pairs) for row in rows)

        def objective(row: PackedRow, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            value = -torch.nn.functional.logsigmoid(0.1 * (sums[:, 0] - sums[:, 1])).sum() / pairs
            return value, value.detach()

        gradients.clear(self.trainable)
        losses = run_rows(self.trainable.wrapped, list(rows), objective, runtime=self.runtime, backward=True)
        optimizer = self.trainable.optimizer
        optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        for inner in optimizer.chained_optimizers:
            clip_grad_by_total_norm_fp32(inner.get_parameters(), max_norm=1.0, total_norm=norm)
        optimizer.step_with_ready_grads()
        return float(torch.stack(losses).sum())


def rows_of(config: Path, steps: int, batch: int) -> list[list[PackedRow]]:
    """Returns the rows that `train` packs from the pairs, by step."""
    loaded = load_config(config, [], world_size=1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(loaded.model.path)
    dataset = build_dataset(loaded.data.train, loaded.data, tokenizer)
    loader = Loader(dataset, loaded.data, global_batch_size=batch, seed=0)
    return [loader.batch(step).rows for step in range(steps)]
