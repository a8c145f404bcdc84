"""The lines of long tasks in a log, on a clock of the test."""

import logging

import pytest

from megatron_spo import meter
from megatron_spo.meter import BYTES, Meter, duration, number


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the meter sees, in its only entry."""
    now = [1000.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(meter.sys.stderr, "isatty", lambda: False, raising=False)
    return now


def test_one_line_a_minute(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Meter("reference pass over train", 60_000, "pairs", done=12_000) as shown:
        for _ in range(240):  # one second and 200 pairs each
            clock[0] += 1
            shown.advance(200)
    lines = [record.message for record in caplog.records]
    assert lines == [
        "reference pass over train: 14,000/60,000 pairs  200 pairs/s  left 4 min",
        "reference pass over train: 26,000/60,000 pairs  200 pairs/s  left 3 min",
        "reference pass over train: 38,000/60,000 pairs  200 pairs/s  left 2 min",
        "reference pass over train: 50,000/60,000 pairs  200 pairs/s  left 50 s",
        "reference pass over train: 60,000/60,000 pairs  200 pairs/s  done in 4 min",
    ]


def test_a_short_task_and_a_hidden_one_log_nothing(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for seconds, shown in ((5.0, True), (500.0, False)):
        with Meter("loading the model", 2, "parts", shown=shown) as one:
            one.advance()
            clock[0] += seconds
            one.advance()
    assert not caplog.records


def test_bytes(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(KeyError), Meter("converting to hf", 140_000_000_000, BYTES) as shown:
        clock[0] += 20
        shown.advance(5_000_000_000)
        raise KeyError
    assert [record.message for record in caplog.records] == ["converting to hf: 5.0/140.0 GB  0.25 GB/s  left 9 min"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (89, "89 s"), (91, "2 min"), (5000, "83 min"), (7200, "2.0 h"), (200_000, "2.3 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.0123, "0.012"), (2.84, "2.8"), (36.4, "36"), (867.3, "867"), (12_431, "12,400")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text
