"""Stopping on a signal: every rank leaves after the same step, with a checkpoint."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from training import distributed

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """Remembers SIGTERM, SIGINT or SIGUSR1; a second SIGINT ends the process at once.

    The handler only sets a flag: launchers signal the ranks seconds apart, so a rank that saved
    right away would wait in a collective for ranks that are still training.
    """

    def __init__(self) -> None:
        self.received: set[int] = set()
        # A group on gloo, so that asking every rank each step does not wait for the GPU.
        self.group = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None
        for number in STOPPING:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: FrameType | None) -> None:
        # A launcher may send a SIGTERM of its own between the two.
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.add(number)

    def over_ranks(self, *values: int) -> tuple[bool, list[int]]:
        """Whether any rank has been signalled, and the largest of each value over the ranks; every
        rank calls it after each step.
        """
        mine = torch.tensor([int(bool(self.received)), *values])
        if self.group is not None:
            dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self.group)
        signalled, *largest = mine.tolist()
        return bool(signalled), largest
