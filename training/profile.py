"""A trace of some steps: train.py --profile 20-22."""

import re
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from data.errors import InputError


def parse_steps(text: str, max_steps: int) -> tuple[int, int]:
    """ "20-22" or "20" -> the first and last step to profile, counted from 1. InputError."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last <= max_steps:
        raise InputError(
            f"--profile: {text!r}; allowed is a step or a range such as 20-22, from 1 to "
            f"training.max_steps {max_steps}"
        )
    return first, last


class Profiler:
    """torch's profiler around the chosen steps; every rank writes what it saw.

    RUN/profile/steps-20-22-rank0.json.gz opens in Perfetto (ui.perfetto.dev) or chrome://tracing,
    the .txt beside it lists the operators by time.
    """

    def __init__(
        self, steps: tuple[int, int] | None, run_dir: Path, rank: int, device: torch.device
    ) -> None:
        self.steps, self.device = steps, device
        self.active: profile | None = None
        if steps is not None:
            name = f"steps-{steps[0]}-{steps[1]}-rank{rank}.json.gz"
            self.path = run_dir / "profile" / name

    def before(self, step: int) -> bool:
        """Called before each step, counted from 1; whether it is traced."""
        if self.steps and not self.active and self.steps[0] <= step <= self.steps[1]:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.active = profile(activities=activities, record_shapes=True)
            self.active.start()
        return self.active is not None

    def ends(self, step: int, stopping: bool) -> bool:
        """Whether the trace ends with this step. stopping: no step follows."""
        if self.active is None or self.steps is None:
            return False
        return stopping or step >= self.steps[1]

    def write(self) -> Path:
        """Ends the trace and writes it, which takes seconds; the file."""
        assert self.active is not None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.active.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.active.export_chrome_trace(str(self.path))
        by = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = self.active.key_averages().table(sort_by=by, row_limit=60)
        self.path.with_suffix("").with_suffix(".txt").write_text(table + "\n")
        self.active, self.steps = None, None
        return self.path
