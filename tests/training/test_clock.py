"""Seconds of steps: windows, phases, pauses, and what counts in the mean."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import Runs, finish
from training import clock as module
from training.clock import StepClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that is set by hand."""
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: time.now)
    return time


def run_step(clock: StepClock, now: SimpleNamespace, seconds: dict[str, float]) -> None:
    for name, duration in seconds.items():
        if name == "other":
            now.now += duration
            continue
        with clock.phase(name):
            now.now += duration
    clock.step()


def test_a_window_is_the_mean_of_its_steps(now: SimpleNamespace):
    clock = StepClock(torch.device("cpu"), untimed_steps=0)
    run_step(clock, now, {"data": 1, "forward": 2, "backward": 4, "optimizer": 1, "other": 2})
    run_step(clock, now, {"data": 0, "forward": 4, "backward": 8, "optimizer": 3, "other": 1})
    found = clock.window()
    assert found == {
        "seconds_per_step": 13,
        "data_seconds": 0.5,
        "forward_seconds": 3,
        "backward_seconds": 6,
        "optimizer_seconds": 2,
    }
    run_step(clock, now, {"forward": 5})
    assert clock.window()["seconds_per_step"] == 5
    assert clock.mean()["seconds_per_step"] == pytest.approx((26 + 5) / 3)
    assert clock.mean()["steps"] == 3


def test_what_is_paused_is_in_no_window(now: SimpleNamespace):
    clock = StepClock(torch.device("cpu"), untimed_steps=0)
    run_step(clock, now, {"forward": 3})
    with clock.paused():
        now.now += 50
    run_step(clock, now, {"forward": 5})
    assert clock.window()["seconds_per_step"] == 4


def test_a_window_that_ends_in_a_pause_ends_where_it_began(now: SimpleNamespace):
    """As at a stage's end, where a checkpoint is written behind a validation."""
    clock = StepClock(torch.device("cpu"), untimed_steps=0)
    run_step(clock, now, {"forward": 3})
    cpu = module.time.process_time()
    with clock.paused():
        now.now += 50
        while module.time.process_time() < cpu + 0.2:
            pass
        assert clock.window()["seconds_per_step"] == 3
        now.now += 7
    run_step(clock, now, {"forward": 5})
    assert clock.window()["seconds_per_step"] == 5
    assert clock.mean()["seconds_per_step"] == 4
    assert clock.total_cpu_seconds < 0.1


def test_first_steps_are_in_no_mean(now: SimpleNamespace):
    clock = StepClock(torch.device("cpu"), untimed_steps=2)
    run_step(clock, now, {"forward": 100})
    assert clock.window()["seconds_per_step"] == 100, "a window says what it was, always"
    assert clock.mean() is None
    assert not clock.just_warm
    run_step(clock, now, {"forward": 80})
    assert clock.just_warm
    clock.window()
    assert not clock.just_warm
    for _ in range(3):
        run_step(clock, now, {"data": 1, "forward": 1})
    clock.window()
    assert clock.mean()["steps"] == 3
    assert clock.mean()["seconds_per_step"] == 2
    assert clock.mean()["data_seconds"] == 1


def test_a_window_with_an_untimed_step_in_it_does_not_count(now: SimpleNamespace):
    clock = StepClock(torch.device("cpu"), untimed_steps=2)
    for seconds in (100, 100, 1):
        run_step(clock, now, {"forward": seconds})
    clock.window()
    assert clock.mean() is None


COUNTING = """
import sys
sys.argv[0] = "train.py"
import train
from data.errors import run_cli
from training import distributed
from training.clock import StepClock

waits = []
StepClock._wait = lambda self: waits.append(self.steps_done)

end = distributed.leave

def leave(code):
    print("waited after", waits, flush=True)
    end(code)

distributed.leave = leave
run_cli(train.main, leave)
"""


def test_the_loop_waits_for_the_device_at_reports_alone(runs: Runs):
    """On a GPU each of these is a synchronisation: steps 4, 6 and 7 must have none."""
    config = runs.config(
        training__max_steps=8, training__log_every=5, training__untimed_steps=3,
        training__checkpoint_every=0, data__final_split=None,
    )  # fmt: skip
    out, _ = finish(runs.launch([sys.executable, "-c", COUNTING, "--config", str(config)]))
    waits = re.search(r"waited after \[(.*)\]", out)
    assert waits is not None
    # Reports after 1, 5 and 8, the end of the untimed steps at 3, twice around the save after 8.
    assert waits[1] == "1, 3, 5, 8, 8, 8"


def test_a_window_that_is_left_out_does_not_count(now: SimpleNamespace):
    clock = StepClock(torch.device("cpu"), untimed_steps=0)
    run_step(clock, now, {"forward": 100})
    clock.leave_out()
    assert clock.window()["seconds_per_step"] == 100
    run_step(clock, now, {"forward": 2})
    clock.window()
    assert clock.mean()["seconds_per_step"] == 2
