"""Rows decoded together over one cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from eval.generate.config import GenerateConfig
from eval.generate.sampling import Sampled, Sampler
from model import Transformer
from model.cache import KVCache


class Decoder:
    """Prompts of any lengths, each with a seed, decoded as one batch.

    A row ends after max_new_tokens, at the model's max_seq_len, or when `end` says so; the
    others go on without it. Each row's tokens are those that it has alone, but for rounding.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        config: GenerateConfig,
        seeds: Sequence[int],
        vocab_size: int,
        taken: int = 0,
    ) -> None:
        """taken: positions of each row that a soft prompt takes, in the cache too."""
        self.model, self.config, self.prompts, self.taken = model, config, prompts, taken
        self.sampler = Sampler(config, seeds, vocab_size)
        longest = model.config.max_seq_len - taken
        self.room = [min(longest - len(ids), config.max_new_tokens) for ids in prompts]
        self.rows = [row for row, room in enumerate(self.room) if room > 0]

    def end(self, row: int) -> None:
        """Leaves a row out of the steps that follow."""
        self.room[row] = 0

    @torch.no_grad()
    def steps(self) -> Iterator[dict[int, Sampled]]:
        """A token for each row that has not ended, by the row's number."""
        if not self.rows:
            return
        new, cache = self._begin()
        while True:
            logits = self.model(new, cache=cache, last=True)[:, 0].cpu()  # (rows, vocab_size)
            found = {
                row: self.sampler.take(row, own) for row, own in zip(self.rows, logits, strict=True)
            }
            for row in found:
                self.room[row] -= 1
            yield found
            kept = [place for place, row in enumerate(self.rows) if self.room[row] > 0]
            if not kept:
                return
            if len(kept) < len(self.rows):
                cache.keep(torch.tensor(kept, device=new.device))
                self.rows = [self.rows[place] for place in kept]
            tokens = [[found[row].token] for row in self.rows]
            new = torch.tensor(tokens, device=new.device)

    def _begin(self) -> tuple[Tensor, KVCache]:
        """Prompts of all rows, padded on the left, and an empty cache with room for more."""
        weight = self.model.lm_head.weight
        lengths = torch.tensor([len(self.prompts[row]) for row in self.rows])
        padding = lengths.max() - lengths
        ids = torch.zeros(len(self.rows), int(lengths.max()), dtype=torch.long)
        for place, row in enumerate(self.rows):
            ids[place, int(padding[place]) :] = torch.tensor(self.prompts[row])
        room = torch.tensor([self.room[row] for row in self.rows])
        cache = KVCache(
            self.model.config,
            len(self.rows),
            self.taken + int(lengths.max() + room.max()),
            weight.device,
            weight.dtype,
            self.config.cache,
            padding,
        )
        return ids.to(weight.device), cache


def generate(
    model: Transformer,
    ids: list[int],
    config: GenerateConfig,
    seed: int,
    vocab_size: int,
    taken: int = 0,
) -> Iterator[int]:
    """Token ids that follow `ids`, one by one, up to max_new_tokens or the model's max_seq_len.

    Only ids under `vocab_size`, that of the tokenizer: the model's may be padded. taken: positions
    of a soft prompt.
    """
    for found in Decoder(model, [ids], config, [seed], vocab_size, taken).steps():
        yield found[0].token
