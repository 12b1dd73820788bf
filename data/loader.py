"""Batches from a token stream: fixed windows in a seeded order, with one integer as the only state.

Window w covers tokens [w*T, (w+1)*T] inclusive, T = seq_len: T inputs and T targets, so neighbours
share one token and each token but the first is a target once an epoch. `position` is the number of
sequences that the whole job has consumed.
"""

from collections import OrderedDict

import numpy as np

from data.errors import InputError
from data.shards import TokenStream


class WindowLoader:
    """Windows of `stream` in the endless sequence of shuffled epochs.

    Raises InputError where the stream is shorter than one window (seq_len + 1 tokens).
    """

    def __init__(self, stream: TokenStream, seq_len: int, seed: int):
        if seq_len < 1:
            raise InputError(f"seq_len is {seq_len}; allowed is 1 or more")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed is {seed}; allowed is 0 to 2**32 - 1")
        self.stream = stream
        self.seq_len = seq_len
        self.seed = seed
        self.num_windows = (len(stream) - 1) // seq_len
        if self.num_windows < 1:
            raise InputError(
                f"the split has {len(stream)} tokens, one window of seq_len {seq_len} needs "
                f"{seq_len + 1}: use a shorter seq_len or more text"
            )
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def batch(self, position: int, count: int) -> np.ndarray:
        """Sequences position .. position + count, int64 (count, seq_len + 1).

        They may cross an epoch's border.
        """
        windows = self.window_ids(position, count)
        out = np.empty((count, self.seq_len + 1), dtype=np.int64)
        for row, window in zip(out, windows, strict=True):
            row[:] = self.stream.read(int(window) * self.seq_len, self.seq_len + 1)
        return out

    def window_ids(self, position: int, count: int) -> np.ndarray:
        """The windows behind `batch(position, count)`, int64 (count,)."""
        if position < 0 or count < 0:
            raise ValueError(f"position {position} and count {count} must not be negative")
        ids = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, start = divmod(position + done, self.num_windows)
            part = self._order(epoch)[start : start + count - done]
            ids[done : done + len(part)] = part
            done += len(part)
        return ids

    def _order(self, epoch: int) -> np.ndarray:
        """Permutation of the windows for one epoch; two are kept, for a batch that crosses."""
        if epoch in self._orders:
            self._orders.move_to_end(epoch)
        else:
            if len(self._orders) == 2:
                self._orders.popitem(last=False)
            self._orders[epoch] = _permutation(self.num_windows, self.seed, epoch)
        return self._orders[epoch]


def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """Seeded permutation of range(length), uint32 where that is wide enough (4 bytes a window)."""
    # RandomState, not Generator: NumPy froze RandomState's stream (NEP 19), so the order of a run
    # that resumes in years is the order it began with. Generator may change between NumPy releases.
    order = np.arange(length, dtype=np.uint32 if length <= 2**32 else np.uint64)
    np.random.RandomState([seed, epoch]).shuffle(order)
    return order


def rank_slice(
    step: int, global_batch_size: int, world_size: int, rank: int, accumulation: int
) -> list[tuple[int, int]]:
    """What one rank reads in one step: a (position, count) for each micro-step.

    Micro-step a of rank r reads m sequences from step*G + a*m*W + r*m, m = G / (W * accumulation).
    Over all ranks and micro-steps that is exactly [step*G, (step+1)*G), so the data of a step does
    not depend on the number of ranks. Raises InputError where G does not divide.
    """
    parts = world_size * accumulation
    if parts < 1 or global_batch_size < 1 or global_batch_size % parts:
        raise InputError(
            f"global_batch_size {global_batch_size} is not a multiple of world size {world_size} "
            f"times accumulation {accumulation}"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0 .. {world_size - 1}")
    micro = global_batch_size // parts
    first = step * global_batch_size + rank * micro
    return [(first + a * micro * world_size, micro) for a in range(accumulation)]
