"""Progress says what is so: the loss of now, the time left, plain lines where nobody sees a bar."""

from __future__ import annotations

import io

import pytest

from statewright.cli import progress
from statewright.cli.progress import MovingAverage, TrainingBar, _minutes
from statewright.cli.show import console


def run(bar: TrainingBar, losses: list[float], first: int = 1) -> None:
    with bar:
        for step, loss in enumerate(losses, first):
            bar({"event": "step", "step": step, "loss": loss, "tokens_per_second": 12_345.6})


def test_the_average_is_that_of_what_came() -> None:
    values = [5.0, 4.5, 4.0, 3.5, 3.0]
    weights = [0.9**i for i in range(5)]
    want = sum(w * v for w, v in zip(weights, reversed(values))) / sum(weights)
    average = MovingAverage(0.9)
    found = [average.add(value) for value in values]
    assert found[0] == pytest.approx(5.0) and found[-1] == pytest.approx(want)


def test_a_file_gets_lines_and_no_bar(monkeypatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    to = console(file=io.StringIO())
    bar = TrainingBar(to, num_steps=9)
    run(bar, [6.0, *[3.25] * 8])
    bar({"event": "held_out", "step": 9, "nats": 3.1})
    lines = to.file.getvalue().splitlines()
    # 4 s a step: the first, every third, and the last; the first loss no longer rules the mean.
    assert [line.split()[1] for line in lines] == ["1", "4", "7", "9", "9"]
    assert lines[0] == "step 1 of 9  loss 6.000  12,346 tokens/s  0:32 left"
    assert lines[1].endswith("0:20 left") and lines[3].endswith("0:00 left")
    assert float(lines[3].split()[5]) < 3.5 and lines[4] == "step 9 of 9  held-out 3.100"


def test_a_resumed_run_counts_its_own_steps(monkeypatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    to = console(file=io.StringIO())
    run(TrainingBar(to, num_steps=102, done=100), [3.0, 3.0], first=101)
    lines = to.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["101", "102"] and "0:04 left" in lines[0]


def test_a_terminal_gets_a_bar() -> None:
    to = console(file=io.StringIO(), force_terminal=True, width=120)
    run(TrainingBar(to, num_steps=3), [6.0, 4.0, 3.0])
    text = to.file.getvalue()
    assert "tokens/s" in text and "3/3" in text and "step 1 of 3" not in text


def test_times() -> None:
    found = [_minutes(seconds) for seconds in (0, 59.6, 75, 3600, 7265)]
    assert found == ["0:00", "1:00", "1:15", "1:00:00", "2:01:05"]
