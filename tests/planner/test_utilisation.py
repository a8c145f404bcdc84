"""MFU counts only the necessary operations of a step."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_spo.config.schema import Config
from megatron_spo.planner.gpus import GPUS
from megatron_spo.planner.presets import shape_of
from megatron_spo.planner.rows import Lengths, assumed_lengths
from megatron_spo.planner.utilisation import Utilisation, peak_of
from tests.planner.counted import CONFIG


def test_peaks_go_by_the_names_of_drivers() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3", fp8=False) == GPUS["h100"].bf16
    assert peak_of("NVIDIA H200", fp8=True) == GPUS["h200"].fp8
    assert peak_of("NVIDIA A100-SXM4-80GB", fp8=False) == GPUS["a100"].bf16
    for other in ("cpu", "NVIDIA H100 PCIe", "NVIDIA GB200", "NVIDIA GeForce RTX 4090"):
        assert peak_of(other, fp8=False) is None


def test_seconds_at_peak() -> None:
    """Six operations per weight (without embedding) and token, and few for attention; batches are additive."""
    shape, lengths = shape_of("Llama-3.1-8B"), assumed_lengths(60, 120, 1000, 2048)
    ideal = Utilisation(Config.model_validate(CONFIG), shape, {"train": lengths}, peak=1e15)
    first, rest = np.arange(300), np.arange(300, 1000)
    whole = ideal.seconds("train", np.arange(1000))
    assert whole == pytest.approx(ideal.seconds("train", first) + ideal.seconds("train", rest))
    layers = shape.layers * (shape.attention_weights + 3 * shape.hidden * shape.active_ffn)
    tokens, scored = lengths.tokens.sum(), lengths.entries.sum()
    assert whole * 1e15 == pytest.approx(6 * (tokens * layers + scored * shape.hidden * shape.vocab), rel=0.02)


def test_a_window_hides_keys() -> None:
    """Compared with a count query by query, in a model where every other layer has a sliding window."""
    gemma = replace(shape_of("Llama-3.1-8B"), layers=4, sliding_window=6, sliding_layers=(0, 2))
    lengths = Lengths(np.array([3, 2]), np.array([4, 2]), np.array([5, 1]), np.array([0, 9]), source="")
    for i, visible in enumerate(lengths.visible(gemma)):
        s, c, r = lengths.shared[i], lengths.chosen_tail[i], lengths.rejected_tail[i]
        queries = [*range(1, s + c + 1), *range(s + 1, s + r + 1)]
        assert visible == (sum(queries) + sum(min(seen, 6) for seen in queries)) // 2
