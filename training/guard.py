"""Stopping a run whose loss or gradient is not finite for too many steps in a row."""

import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import InputError
from data.loader import WindowLoader, rank_slice
from training import distributed
from training.run_dir import write_json

LAST = 8  # losses that the message shows


class Guard:
    """Remembers what the message will say. A step whose loss or gradient is not finite on any rank
    is left out on all (training/engine.py); this counts no steps itself and waits for no device.
    """

    def __init__(self, limit: int | None, batch: int, accumulation: int) -> None:
        self.limit, self.batch, self.accumulation = limit, batch, accumulation
        self.losses: deque[Tensor] = deque(maxlen=LAST)

    def remember(self, losses: Tensor) -> None:
        """The losses of a step's micro-batches on this rank, (accumulation,)."""
        self.losses.append(losses)

    def stop(
        self, done: int, skipped: int, rate: float, loader: WindowLoader, run_dir: Path
    ) -> InputError:
        """The error that ends the run after step `done`; every rank calls it: collective.

        Writes run_dir/not_finite.json with the sequences and documents of the last step.
        """
        world, rank = distributed.world_size(), distributed.rank()
        mine = torch.stack(list(self.losses)).double()  # (steps, accumulation)
        every = torch.zeros(world, *mine.shape, dtype=torch.float64, device=mine.device)
        every[rank] = mine
        every = distributed.sum_over_ranks(every).cpu()  # (ranks, steps, accumulation)
        last = [float(loss) for loss in every.mean(dim=(0, 2))]
        bad = [
            (r, a)
            for r in range(world)
            for a in range(self.accumulation)
            if not math.isfinite(every[r, -1, a])
        ]
        read = sorted(
            rank_slice(done - 1, self.batch, world, r, self.accumulation)[a]
            for r, a in (bad or [(r, a) for r in range(world) for a in range(self.accumulation)])
        )
        found = _read_by(loader, read)
        details = {
            "step": done,
            "skipped_in_a_row": skipped,
            "learning_rate": rate,
            "last_losses": [loss if math.isfinite(loss) else None for loss in last],
            "loss_is_finite": not bad,
            "sequences": found,
        }
        if rank == 0:
            write_json(run_dir / "not_finite.json", details)
        spans = [one["documents"] for one in found]
        ids = sorted({i for first, last in spans for i in range(first, last + 1)})
        what = "a loss was not finite" if bad else "losses were finite, the gradient was not"
        return InputError(
            f"training stopped after step {done}: {skipped} steps in a row were left out, their "
            f"loss or gradient was not finite; learning rate {rate:.3g}; last losses "
            f"{', '.join(f'{loss:.4g}' for loss in last)}; in step {done} {what}, in documents "
            f"{_listed(ids)} of the training split ({run_dir / 'not_finite.json'} has all); lower "
            "training.learning_rate, or begin a new run_dir with training.resume from an earlier "
            "checkpoint"
        )


def _read_by(loader: WindowLoader, slices: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Each sequence of the slices: its place in the order, its first token in the stream, and the
    first and last document that it has a part of.
    """
    starts = loader.stream.document_starts()
    found = []
    for position, count in slices:
        for offset, window in enumerate(loader.window_ids(position, count)):
            first = int(window) * loader.seq_len
            ends = np.array([first, first + loader.seq_len])
            documents = np.searchsorted(starts, ends, side="right") - 1
            found.append(
                {
                    "position": position + offset,
                    "first_token": first,
                    "documents": [int(documents[0]), int(documents[1])],
                }
            )
    return found


def _listed(ids: list[int], most: int = 12) -> str:
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(map(str, ids[:most])) + more
