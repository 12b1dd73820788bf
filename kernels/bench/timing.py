"""Clocks, interleaved repeats and their quantiles.

Each repeat of a provider is a forward pass that keeps what its backward pass needs, and right after
it that backward pass. A mark between the two gives all three modes from one run: forward, backward,
and both. A backward pass is so timed on a graph made for it. One graph kept for all repeats
(retain_graph) would forbid compiled code to reuse the buffers of the forward pass, which is not
what training runs; a difference of two medians would mix repeats.

On CUDA the marks are events. Before each repeat the device comes to rest, then writes a buffer of
twice the L2 cache, as many times as the host needs to issue both passes: every provider meets the
same cache, and the launches of small kernels hide behind the writes. The times are thus those of
the device. The host's are reported beside them.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.bench.operations import Tensors

WARM_UP = 3  # rounds
BUFFER_BYTES = 2**28  # at least
REPEATS = (10, 100)  # at least and at most, where seconds decide
SPACER_WRITES = 60  # at most: about 4 ms of an H200


@dataclass
class Sample:
    """Seconds of one repeat; host: what the host took to issue it, None on a CPU."""

    forward: float
    backward: float
    host: float | None = None

    def seconds(self, mode: str) -> float:
        return {
            "forward": self.forward,
            "backward": self.backward,
            "forward_backward": self.forward + self.backward,
        }[mode]


class Timed(Protocol):
    """What a clock measures: inputs.Run, inputs.GraphedRun."""

    def forward(self) -> Tensors: ...

    def backward(self, outputs: Tensors) -> Tensors: ...


class Clock(Protocol):
    """host: seconds that the host needed for this provider the last time."""

    def measure(self, run: Timed, host: float) -> Sample: ...


class CPUClock:
    def measure(self, run: Timed, host: float) -> Sample:
        start = time.perf_counter()
        outputs = run.forward()
        middle = time.perf_counter()
        run.backward(outputs)
        return Sample(middle - start, time.perf_counter() - middle)


class CUDAClock:
    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.empty(max(2 * cache, BUFFER_BYTES), dtype=torch.uint8, device=device)
        self.start, self.middle, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        writes = 10
        for value in range(2):  # the first time warms up
            self.start.record()
            for _ in range(writes):
                self.buffer.fill_(value)
            self.end.record()
            self.end.synchronize()
        self.seconds_a_write = self.start.elapsed_time(self.end) / 1e3 / writes

    def measure(self, run: Timed, host: float) -> Sample:
        torch.cuda.synchronize()
        for value in range(min(1 + math.ceil(host / self.seconds_a_write), SPACER_WRITES)):
            self.buffer.fill_(value)
        begun = time.perf_counter()
        self.start.record()
        outputs = run.forward()
        self.middle.record()
        run.backward(outputs)
        self.end.record()
        host = time.perf_counter() - begun
        self.end.synchronize()
        forward = self.start.elapsed_time(self.middle) / 1e3
        return Sample(forward, self.middle.elapsed_time(self.end) / 1e3, host)


def interleaved(providers: Sequence[str], repeats: int) -> Iterator[tuple[int, int, str]]:
    """(repeat, position, provider) in the order A B C A B C: what drifts meets all alike."""
    for repeat in range(repeats):
        for position, provider in enumerate(providers):
            yield repeat, position, provider


def time_interleaved(
    runs: Mapping[str, Sequence[Timed]],
    clock: Clock,
    repeats: int | None,
    seconds: float,
    on_failure: Callable[[str, Exception], None],
) -> dict[str, list[Sample]]:
    """Samples of each provider, after WARM_UP rounds that do not count; none of one that raises.

    runs: for each provider its runs, one an input set; neighbours in a round use different sets.
    repeats None: as many as fit into `seconds`, within REPEATS.
    """
    alive = dict(runs)
    host = dict.fromkeys(runs, 0.0)

    def rounds(count: int) -> dict[str, list[Sample]]:
        samples: dict[str, list[Sample]] = {name: [] for name in alive}
        for repeat, position, name in interleaved(list(alive), count):
            if name not in alive:
                continue
            sets = alive[name]
            try:
                sample = clock.measure(sets[(repeat + position) % len(sets)], host[name])
            except Exception as error:
                del alive[name]
                on_failure(name, error)
                continue
            host[name] = sample.host or 0.0
            samples[name].append(sample)
        return {name: found for name, found in samples.items() if name in alive}

    rounds(WARM_UP - 1)
    start = time.perf_counter()
    rounds(1)
    if repeats is None:
        fitting = int(seconds / (time.perf_counter() - start))
        repeats = min(max(fitting, REPEATS[0]), REPEATS[1])
    return rounds(repeats)


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in microseconds, linear between the samples."""
    at = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    values = torch.tensor(seconds, dtype=torch.float64).quantile(at) * 1e6
    median, p20, p80 = values.tolist()
    return {"microseconds_median": median, "microseconds_p20": p20, "microseconds_p80": p80}
