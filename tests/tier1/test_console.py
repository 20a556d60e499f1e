"""What is said while work is going on, and where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from finetune.core import console


@pytest.fixture(autouse=True)
def _auto_mode() -> Iterator[None]:
    console.set_mode("auto")
    yield
    console.set_mode("auto")


class Clock:
    """Stands in for time.monotonic: `now` moves when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def _train(clock: Clock, steps: int, seconds_per_step: float) -> None:
    with console.progress(steps, "train") as bar:
        for step in range(1, steps + 1):
            clock.now += seconds_per_step
            bar.update(step, loss=2.0 / step, tokens_per_second=312.4)


def test_everything_said_goes_to_stderr(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    console.say("a note")
    _train(clock, 5, 30.0)

    out, err = capsys.readouterr()
    assert out == ""
    assert "a note" in err
    assert "train: 5/5" in err


def test_quick_work_without_a_terminal_takes_two_lines(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    _train(clock, 100, 0.01)

    lines = capsys.readouterr().err.splitlines()
    assert lines == ["train: 100 steps", "train: 100/100, loss 0.02, 312 tok/s, took 1.0 s"]


def test_lines_are_ten_percent_apart(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    _train(clock, 100, 2.0)  # 10 % every 20 seconds

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[1] == "train: 10/100, loss 0.2, 312 tok/s, 3 min 00 s left"


def test_lines_are_ten_seconds_apart(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    _train(clock, 100, 0.5)  # 10 % every 5 seconds

    assert len(capsys.readouterr().err.splitlines()) == 6


def test_slow_work_is_never_silent_for_long(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    _train(clock, 1000, 30.0)

    assert len(capsys.readouterr().err.splitlines()) == 1 + 499 + 1


def test_silent_shows_nothing(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    console.set_mode("silent")
    console.say("a note")
    _train(clock, 10, 100.0)

    assert capsys.readouterr() == ("", "")


def test_interrupted_work_says_how_far_it_came(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    def work() -> None:
        with console.progress(10, "train") as bar:
            bar.update(3, loss=1.5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()

    assert capsys.readouterr().err.splitlines()[-1].startswith("train: 3/10, loss 1.5, took")


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    with console.progress(4, "train [lora]") as bar:
        bar.update(2, loss=1.25, tokens_per_second=1234.0, margin=None)

    shown = stream.getvalue()
    assert "train [lora]" in shown
    assert "loss 1.25, 1,234 tok/s" in shown
    assert "2/4" in shown
    assert "left" in shown
    assert "margin" not in shown


def test_secrets_are_not_said(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("using hf_abcdefghijklmnopqrstuv")

    assert capsys.readouterr().err == "using ***\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2 s"), (59.97, "1 min 00 s"), (185.0, "3 min 05 s"), (7800.0, "2 h 10 min")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_numbers_that_are_not_known_are_left_out() -> None:
    numbers: dict[str, Any] = {"loss": 0.123456, "grad_norm": None, "tokens_per_second": 99.6}

    assert console.numbers_text(numbers) == ", loss 0.1235, 100 tok/s"
