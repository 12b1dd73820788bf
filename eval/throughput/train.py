"""Mode train: optimizer steps of the engine of train.py, with all that it does beside the step."""

import torch

from data.errors import InputError
from eval.throughput.workload import Round, random_tokens, wait
from model import Transformer
from training import distributed
from training.clock import PHASES, StepClock
from training.config import RunConfig


class Train:
    """A step is one of training.engine.Engine: forward and backward passes of its micro-batches,
    reduction, clipping, AdamW. The tokens are on the device before a round begins.
    """

    def __init__(self, run: RunConfig, device: torch.device, below: int) -> None:
        from training.engine import Engine  # DeepSpeed takes seconds to import

        self.run, self.device, self.below = run, device, below
        self.engine = Engine(run, device)
        self.plan = self.engine.plan
        self.tokens_per_step = run.training.global_batch_size * run.training.seq_len
        self.clock = StepClock(device, untimed_steps=0)
        self.done = 0
        self.last = torch.full((), torch.nan)

    def round(self, steps: int) -> Round:
        """Seconds of a step, whole and by phase, of the slowest rank."""
        training, count = self.run.training, self.engine.accumulation
        assert training.micro_batch_size is not None
        shape = (training.micro_batch_size, training.seq_len + 1)
        first = self.done * count
        batches = (
            random_tokens(training.seed, first + index, shape, self.below, self.device)
            for index in range(steps * count)
        )
        ready = iter(list(batches))
        wait(self.device)
        distributed.barrier()
        self.clock.restart()
        for _ in range(steps):
            losses, _ = self.engine.train_step(self.done, ready.__next__, self.clock)
            self.clock.step()
            self.done += 1
        found = self.clock.window()
        self.last = losses.mean()
        return _of_the_slowest(found)

    def loss(self) -> float:
        """Of the last step, over all ranks. InputError where steps were left out: those cost less.

        Collective.
        """
        skipped = self.engine.skipped_steps()
        if skipped:
            raise InputError(
                f"{skipped} of {self.done} steps had a gradient that is not finite, and the engine "
                "left them out; there is no speed to compare"
            )
        device = distributed.collective_device()
        total = distributed.sum_over_ranks(self.last.detach().double().to(device))
        return float(total) / distributed.world_size()

    def close(self) -> None:
        """Makes DeepSpeed let go of the engine."""
        self.engine.deepspeed.destroy()
        if self.engine.sharded:
            _forget(self.engine.model)


def _of_the_slowest(found: Round) -> Round:
    """The seconds of the rank whose step took longest, on every rank. Collective."""
    keys = ["seconds_per_step", *(f"{name}_seconds" for name in PHASES if name != "data")]
    device = distributed.collective_device()
    table = torch.zeros(distributed.world_size(), len(keys), dtype=torch.float64, device=device)
    table[distributed.rank()] = torch.tensor([found[key] for key in keys])
    table = distributed.sum_over_ranks(table)
    return dict(zip(keys, table[table[:, 0].argmax()].tolist(), strict=True))


def _forget(model: Transformer) -> None:
    """Takes a model of ZeRO stage 3 out of a list and a cache of DeepSpeed 0.19.8 that would keep
    it, and all of its engine, to the end of the process.
    """
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not model]
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    cached = vars(coordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for inside in cached.__closure__:
        if hasattr(inside.cell_contents, "cache_clear"):
            inside.cell_contents.cache_clear()
