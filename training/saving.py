"""Writing checkpoints: aside, complete or not at all, in the background of the training."""

import dataclasses
import errno
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from data.errors import InputError
from data.shards import sha256_file
from data.tokenizer import Tokenizer
from data.writing import flush_to_disk, put_in_place
from model import ModelConfig
from training import checkpoint, distributed, full_state
from training.engine import Engine

Tensors = dict[str, dict[str, Tensor]]  # kind -> name -> whole tensor


@dataclasses.dataclass
class Written:
    """What a save came to.

    Attributes:
        folder: The checkpoint.
        bytes: Size of its files.
        seconds: From the beginning of the save to its end.
        blocked_seconds: The part of it for which training waited.
    """

    folder: Path
    bytes: int
    seconds: float
    blocked_seconds: float


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Every rank takes part in gathering the state in the host memory of rank 0, while training
    waits. Rank 0 then writes the files: in a thread if `in_background`, else at once.
    """

    def __init__(
        self,
        engine: Engine,
        run_dir: Path,
        tokenizer: Tokenizer,
        *,
        keep: int | None,
        keep_every: int | None,
        in_background: bool,
    ) -> None:
        self.engine, self.run_dir, self.tokenizer = engine, run_dir, tokenizer
        self.keep, self.keep_every, self.in_background = keep, keep_every, in_background
        self.folder = run_dir / "checkpoints"
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.written: Written | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Writes the checkpoint of `state["step"]`, or begins to; every rank calls it.

        InputError on every rank where rank 0 cannot write it, or the one before it, for example
        because the disk is full: what was begun is removed and earlier checkpoints stay.
        """
        started = time.perf_counter()
        self.finish()
        self.folder = self.run_dir / "checkpoints" / f"step-{state['step']:08d}"
        aside = self.folder.with_name(self.folder.name + ".partial")
        with self._agreed() as first:
            if first:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
                flush_to_disk(self.run_dir)  # the name of checkpoints/, the first time
                _require_space(self.engine.run.model, aside)
        tensors: Tensors = {kind: {} for kind in full_state.KINDS}
        for kind, name, value in full_state.gather(self.engine):
            tensors[kind][name] = value
        state = {**state, "optimizer_steps": full_state.steps_taken(self.engine)}
        gathered = time.perf_counter() - started
        if distributed.rank() == 0:
            arguments = (aside, tensors, state, started, gathered)
            self.thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
            self.thread.start()
        if not self.in_background:
            self.finish()

    def _write(
        self, aside: Path, tensors: Tensors, state: dict[str, Any], started: float, gathered: float
    ) -> None:
        """Rank 0's part after the gathering."""
        try:
            size = _write_files(aside, self.engine.run.model, self.tokenizer, tensors, state)
            put_in_place(aside, self.folder)
            checkpoint.prune(self.run_dir, self.keep, self.keep_every)
        except Exception as error:
            self.error = error
            return
        seconds = time.perf_counter() - started
        self.written = Written(
            self.folder, size, seconds, gathered if self.in_background else seconds
        )

    def failed(self) -> bool:
        """Whether the save in the background is known, here, to have failed."""
        return self.error is not None

    def take_written(self) -> Written | None:
        """What was written since the last call; None where nothing was, and on other ranks."""
        found, self.written = self.written, None
        return found

    def finish(self) -> None:
        """Waits for what is being written; every rank calls it. InputError as `save`."""
        with self._agreed() as first:
            if first:
                self.wait()
                error, self.error = self.error, None
                if error is not None:
                    raise error

    def wait(self) -> None:
        """Waits for what is being written, on this rank alone."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    @contextmanager
    def _agreed(self) -> Iterator[bool]:
        """Rank 0's part of a save (True there). Where it fails every rank raises, so that none
        waits for it in a later collective.
        """
        error: Exception | None = None
        try:
            yield distributed.rank() == 0
        except (OSError, SafetensorError) as caught:
            error = caught
            shutil.rmtree(self.folder.with_name(self.folder.name + ".partial"), ignore_errors=True)
        failed = torch.tensor(float(error is not None), device=distributed.collective_device())
        if distributed.sum_over_ranks(failed).item():
            text = "rank 0 failed" if error is None else " ".join(str(error).split())
            raise InputError(
                f"{self.folder}: the checkpoint could not be written ({text}); free space and "
                "start again: the run goes on from the checkpoint before it"
            ) from error


def _require_space(model: ModelConfig, aside: Path) -> None:
    """OSError where the disk has no room, before anything is written."""
    needed = model.num_parameters() * 4 * len(full_state.KINDS)
    free = shutil.disk_usage(aside).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"no space left: {needed:,} bytes are needed, {free:,} are free"
        )


def _write_files(
    aside: Path,
    model: ModelConfig,
    tokenizer: Tokenizer,
    tensors: Tensors,
    state: dict[str, Any],
) -> int:
    """Writes and flushes all files of a checkpoint; their size in bytes."""
    model.to_json(aside / "model.json")
    shutil.copyfile(tokenizer.path, aside / "tokenizer.model")
    safetensors.torch.save_file(tensors["weight"], aside / "model.safetensors")
    moments = {
        f"{kind}.{name}": value
        for kind in full_state.MOMENTS
        for name, value in tensors[kind].items()
    }
    safetensors.torch.save_file(moments, aside / "optimizer.safetensors")
    listed, total = {}, 0
    for path in sorted(aside.iterdir()):
        flush_to_disk(path)
        size = path.stat().st_size
        listed[path.name] = {"bytes": size, "sha256": sha256_file(path)}
        total += size
    checkpoint.write_state(
        aside, {"format_version": checkpoint.FORMAT_VERSION, **state, "files": listed}
    )
    flush_to_disk(aside / "checkpoint.json")
    flush_to_disk(aside)  # the folder: its names
    return total
