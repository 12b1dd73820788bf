"""What is taken of a distribution over tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eval.generate.config import GenerateConfig


class Sampled(NamedTuple):
    """A token, and its log-probability in nats: of the model's own distribution over all its ids,
    whatever temperature, top_k and top_p made of that.
    """

    token: int
    logprob: float


def probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """The distribution to sample from, (vocab_size,) -> (vocab_size,), temperature over 0.

    Nucleus sampling (Holtzman et al. 2020, section 3.1) keeps the smallest set of most likely
    tokens whose probability reaches top_p, after temperature and top-k.
    """
    logits = logits.double() / temperature
    if top_k is not None and top_k < logits.numel():
        kept = torch.topk(logits, top_k).indices
        logits = torch.full_like(logits, -torch.inf).index_copy(0, kept, logits[kept])
    p = torch.softmax(logits, dim=0)
    if top_p < 1:
        ordered, order = p.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered  # the mass of all more likely tokens
        p[order[before >= top_p]] = 0
        p /= p.sum()
    return p


class Sampler:
    """Takes tokens for rows that each have a random generator of their own, so that what a row
    draws does not depend on its neighbours.

    Only ids under `vocab_size`, that of the tokenizer: the model's may be padded.
    """

    def __init__(self, config: GenerateConfig, seeds: Sequence[int], vocab_size: int) -> None:
        self.config, self.vocab_size = config, vocab_size
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def take(self, row: int, logits: Tensor) -> Sampled:
        """A token of a row's logits (vocab_size of the model,), float32 on the CPU."""
        allowed = logits[: self.vocab_size]
        if self.config.temperature == 0:
            token = int(allowed.argmax())
        else:
            config = self.config
            p = probabilities(allowed, config.temperature, config.top_k, config.top_p)
            token = int(torch.multinomial(p, 1, generator=self.generators[row]))
        return Sampled(token, float(logits.log_softmax(dim=0)[token]))
