"""What a process remembers of its signals."""

import os
import signal
from collections.abc import Iterator

import pytest

from training.signals import STOPPING, StopSignal


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[StopSignal]:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield StopSignal()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
def test_each_stops_after_the_step(stop: StopSignal, number: signal.Signals):
    assert stop.over_ranks(0, 7) == (False, [0, 7])
    os.kill(os.getpid(), number)
    assert stop.over_ranks(1, 0) == (True, [1, 0])


@pytest.mark.parametrize("between", [[], [signal.SIGTERM], [signal.SIGUSR1, signal.SIGTERM]])
def test_the_second_ctrl_c_quits_whatever_came_between(
    stop: StopSignal, between: list[signal.Signals]
):
    for number in [signal.SIGINT, *between]:
        os.kill(os.getpid(), number)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_does_not_quit(stop: StopSignal):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.over_ranks()[0]
