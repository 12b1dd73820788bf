"""Prompts in, texts out: batches of the decoder, read as text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data.tokenizer import TextTokenizer
from eval.generate.config import GenerateConfig
from eval.generate.decoding import Decoder
from eval.generate.sampling import Sampled
from eval.generate.text import Finish, TextStream
from model import Transformer

Show = Callable[[str], None]


@dataclass
class Completion:
    """What was sampled behind a prompt.

    Attributes:
        text: Without a stop string, and without the token that ended the document.
        finish: "stop", "end", or "length" (max_new_tokens or max_seq_len).
        tokens: All that were sampled, with those of a stop string and the one that ended it.
    """

    text: str
    finish: Finish
    tokens: list[Sampled] = field(default_factory=list)


def complete(
    model: Transformer,
    tokenizer: TextTokenizer,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    config: GenerateConfig,
    show: Show | None = None,
) -> list[Completion]:
    """A text for each prompt (its token ids) and seed, all at once. show: gets the text of the
    first as it becomes certain.
    """
    decoder = Decoder(model, prompts, config, seeds, tokenizer.vocab_size)
    streams = [TextStream(tokenizer, ids, config.stop) for ids in prompts]
    tokens: list[list[Sampled]] = [[] for _ in prompts]

    def shown(row: int, text: str) -> None:
        if show is not None and row == 0 and text:
            show(text)

    for found in decoder.steps():
        for row, sampled in found.items():
            tokens[row].append(sampled)
            shown(row, streams[row].feed(sampled.token))
            if streams[row].finish is not None:
                decoder.end(row)
    for row, stream in enumerate(streams):
        if stream.finish is None:
            shown(row, stream.flush())
    return [
        Completion(stream.text, stream.finish or "length", own)
        for stream, own in zip(streams, tokens, strict=True)
    ]


def complete_all(
    model: Transformer,
    tokenizer: TextTokenizer,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    progress: Callable[[int], object] = lambda _: None,
) -> list[list[Completion]]:
    """For each prompt num_samples texts, in batches of prompts of like length. progress: is told
    how many texts came to be.
    """
    jobs = [
        (index, sample) for index in range(len(prompts)) for sample in range(config.num_samples)
    ]
    jobs.sort(key=lambda job: len(prompts[job[0]]))  # stable; less padding
    found: dict[tuple[int, int], Completion] = {}
    for start in range(0, len(jobs), config.batch_size):
        batch = jobs[start : start + config.batch_size]
        seeds = [config.seed + sample for _, sample in batch]
        texts = complete(model, tokenizer, [prompts[index] for index, _ in batch], seeds, config)
        found |= dict(zip(batch, texts, strict=True))
        progress(len(batch))
    samples = range(config.num_samples)
    return [[found[index, sample] for sample in samples] for index in range(len(prompts))]
