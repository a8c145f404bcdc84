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


class LateEvent:
    """An event of a GPU whose stream is 50 ms behind the process."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.moment = time.perf_counter() + 0.05

    def query(self) -> bool:
        return time.perf_counter() >= self.moment

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.moment - time.perf_counter()))

    def elapsed_time(self, end: "LateEvent") -> float:
        assert self.query() and end.query()
        return (end.moment - self.moment) * 1000


def test_what_a_gpu_has_still_to_do_is_of_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    clock = Clock(torch.device("cuda"))
    for seconds in (0.01, 0.04):
        clock.start()
        with clock.phase("optimizer"):
            time.sleep(seconds)
        found = clock.read()
        assert seconds <= found["seconds/optimizer"] < seconds + 0.5
        assert found["seconds"] >= seconds + 0.05
        time.sleep(0.06)  # by now the GPU is done
