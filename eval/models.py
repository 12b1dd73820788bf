"""What can be scored: our checkpoints, and causal language models of Hugging Face."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import InputError
from data.tokenizer import TextTokenizer, Tokenizer
from eval.generate import GenerateConfig, generate
from eval.scoring import TokenLosses
from model.execution import Execution
from model.export import probes, register
from training import checkpoint
from training.execution import apply_execution

HUGGING_FACE = "hf:"  # what a name begins with that is not a folder of ours


@dataclass
class Scorable:
    """A language model with its tokenizer, ready to be scored.

    Attributes:
        token_losses: Inputs and targets (B, T) -> cross-entropy in nats (B, T), 0 where the target
            is -100.
        logits: Inputs (B, T) -> logits (B, T, vocab_size), float32.
        greedy: Ids of a text and a number -> at most so many ids that follow, each the likeliest.
        tokenizer: Of the text that it was trained on.
        token_bytes: UTF-8 bytes of each id, (vocab_size,); None where that is not known.
        seq_len: Tokens of a training sequence.
        max_seq_len: Most tokens that it takes at once.
        about: What the result should say of it.
    """

    token_losses: TokenLosses
    logits: Callable[[Tensor], Tensor]
    greedy: Callable[[list[int], int], Iterator[int]]
    tokenizer: TextTokenizer
    token_bytes: np.ndarray | None
    seq_len: int
    max_seq_len: int
    about: dict[str, Any]


def load(
    name: str, device: torch.device, dtype: torch.dtype, execution: Execution
) -> tuple[Scorable, str | None]:
    """The model that a run directory, a checkpoint's folder or hf:NAME_OR_FOLDER means, and the
    sha256 of its SentencePiece model (None: it has none, or another tokenizer beside it).
    """
    if name.startswith(HUGGING_FACE):
        return _hugging_face(name.removeprefix(HUGGING_FACE), device, dtype)
    folder = checkpoint.resolve(Path(name))
    state = checkpoint.read_state(folder)
    tokenizer = checkpoint.load_tokenizer(folder)
    model = checkpoint.load_model(folder, device, dtype)
    plan = apply_execution(model, execution, device, dtype, training=False)

    @torch.no_grad()
    def token_losses(inputs: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = model(inputs, targets, reduction="none")
        return losses

    @torch.no_grad()
    def logits(inputs: Tensor) -> Tensor:
        found: Tensor = model(inputs)
        return found

    def greedy(ids: list[int], most: int) -> Iterator[int]:
        settings = GenerateConfig(name, max_new_tokens=most, temperature=0)
        return generate(model, ids, settings, 0, tokenizer.vocab_size)

    about = {"step": state["step"], "parameters": model.config.num_parameters()}
    about |= {"tokens_trained": state["tokens"], "plan": plan.lines}
    scorable = Scorable(
        token_losses,
        logits,
        greedy,
        tokenizer,
        tokenizer.token_bytes(),
        state["seq_len"],
        model.config.max_seq_len,
        about,
    )
    return scorable, tokenizer.sha256


class HuggingFaceTokenizer:
    """A tokenizer of Hugging Face; a document begins with BOS, or EOS where there is no BOS."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        first = tokenizer.bos_token_id
        self.bos_id: int = first if first is not None else tokenizer.eos_token_id
        if self.bos_id is None:
            raise InputError(f"{HUGGING_FACE}{name}: its tokenizer has neither BOS nor EOS")
        last = tokenizer.eos_token_id
        self.eos_id: int = last if last is not None else -1
        self.tokenizer, self.vocab_size = tokenizer, len(tokenizer)

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def encode_document(self, text: str) -> list[int]:
        return [self.bos_id, *self.encode(text)]


def _sentencepiece(tokenizer: HuggingFaceTokenizer, folder: Path) -> Tokenizer | None:
    """The SentencePiece model in a folder, as exports of ours have it, where its ids are those of
    the folder's tokenizer; None where there is none such.
    """
    path = folder / "tokenizer.model"
    if not path.is_file():
        return None
    try:
        found = Tokenizer(path)
    except InputError:  # of another kind
        return None
    pieces = [found.decode([token]) for token in range(found.vocab_size)]
    of_both = [(one.bos_id, one.eos_id, one.vocab_size) for one in (found, tokenizer)]
    same = of_both[0] == of_both[1]
    agree = all(tokenizer.encode(text) == found.encode(text) for text in probes.texts(pieces))
    return found if same and agree else None


def _hugging_face(
    name: str, device: torch.device, dtype: torch.dtype
) -> tuple[Scorable, str | None]:
    """A causal language model by name (hub or cache) or folder. Only safetensors are read, and no
    code of the model's repository is run: of model.export's format hf it is ours.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise InputError(
            f"{HUGGING_FACE}{name}: needs the package transformers; pip install transformers"
        ) from None
    register()
    try:
        tokenizer = HuggingFaceTokenizer(AutoTokenizer.from_pretrained(name), name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{HUGGING_FACE}{name}: cannot be loaded ({text})") from None
    model = model.to(device).eval()

    @torch.no_grad()
    def logits(inputs: Tensor) -> Tensor:
        found: Tensor = model(inputs, use_cache=False).logits.float()
        return found

    def token_losses(inputs: Tensor, targets: Tensor) -> Tensor:
        flat = logits(inputs).flatten(0, 1)
        losses = F.cross_entropy(flat, targets.flatten(), reduction="none", ignore_index=-100)
        return losses.view_as(targets)

    def greedy(ids: list[int], most: int) -> Iterator[int]:
        prompt = torch.tensor([ids], device=device)
        mask = torch.ones_like(prompt)
        found = model.generate(prompt, attention_mask=mask, max_new_tokens=most, do_sample=False)
        return iter(found[0, len(ids) :].tolist())

    longest = getattr(model.config, "max_position_embeddings", None) or 2048
    about = {"parameters": sum(p.numel() for p in model.parameters())}
    seq_len = min(longest, 1024)
    own = _sentencepiece(tokenizer, Path(name))
    sizes = own.token_bytes() if own is not None else None
    scorable = Scorable(token_losses, logits, greedy, tokenizer, sizes, seq_len, longest, about)
    return scorable, own.sha256 if own is not None else None
