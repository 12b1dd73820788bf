"""Where the time of training steps goes, measured without waiting for the device in between."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PHASES = ("data", "forward", "backward", "optimizer")


class StepClock:
    """Seconds of steps and of their phases: of the window since the last report, and of all steps
    that count.

    The first `untimed_steps` steps of a process count in no mean: they compile kernels and fill
    caches. On a GPU phases are measured by events in its stream and read at a report, which waits
    for it anyway; "data" is the time for which the host waits for tokens. Reductions of gradients
    that DeepSpeed does at the end of an accumulation are in "optimizer". CPU seconds are those of
    all threads of the process, which other processes on the machine do not lengthen.
    """

    def __init__(self, device: torch.device, untimed_steps: int) -> None:
        self.device, self.untimed_steps = device, untimed_steps
        self.steps_done = 0
        self.paused_since: tuple[float, float] | None = None
        self.total_steps, self.total_seconds, self.total_cpu_seconds = 0, 0.0, 0.0
        self.totals = dict.fromkeys(PHASES, 0.0)
        self.restart()

    def restart(self) -> None:
        """Begins a window now."""
        self.steps, self.counts = 0, True
        self.phases = dict.fromkeys(PHASES, 0.0)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.started, self.cpu_started = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what runs inside of it as one of PHASES."""
        if self.device.type != "cuda" or name == "data":
            begun = time.perf_counter()
            yield
            self.phases[name] += time.perf_counter() - begun
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self.events.append((name, first, last))

    def step(self) -> None:
        """A step is over."""
        self.steps_done += 1
        self.steps += 1

    def leave_out(self) -> None:
        """The current window is in no mean, for example because its steps are being profiled."""
        self.counts = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside of it, such as a validation, is in no window: for windows that end or
        begin there it is the moment in which the pause began. Pauses do not nest.
        """
        assert self.paused_since is None
        self._wait()
        begun = self.paused_since = self._now()
        try:
            yield
            self._wait()
        finally:
            self.paused_since = None
        now = self._now()
        self.started += now[0] - begun[0]
        self.cpu_started += now[1] - begun[1]

    def _now(self) -> tuple[float, float]:
        """Seconds by the clock and of CPU time; those of the pause's beginning during one."""
        return self.paused_since or (time.perf_counter(), time.process_time())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def window(self) -> dict[str, Any]:
        """Seconds a step since the last call, whole and by phase; begins the next window.

        Waits for the device. A window with an untimed step in it is in no mean.
        """
        self._wait()
        now, cpu_now = self._now()
        seconds = now - self.started
        for name, first, last in self.events:
            self.phases[name] += first.elapsed_time(last) / 1000
        found = {"seconds_per_step": seconds / self.steps}
        found |= {f"{name}_seconds": self.phases[name] / self.steps for name in PHASES}
        if self.counts and self.steps_done - self.steps >= self.untimed_steps:
            self.total_steps += self.steps
            self.total_seconds += seconds
            self.total_cpu_seconds += cpu_now - self.cpu_started
            for name in PHASES:
                self.totals[name] += self.phases[name]
        self.restart()
        return found

    @property
    def just_warm(self) -> bool:
        """Whether the last untimed step is over, so that a window should end here."""
        return self.steps_done == self.untimed_steps and self.steps > 0

    def mean(self) -> dict[str, Any] | None:
        """Seconds a step of all steps that count, whole and by phase; None where there is none."""
        if not self.total_steps:
            return None
        found: dict[str, Any] = {"steps": self.total_steps}
        found["seconds_per_step"] = self.total_seconds / self.total_steps
        return found | {f"{n}_seconds": self.totals[n] / self.total_steps for n in PHASES}
