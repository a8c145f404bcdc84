"""Each second of a step is counted once."""

import time

import pytest
import torch

from megatron_spo.runtime.clock import Clock


def test_inner_phases_are_not_the_outer_ones() -> None:
    clock = Clock(torch.device("cpu"))
    with clock.phase("forward_backward"):  # an evaluation before the step
        time.sleep(0.02)
    clock.start()
    with clock.phase("data"):
        time.sleep(0.01)
    with clock.phase("forward_backward"):
        time.sleep(0.01)
        with clock.phase("communication"):
            time.sleep(0.03)
        time.sleep(0.01)
    time.sleep(0.02)
    found = clock.read()
    parts = {name.removeprefix("seconds/"): value for name, value in found.items() if name != "seconds"}
    assert sum(parts.values()) == pytest.approx(found["seconds"], abs=1e-3)
    for name, least in {"data": 0.01, "forward_backward": 0.02, "communication": 0.03, "other": 0.02}.items():
        assert least <= parts[name] < least + 0.5, name
    assert parts["optimizer"] == 0
