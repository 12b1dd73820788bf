"""What a run reports: console line, metrics.jsonl and TensorBoard, all the same numbers."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

CONSOLE_SECONDS = 2.0  # a run that logs every step does not flood the console


class Metrics:
    """Rank 0's reports of a run. On other ranks (no run_dir) every method does nothing."""

    def __init__(
        self, run_dir: Path | None, log: logging.Logger, start_step: int, max_steps: int
    ) -> None:
        self.log, self.max_steps = log, max_steps
        self.run_dir = run_dir
        self.last_printed = 0.0
        if run_dir is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._drop_lines_after(start_step)
        self.file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        # No bar where the output is not a terminal.
        self.bar = tqdm(total=max_steps, initial=start_step, unit="step", disable=None, leave=False)

    def _drop_lines_after(self, step: int) -> None:
        """Removes what a run reported after the checkpoint from which this one goes on."""
        assert self.run_dir is not None
        path = self.run_dir / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a run that was killed while it wrote
                continue
            if record["step"] <= step:
                kept.append(line + "\n")
        aside = path.with_name(path.name + ".partial")
        aside.write_text("".join(kept), encoding="utf-8")
        aside.replace(path)

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self.run_dir is not None:
            self.bar.update(step - self.bar.n)

    def record(self, values: dict[str, Any]) -> None:
        """Writes one object to metrics.jsonl and its numbers to TensorBoard."""
        if self.run_dir is None:
            return
        finite = {k: v if _is_finite(v) else None for k, v in values.items()}
        try:
            self.file.write(json.dumps(finite, allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk, which a checkpoint in the background may have met
            raise OSError(error.errno, error.strerror, self.file.name) from None
        for name, value in values.items():
            if isinstance(value, list):  # one number a rank
                for rank, one in enumerate(value):
                    self.board.add_scalar(f"{name}/{rank}", one, values["step"])
            elif isinstance(value, int | float) and name != "step":
                self.board.add_scalar(name, value, values["step"])
        now = time.monotonic()
        important = "validation_loss" in values or values["step"] in (1, self.max_steps)
        if important or now - self.last_printed >= CONSOLE_SECONDS:
            self.last_printed = now
            self.say(console_line(values, self.max_steps))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """TensorBoard alone, for what belongs to no optimizer step."""
        if self.run_dir is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """One line to the log, above the progress bar."""
        if self.run_dir is None:
            return
        with tqdm.external_write_mode():
            self.log.info(text)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self.run_dir is not None:
            self.bar.close()
            self.board.close()
            self.file.close()


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def console_line(values: dict[str, Any], max_steps: int) -> str:
    """The line a person reads: step, loss, lr, norm, speed, MFU, memory, data wait, time left."""
    mfu = f"{values['mfu']:.1%}" if values["mfu"] is not None else "n/a"
    minutes, seconds = divmod(int(values["eta_seconds"]), 60)
    line = (
        f"step {values['step']:>{len(str(max_steps))}}/{max_steps} | loss {values['loss']:.4f} | "
        f"lr {values['lr']:.2e} | norm {values['grad_norm']:.3f} | "
        f"{values['tokens_per_second']:,.0f} tok/s | mfu {mfu} | "
        f"mem {values['peak_memory_bytes'] / 2**30:.2f} GiB | "
        f"data {values['data_wait_share']:.1%} | eta {minutes}:{seconds:02d}"
    )
    if "distillation_loss" in values:
        line += f" | distillation {values['distillation_loss']:.5f}"
    if values["skipped_steps"]:
        line += f" | {values['skipped_steps']} steps skipped: gradient not finite"
    if "validation_loss" in values:
        line += (
            f" | validation loss {values['validation_loss']:.4f}, "
            f"perplexity {values['validation_perplexity']:.2f}, "
            f"{values['validation_bits_per_byte']:.4f} bits/byte"
        )
    return line
