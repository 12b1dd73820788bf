"""The learning rate against torch's and transformers' schedulers and by its properties."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from training.config import TrainingConfig
from training.schedule import learning_rate

PEAK, STEPS = 4e-3, 200


def config(**changes: Any) -> TrainingConfig:
    base = {
        "run_dir": "runs/x",
        "max_steps": STEPS,
        "global_batch_size": 8,
        "seq_len": 32,
        "learning_rate": PEAK,
        "warmup_steps": 20,
    }
    return TrainingConfig(**(base | changes))


def rates(run: TrainingConfig) -> list[float]:
    return [learning_rate(run, step) for step in range(run.max_steps)]


def scheduled(count: int, make: Callable[[torch.optim.Optimizer], Any]) -> list[float]:
    """The rates of `count` steps under a scheduler of torch's kind."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, seen = make(optimizer), []
    for _ in range(count):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


SHAPES = [
    {"schedule": "cosine"},
    {"schedule": "cosine", "min_learning_rate": PEAK / 10},
    {"schedule": "linear"},
    {"schedule": "linear", "min_learning_rate": PEAK / 10},
    {"schedule": "wsd", "decay_steps": 50},
    {"schedule": "wsd", "decay_steps": 50, "min_learning_rate": PEAK / 10},
    {"schedule": "constant"},
]
shapes = pytest.mark.parametrize("changes", SHAPES, ids=lambda c: "-".join(map(str, c.values())))


@shapes
@pytest.mark.parametrize("warmup", [1, 2, 20, STEPS])
def test_warm_up_is_linear_and_ends_at_the_peak(changes, warmup):
    if "decay_steps" in changes and warmup == STEPS:
        changes = changes | {"decay_steps": 0}
    run = config(warmup_steps=warmup, **changes)
    expected = [PEAK * (step + 1) / warmup for step in range(warmup)]
    assert rates(run)[:warmup] == pytest.approx(expected, rel=1e-12)
    assert learning_rate(run, warmup - 1) == pytest.approx(PEAK, rel=1e-12)


@shapes
def test_without_warm_up_the_first_step_has_the_peak(changes):
    assert learning_rate(config(warmup_steps=0, **changes), 0) == PEAK


@pytest.mark.parametrize(
    ("schedule", "oracle"),
    [
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
    ],
)
@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_transformers_schedules(schedule, oracle, warmup):
    """The same from the end of warm-up on. Theirs starts the warm-up at 0, so its first optimizer
    step does nothing; ours is one step ahead there.
    """
    theirs = scheduled(STEPS, lambda o: oracle(o, warmup, STEPS))
    ours = rates(config(schedule=schedule, warmup_steps=warmup))
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-9, abs=1e-15)
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1], rel=1e-9)


@pytest.mark.parametrize("low", [0.0, PEAK / 10, PEAK])
def test_torchs_cosine_annealing(low):
    ours = rates(config(min_learning_rate=low))[20:]
    theirs = scheduled(180, lambda o: lr_scheduler.CosineAnnealingLR(o, 180, eta_min=low))
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("low", [0.0, PEAK / 10, PEAK])
def test_torchs_linear_decay(low):
    ours = rates(config(schedule="linear", min_learning_rate=low))[20:]
    theirs = scheduled(180, lambda o: lr_scheduler.LinearLR(o, 1.0, low / PEAK, 180))
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("low", [0.0, PEAK / 10])
@pytest.mark.parametrize("decay", [1, 50, 180])
def test_wsd_is_constant_and_then_linear(low, decay):
    ours = rates(config(schedule="wsd", decay_steps=decay, min_learning_rate=low))[20:]
    assert ours[: 180 - decay] == [PEAK] * (180 - decay)
    theirs = scheduled(decay, lambda o: lr_scheduler.LinearLR(o, 1.0, low / PEAK, decay))
    assert ours[180 - decay :] == pytest.approx(theirs, rel=1e-9, abs=1e-15)


def test_wsd_without_decay_is_constant():
    assert rates(config(schedule="wsd")) == rates(config(schedule="constant"))


def test_wsd_decays_no_earlier_than_warm_up_ends():
    ours = rates(config(schedule="wsd", decay_steps=STEPS))
    assert ours == pytest.approx(rates(config(schedule="linear")), rel=1e-12)


def test_constant_stays_at_the_peak():
    assert set(rates(config(schedule="constant"))[19:]) == {PEAK}


@shapes
def test_no_step_jumps(changes):
    """Between two steps the rate moves by no more than the steepest slope of its formula."""
    run = config(**changes)
    ours, low = rates(run), run.min_learning_rate
    decay = changes.get("decay_steps", 180)
    limit = max(PEAK / 20, math.pi / 2 * (PEAK - low) / decay)
    assert max(abs(b - a) for a, b in itertools.pairwise(ours)) <= limit * (1 + 1e-9)


@shapes
def test_it_rises_to_the_peak_and_never_again(changes):
    ours = rates(config(**changes))
    assert ours[:20] == sorted(ours[:20])
    assert ours[19:] == sorted(ours[19:], reverse=True)
    assert max(ours) == pytest.approx(PEAK, rel=1e-12)


@pytest.mark.parametrize("changes", [c for c in SHAPES if c["schedule"] != "constant"])
def test_the_end_is_the_minimum(changes):
    """max_steps is the step after the last, and every later one, and has exactly the minimum."""
    run = config(**changes)
    for step in (STEPS, STEPS + 1, 10 * STEPS):
        assert learning_rate(run, step) == pytest.approx(run.min_learning_rate, abs=1e-15)
    assert learning_rate(run, STEPS - 1) > run.min_learning_rate


@shapes
def test_it_depends_on_the_step_alone(changes):
    """Asked in any order, as after a resume, the answers are the same."""
    run = config(**changes)
    forward = rates(run)
    assert [learning_rate(run, s) for s in reversed(range(STEPS))] == forward[::-1]


@shapes
def test_a_run_shorter_than_its_warm_up_only_warms_up(changes):
    """As when max_steps is cut for a trial."""
    run = config(warmup_steps=20, max_steps=5, **changes)
    assert rates(run) == pytest.approx([PEAK * (step + 1) / 20 for step in range(5)], rel=1e-12)
