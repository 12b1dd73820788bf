"""The tokens of a rank's micro-batches, each read in a thread while the one before is computed."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from data.errors import InputError
from data.loader import WindowLoader, rank_slice
from training import distributed
from training.clock import StepClock
from training.config import RunConfig


class Batches:
    """Micro-batches of a rank in the order of the steps, from any step on.

    What is read is a function of step and rank alone (data/loader.py), so reading ahead changes
    nothing but the time.
    """

    def __init__(
        self,
        run: RunConfig,
        loader: WindowLoader,
        device: torch.device,
        accumulation: int,
        first_step: int,
    ) -> None:
        self.loader, self.device, self.vocab_size = loader, device, run.model.vocab_size
        batch = run.training.global_batch_size
        rank, world_size = distributed.rank(), distributed.world_size()
        self.slices = (
            place
            for step in range(first_step, run.training.max_steps)
            for place in rank_slice(step, batch, world_size, rank, accumulation)
        )
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.ahead: Future[Tensor] | None = self._read_next()

    def _read_next(self) -> Future[Tensor] | None:
        place = next(self.slices, None)
        return self.reader.submit(self._read, *place) if place is not None else None

    def _read(self, position: int, count: int) -> Tensor:
        tokens = torch.from_numpy(self.loader.batch(position, count))
        if int(tokens.max()) >= self.vocab_size:  # on the GPU it would be an assertion
            raise InputError(
                f"holds token id {int(tokens.max())}; model.vocab_size is {self.vocab_size}"
            )
        # Only from pinned memory is the copy to a GPU one that nobody waits for.
        return tokens.pin_memory() if self.device.type == "cuda" else tokens

    def next(self, clock: StepClock) -> Tensor:
        """The next micro-batch, int64 (count, seq_len + 1) on the device."""
        assert self.ahead is not None, "no step is left"
        with clock.phase("data"):
            try:
                tokens = self.ahead.result()
            except (InputError, OSError) as error:
                found = InputError(f"training data: {error}")
                found.any_rank = True  # only this rank read it
                raise found from error
        self.ahead = self._read_next()
        return tokens.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Ends the thread."""
        self.reader.shutdown(cancel_futures=True)
