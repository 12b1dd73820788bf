"""Modes evaluate, prefill and decode: forward passes of the model alone, one process."""

import math

import torch
from torch import Tensor

from eval.throughput.workload import Round, plain_model, random_tokens, timed
from model import Transformer
from model.cache import CacheForm, KVCache
from training.config import RunConfig

_CHUNK = 256  # tokens of a forward pass that fills a cache: its logits stay small


def new_cache(model: Transformer, batch: int, capacity: int, form: CacheForm) -> KVCache:
    """An empty cache for generation."""
    weight = model.lm_head.weight
    return KVCache(model.config, batch, capacity, weight.device, weight.dtype, form)


class Inference:
    """What the three have in common. `step` is what is timed; it leaves in `last` a loss, or the
    logits of the last position.
    """

    tokens_per_step: int
    last: Tensor

    def __init__(self, run: RunConfig, device: torch.device, below: int) -> None:
        self.device, self.seed, self.below = device, run.training.seed, below
        self.model, self.plan = plain_model(run, device)
        assert run.training.micro_batch_size is not None
        self.batch, self.seq_len = run.training.micro_batch_size, run.training.seq_len

    def tokens(self, index: int, extra: int = 0) -> Tensor:
        """Batch `index`, (batch, seq_len + extra)."""
        shape = (self.batch, self.seq_len + extra)
        return random_tokens(self.seed, index, shape, self.below, self.device)

    def begin(self) -> None:
        """Before each round, not timed."""

    def step(self) -> None:
        """What is timed."""
        raise NotImplementedError

    def round(self, steps: int) -> Round:
        """Seconds of a step."""
        with torch.no_grad():
            self.begin()
            return timed(self.step, steps, self.device)

    def loss(self) -> float:
        """See Workload.loss."""
        if self.last.dim() == 0:
            return float(self.last)
        return 0.0 if bool(self.last.isfinite().all()) else math.nan

    def close(self) -> None:
        """Nothing is left to let go of."""


class Evaluate(Inference):
    """A step is a pass over all sequences: the loss of each token, no gradients."""

    def __init__(self, run: RunConfig, device: torch.device, below: int, sequences: int) -> None:
        super().__init__(run, device, below)
        self.batches = [self.tokens(index, extra=1) for index in range(sequences // self.batch)]
        self.tokens_per_step = sequences * self.seq_len

    def step(self) -> None:
        """One pass."""
        losses = [self.model(batch[:, :-1], batch[:, 1:]) for batch in self.batches]
        self.last = torch.stack(losses).mean()


class Prefill(Inference):
    """A step is a prompt through the model into an empty cache, and its first token."""

    def __init__(self, run: RunConfig, device: torch.device, below: int, form: CacheForm) -> None:
        super().__init__(run, device, below)
        self.prompt = self.tokens(0)
        self.cache = new_cache(self.model, self.batch, self.seq_len, form)
        self.tokens_per_step = self.batch * self.seq_len

    def step(self) -> None:
        """One prompt."""
        self.cache.length = 0
        self.last = self.model(self.prompt, cache=self.cache, last=True)[:, -1]
        self.last.argmax(dim=-1)


class Decode(Inference):
    """A step is a new token, the likeliest, for each sequence of the batch. Each round begins with
    seq_len random tokens in the cache and has at most `longest` steps.
    """

    def __init__(
        self, run: RunConfig, device: torch.device, below: int, longest: int, form: CacheForm
    ) -> None:
        super().__init__(run, device, below)
        self.cache = new_cache(self.model, self.batch, self.seq_len + longest, form)
        self.tokens_per_step = self.batch
        with torch.no_grad():
            for chunk in self.tokens(0).split(_CHUNK, dim=1):
                logits = self.model(chunk, cache=self.cache, last=True)
        self.first = logits[:, -1:].argmax(dim=-1)  # (batch, 1)

    def begin(self) -> None:
        """Back to the end of the context."""
        self.cache.length, self.token = self.seq_len, self.first

    def step(self) -> None:
        """One token more."""
        self.last = self.model(self.token, cache=self.cache)[:, -1]
        self.token = self.last.argmax(dim=-1, keepdim=True)
