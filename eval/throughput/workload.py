"""What the modes have in common: random tokens, the clock, the plain model."""

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from model import Transformer, init_weights
from model.execution import Plan
from training import distributed
from training.config import RunConfig
from training.execution import apply_execution

Round = dict[str, float]


class Workload(Protocol):
    """One side, built and ready to be timed.

    Attributes:
        plan: What its execution came to.
        tokens_per_step: Tokens of a step, over all ranks.
    """

    plan: Plan
    tokens_per_step: int

    def round(self, steps: int) -> Round:
        """Makes so many steps; seconds of one, at least under "seconds_per_step"."""

    def loss(self) -> float:
        """The last loss in nats a token; where there is none, 0.0 if the last logits are finite and
        nan if not.
        """

    def close(self) -> None:
        """Lets go of what would keep memory."""


def random_tokens(
    seed: int, index: int, shape: tuple[int, int], below: int, device: torch.device
) -> Tensor:
    """Token ids 0 .. below - 1, int64 of that shape, a function of seed, rank and index alone."""
    generator = torch.Generator().manual_seed(
        (seed * 65_537 + distributed.rank()) * 1_000_003 + index
    )
    return torch.randint(0, below, shape, generator=generator).to(device)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], None], steps: int, device: torch.device) -> Round:
    """Seconds of a step, the mean of `steps` in a row with one wait for the device at the end."""
    wait(device)
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return {"seconds_per_step": (time.perf_counter() - begun) / steps}


def plain_model(run: RunConfig, device: torch.device) -> tuple[Transformer, Plan]:
    """The model with its initial weights in the run's precision, as evaluation has it."""
    model = Transformer(run.model)
    init_weights(model, run.training.seed)
    dtype = run.training.torch_dtype
    model = model.to(device, dtype).eval()
    return model, apply_execution(model, run.execution, device, dtype, training=False)
