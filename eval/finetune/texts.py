"""Examples as token ids, and batches of them with their lengths.

An example is BOS, the text (of a pair: the first, the separator, the second), the end text. Rows
are padded on the right to the longest of their batch. A row's length is handed on as a number, and
no id means padding: attention is causal, so what stands behind the last real token changes nothing
before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.errors import InputError
from data.tokenizer import TextTokenizer
from eval.finetune.blocks import TextConfig
from eval.finetune.reading import Example

IGNORED = -100  # a target that has no part in the loss


@dataclass(frozen=True)
class Encoded:
    """An example as ids. answer: how many ids at its end are to be predicted (lm tasks)."""

    ids: list[int]
    label: int | float | str
    answer: int = 0


@dataclass
class Batch:
    """Rows of one length. ids (B, T); lengths (B,); labels (B,), or targets (B, T) of lm tasks."""

    ids: Tensor
    lengths: Tensor
    labels: Tensor | None = None
    targets: Tensor | None = None
    target_tokens: float = 0.0  # of an average micro-batch of this optimizer step


class Encoder:
    """Texts to ids by the conventions above. InputError where separator or end take all places."""

    def __init__(
        self, tokenizer: TextTokenizer, config: TextConfig, max_seq_len: int, taken: int = 0
    ) -> None:
        """taken: of the backbone's max_seq_len positions, those of a soft prompt."""
        self.positions, self.taken = max_seq_len - taken, taken
        if self.positions < 1:
            raise InputError(
                f"delta: {taken} tokens of a soft prompt leave none of the {max_seq_len} positions "
                "of the backbone"
            )
        if config.max_length > self.positions:
            prompt = f" without the {taken} of the soft prompt" if taken else ""
            raise InputError(
                f"texts.max_length: {config.max_length} is over the backbone's {self.positions} "
                f"positions{prompt}"
            )
        self.tokenizer, self.max_length = tokenizer, config.max_length
        self.separator = tokenizer.encode(config.separator) if config.separator else []
        self.end = tokenizer.encode(config.end) if config.end else []
        fixed = 1 + len(self.separator) + len(self.end)
        if fixed + 2 > config.max_length:
            raise InputError(
                f"texts.max_length: {config.max_length}; BOS, separator and end take {fixed}"
            )

    def prompt_room(self, max_new_tokens: int) -> int:
        """Most ids of a prompt behind BOS, before so many new ones. InputError where none fits."""
        room = self.positions - max_new_tokens - 1
        if room < 1:
            raise InputError(
                f"max_new_tokens: {max_new_tokens}; with BOS and a prompt they are over the "
                f"backbone's {self.positions} positions"
            )
        return room

    def encode(self, example: Example) -> Encoded:
        """BOS, text or pair, end."""
        parts = [self.tokenizer.encode(text) for text in example.texts]
        between = self.separator if len(parts) == 2 else []
        room = self.max_length - 1 - len(between) - len(self.end)
        parts = cut(parts, room)
        ids = [self.tokenizer.bos_id, *parts[0]]
        for part in parts[1:]:
            ids += [*between, *part]
        return Encoded(ids + self.end, example.label)

    def encode_answer(self, example: Example) -> Encoded:
        """BOS, prompt, answer, end: the last two are predicted."""
        assert isinstance(example.label, str)
        prompt = self.tokenizer.encode(example.texts[0])
        answer = (self.tokenizer.encode(example.label) + self.end)[: self.max_length // 2]
        room = self.max_length - 1 - len(answer)
        ids = [self.tokenizer.bos_id, *prompt[max(0, len(prompt) - room) :], *answer]
        return Encoded(ids, example.label, len(answer))


def cut(parts: list[list[int]], room: int) -> list[list[int]]:
    """Parts without their ends, so that they have at most `room` ids: the longest loses first."""
    sizes = [len(part) for part in parts]
    while sum(sizes) > room:
        sizes[sizes.index(max(sizes))] -= 1
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def collate(rows: Sequence[Encoded], device: torch.device, pad_id: int = 0) -> Batch:
    """Rows padded on the right with an id that means nothing."""
    lengths = [len(row.ids) for row in rows]
    ids = np.full((len(rows), max(lengths)), pad_id, dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
    batch = Batch(torch.from_numpy(ids).to(device), torch.tensor(lengths, device=device))
    if rows[0].answer:
        batch.targets = targets(rows, ids.shape[1]).to(device)
    else:
        kind = torch.long if isinstance(rows[0].label, int) else torch.float32
        batch.labels = torch.tensor([row.label for row in rows], dtype=kind, device=device)
    return batch


def targets(rows: Sequence[Encoded], width: int) -> Tensor:
    """What each position has to predict, (B, width): an id of the answer, or IGNORED."""
    found = torch.full((len(rows), width), IGNORED)
    for index, row in enumerate(rows):
        first = len(row.ids) - row.answer
        found[index, first - 1 : len(row.ids) - 1] = torch.tensor(row.ids[first:])
    return found


class TrainingOrder:
    """Examples of optimizer steps, a pure function of the step: one permutation after another, each
    seeded by the seed and its number, without a gap between them.

    group: batches of so many examples of like length: windows of GROUPED batches are sorted by
    length, and the batches shuffled. Less padding; what shares a batch is less random.
    """

    GROUPED = 16

    def __init__(self, rows: Sequence[Encoded], seed: int, group: int | None = None) -> None:
        self.lengths, self.seed, self.group = [len(row.ids) for row in rows], seed, group
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def indices(self, first: int, count: int) -> list[int]:
        """`count` examples from position `first` of the endless order."""
        found = []
        for position in range(first, first + count):
            epoch, place = divmod(position, len(self.lengths))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._of_epoch(epoch)
            found.append(int(self._order[place]))
        return found

    def _of_epoch(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.lengths))
        if self.group is None:
            return order
        window, whole = self.group * self.GROUPED, len(order) // self.group * self.group
        parts = [order[at : min(at + window, whole)] for at in range(0, whole, window)]
        grouped = [sorted(part, key=lambda index: self.lengths[index]) for part in parts]
        batches = np.array([index for part in grouped for index in part], dtype=np.int64)
        batches = generator.permutation(batches.reshape(-1, self.group))
        return np.concatenate([batches.flatten(), order[whole:]])
