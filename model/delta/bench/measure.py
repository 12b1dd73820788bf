"""Passes in turn, and what they come to."""

import time
from collections.abc import Callable
from typing import Any

from model.delta.bench.cases import Case, Side, check, sides
from training.bench.measure import WARM_UP, measurement, ratio

Row = dict[str, Any]
Clock = Callable[[], float]
Seconds = dict[str, list[float]]
MODES = ("forward", "forward_backward")
BLOCKS = 20  # the bootstrap draws whole blocks: noise lasts longer than a pass
REPEATS = (1, 200)  # rounds of a block, at least and at most
GOAL, LAUNCH_BOUND_GOAL = 1.0, 0.7  # of the time of peft, at most


CLOCKS: dict[str, Clock] = {"cpu": time.process_time, "wall": time.perf_counter}


def in_turn(steps: dict[str, Callable[[], None]], rounds: int, clock: Clock) -> Seconds:
    """Seconds of each call by a clock, in the order A B A B: what drifts meets all sides alike."""
    seconds: Seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begun = clock()
            step()
            seconds[name].append(clock() - begun)
    return seconds


def in_blocks(
    found: dict[str, Side], mode: str, seconds: float, clock: Clock
) -> dict[str, list[list[float]]]:
    """Seconds of a pass of each side, (blocks, rounds of a block), after a warm-up; in all about
    `seconds` of the clock.

    Every round has one pass of each side; each block begins with another side, so that none always
    runs behind the same one.
    """
    steps = {name: getattr(side, mode) for name, side in found.items()}
    in_turn(steps, WARM_UP, clock)
    a_round = sum(sum(one) for one in in_turn(steps, WARM_UP, clock).values()) / WARM_UP
    repeats = int(min(max(seconds / (BLOCKS * a_round), REPEATS[0]), REPEATS[1]))
    names, blocks = list(steps), []
    for block in range(BLOCKS):
        first = block % len(names)
        order = names[first:] + names[:first]
        blocks.append(in_turn({name: steps[name] for name in order}, repeats, clock))
    return {name: [block[name] for block in blocks] for name in names}


def measure_case(case: Case, with_peft: bool, seconds: float, clock: Clock) -> Row:
    """Both modes of a case: rows of measurements and ratios, and the check before them."""
    found = sides(case, with_peft)
    checked = check(case, found)
    measurements, ratios = [], []
    for mode in MODES:
        passes = in_blocks(found, mode, seconds, clock)
        about = {"mode": mode, "kind": case.kind, "d": case.d, "rows": case.rows}
        about |= {"batched": case.batched, "layers": case.layers, "r": case.r}
        for side, values in passes.items():
            row = measurement(
                case.name(), side, [one for block in values for one in block], **about
            )
            measurements.append(row | _a_layer(row, case.layers))
        for side in ("lora", "sora"):
            for other in ("peft lora", "frozen"):
                if other in passes:
                    found_ratio = ratio(
                        case.name(), f"{side} / {other}", passes[side], passes[other]
                    )
                    ratios.append(_judged(found_ratio, case, other) | about)
    return {"checks": [checked], "measurements": measurements, "ratios": ratios}


def _a_layer(row: Row, layers: int) -> Row:
    """Microseconds of a layer, which its case's number of layers makes of a pass."""
    return {
        f"microseconds_a_layer_{name}": row[f"seconds_{name}"] * 1e6 / layers
        for name in ("median", "p10", "p90")
    }


def _judged(found: Row, case: Case, other: str) -> Row:
    """A ratio with its goal, at most; reached: null where the interval has the goal inside. There
    is no goal against frozen layers, to which a delta adds work.
    """
    goal = (LAUNCH_BOUND_GOAL if case.launch_bound else GOAL) if other != "frozen" else None
    reached = None
    if goal is not None and (found["high"] <= goal or found["low"] > goal):
        reached = found["high"] <= goal
    return found | {"goal_at_most": goal, "reached": reached} | {"launch_bound": case.launch_bound}
