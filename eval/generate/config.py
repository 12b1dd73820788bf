"""GenerateConfig: the command line of python -m eval.generate."""

import math
from dataclasses import dataclass, field
from typing import Literal

from model.cache import CacheForm
from model.execution import Execution


@dataclass
class GenerateConfig:
    """Samples text from a checkpoint.

    Attributes:
        checkpoint: A run directory (its newest checkpoint) or a checkpoint's folder.
        prompt: The text to go on from; empty: the beginning of a document.
        prompts: A file of prompts in place of one: .jsonl, objects with a text `prompt`, else a
            prompt a line (empty lines are left out).
        interactive: Read prompts from the terminal, one after the other; /help there says more.
        max_new_tokens: Tokens to sample at most; the model's max_seq_len ends a text too.
        temperature: Divides the logits; 0 takes the most likely token each time.
        top_k: Sample among this many most likely tokens; null: all.
        top_p: Sample among the fewest tokens whose probabilities sum to at least this; 1: all.
        stop: Texts that end a sample; they are no part of it.
        num_samples: Texts to sample of each prompt, with seeds seed, seed + 1 and so on.
        batch_size: Texts to sample at once.
        seed: Seeds the sampling.
        cache: What is kept of the tokens so far: "full" (keys and values), "value_latent" (keys,
            and the latents of values), "latent" (the latents of both: least memory, most work). All
            give the same text but for rounding.
        precision: "fp32" or "bf16" weights and activations.
        device: "auto" (the GPU where there is one), "cpu" or "cuda".
        execution: Kernels, attention and compilation, as in a run's YAML.
        output: A JSON file for prompts and texts, with each token and its log-probability.
    """

    checkpoint: str
    prompt: str = ""
    prompts: str | None = None
    interactive: bool = False
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    stop: list[str] = field(default_factory=list)
    num_samples: int = 1
    batch_size: int = 16
    seed: int = 0
    cache: CacheForm = "full"
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    execution: Execution = field(default_factory=Execution)
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "num_samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}: {value}; it must be at least 1")
        if self.temperature != 0 and not 1e-3 <= self.temperature < math.inf:
            raise ValueError(f"--temperature: {self.temperature}; it must be 0 or at least 0.001")
        if not 0 <= self.seed <= self.seed + self.num_samples < 2**63:
            raise ValueError(f"--seed: {self.seed}; it must be at least 0 and under 2^63")
        if not all(isinstance(text, str) for text in self.stop):
            raise ValueError(f"--stop: {self.stop}; each must be a text")
        for name, texts in (("prompt", [self.prompt]), ("stop", self.stop)):
            if any(0xD800 <= ord(c) < 0xE000 for text in texts for c in text):
                raise ValueError(f"--{name}: is not UTF-8 text")
        if not all(self.stop):
            raise ValueError("--stop: an empty text would end every sample at once")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p: {self.top_p}; it must be over 0 and at most 1")
        given = [bool(self.prompt), self.prompts is not None, self.interactive]
        if sum(given) > 1:
            raise ValueError("--prompt, --prompts and --interactive: allowed is one of them")
        if self.interactive and (self.output is not None or self.num_samples > 1):
            raise ValueError("--interactive: it takes neither --output nor several --num_samples")
