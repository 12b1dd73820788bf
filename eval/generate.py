"""Samples text from a checkpoint, printing it as it comes.

python -m eval.generate --checkpoint RUN_OR_STEP_DIR --prompt "The module"
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data.command_line import parse_options
from data.errors import InputError, require_folder_of, run_cli
from data.tokenizer import Tokenizer
from model import Transformer
from model.attention import KVCache
from model.execution import Execution
from training import checkpoint, distributed
from training.execution import apply_execution


@dataclass
class GenerateConfig:
    """Samples text from a checkpoint.

    Attributes:
        checkpoint: A run directory (its newest checkpoint) or a checkpoint's folder.
        prompt: The text to go on from; empty: the beginning of a document.
        max_new_tokens: Tokens to sample at most; the model's max_seq_len ends a text too.
        temperature: Divides the logits; 0 takes the most likely token each time.
        top_k: Sample among this many most likely tokens; null: all.
        top_p: Sample among the fewest tokens whose probabilities sum to at least this; 1: all.
        num_samples: Texts to sample, with seeds seed, seed + 1 and so on.
        seed: Seeds the sampling.
        precision: "fp32" or "bf16" weights and activations.
        device: "auto" (the GPU where there is one), "cpu" or "cuda".
        execution: Kernels, attention and compilation, as in a run's YAML.
        output: A JSON file for prompt and texts.
    """

    checkpoint: str
    prompt: str = ""
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    num_samples: int = 1
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    execution: Execution = field(default_factory=Execution)
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "num_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}: {value}; it must be at least 1")
        if self.temperature != 0 and not 1e-3 <= self.temperature < math.inf:
            raise ValueError(f"--temperature: {self.temperature}; it must be 0 or at least 0.001")
        if any(0xD800 <= ord(c) < 0xE000 for c in self.prompt):
            raise ValueError("--prompt: is not UTF-8 text")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p: {self.top_p}; it must be over 0 and at most 1")


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


@torch.no_grad()
def generate(
    model: Transformer, ids: list[int], config: GenerateConfig, seed: int, vocab_size: int
) -> Iterator[int]:
    """Token ids that follow `ids`, one by one, up to max_new_tokens or the model's max_seq_len.

    Only ids under `vocab_size`, that of the tokenizer: the model's may be padded.
    """
    weight = model.lm_head.weight
    capacity = min(model.config.max_seq_len, len(ids) + config.max_new_tokens)
    cache = KVCache(model.config, 1, capacity, weight.device, weight.dtype)
    generator = torch.Generator().manual_seed(seed)
    new = ids
    for _ in range(capacity - len(ids)):
        output = model(torch.tensor([new], device=weight.device), cache=cache)
        logits = output[0, -1, :vocab_size].cpu()  # (vocab_size,)
        if config.temperature == 0:
            token = int(logits.argmax())
        else:
            p = probabilities(logits, config.temperature, config.top_k, config.top_p)
            token = int(torch.multinomial(p, 1, generator=generator))
        yield token
        new = [token]


def stream_text(tokens: Iterator[int], tokenizer: Tokenizer, prompt: list[int]) -> Iterator[str]:
    """The text of tokens as it becomes certain: a character of several tokens comes whole.

    Ends at a BOS or EOS, where the model says that the document is over.
    """
    ids, shown = list(prompt), tokenizer.decode(prompt)
    for token in tokens:
        if token in (tokenizer.bos_id, tokenizer.eos_id):
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the bytes of one are not all there yet
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]


def main() -> int:
    """The command."""
    config, _ = parse_options(
        GenerateConfig, prog="python -m eval.generate", description="Samples from a checkpoint."
    )
    require_folder_of(config.output)
    folder = checkpoint.resolve(Path(config.checkpoint))
    tokenizer = checkpoint.load_tokenizer(folder)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    device = distributed.evaluation_device(config.device)
    model = checkpoint.load_model(folder, device, dtype)
    apply_execution(model, config.execution, device, dtype, training=False)
    prompt = tokenizer.encode_document(config.prompt)
    if len(prompt) >= model.config.max_seq_len:
        raise InputError(
            f"--prompt: {len(prompt)} tokens; the model's max_seq_len {model.config.max_seq_len} "
            "leaves no room for more"
        )
    texts = []
    for i in range(config.num_samples):
        print(config.prompt, end="", flush=True)
        text = ""
        ids = generate(model, prompt, config, config.seed + i, tokenizer.vocab_size)
        for piece in stream_text(ids, tokenizer, prompt):
            print(piece, end="", flush=True)
            text += piece
        print("\n" + "-" * 20 if i + 1 < config.num_samples else "")
        texts.append(text)
    if config.output:
        result = {**asdict(config), "checkpoint": str(folder), "texts": texts}
        Path(config.output).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
