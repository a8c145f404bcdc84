"""MFU is reckoned by what a step needs."""

import numpy as np
import pytest

from megatron_spo.config.schema import Config
from megatron_spo.planner.gpus import GPUS
from megatron_spo.planner.presets import shape_of
from megatron_spo.planner.rows import assumed_lengths
from megatron_spo.planner.utilisation import Utilisation, peak_of
from tests.planner.counted import CONFIG


def test_peaks_go_by_the_names_of_drivers() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3", fp8=False) == GPUS["h100"].bf16
    assert peak_of("NVIDIA H200", fp8=True) == GPUS["h200"].fp8
    assert peak_of("NVIDIA A100-SXM4-80GB", fp8=False) == GPUS["a100"].bf16
    for other in ("cpu", "NVIDIA H100 PCIe", "NVIDIA GB200", "NVIDIA GeForce RTX 4090"):
        assert peak_of(other, fp8=False) is None


def test_seconds_at_peak() -> None:
    """Six operations per weight and token, but no weight of the embedding, and little for attention; batches add up."""
    shape, lengths = shape_of("Llama-3.1-8B"), assumed_lengths(60, 120, 1000, 2048)
    ideal = Utilisation(Config.model_validate(CONFIG), shape, {"train": lengths}, peak=1e15)
    first, rest = np.arange(300), np.arange(300, 1000)
    whole = ideal.seconds("train", np.arange(1000))
    assert whole == pytest.approx(ideal.seconds("train", first) + ideal.seconds("train", rest))
    layers = shape.layers * (shape.attention_weights + 3 * shape.hidden * shape.active_ffn)
    tokens, scored = lengths.tokens.sum(), lengths.entries.sum()
    assert whole * 1e15 == pytest.approx(6 * (tokens * layers + scored * shape.hidden * shape.vocab), rel=0.02)
