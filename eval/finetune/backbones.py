"""What is fine-tuned: our checkpoints, and causal language models of Hugging Face from a folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import InputError
from data.tokenizer import TextTokenizer
from eval.finetune.texts import IGNORED
from eval.generate import GenerateConfig, generate
from eval.models import HUGGING_FACE, HuggingFaceTokenizer
from model import Transformer
from model.export import register
from training import checkpoint


class HiddenStates(nn.Module):
    """Stands where the output head stood, and returns what enters it."""

    def forward(self, x: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """x (B, T, d) as it is."""
        return x


@dataclass
class Backbone:
    """A pre-trained decoder.

    Attributes:
        module: It.
        tokenizer: Its.
        hidden_size: Width of a hidden state.
        max_seq_len: Most tokens that it takes at once.
        head_name: Path of its output head.
        about: What a result says of it.
    """

    module: nn.Module
    tokenizer: TextTokenizer
    hidden_size: int
    max_seq_len: int
    head_name: str
    about: dict[str, Any]

    @property
    def ours(self) -> bool:
        """Whether it is this repository's Transformer."""
        return isinstance(self.module, Transformer)

    def without_head(self) -> None:
        """Makes the module return hidden states (B, T, d), after the final norm, for logits."""
        owner, _, leaf = self.head_name.rpartition(".")
        setattr(self.module.get_submodule(owner), leaf, HiddenStates())

    def states(self, call: Callable[..., Any], ids: Tensor) -> Tensor:
        """What the module (called as `call`, which may wrap it) returns for ids (B, T), float32."""
        found: Tensor = call(ids) if self.ours else call(input_ids=ids, use_cache=False).logits
        return found[:, -ids.size(1) :].float()  # peft's prompts come back in front

    def token_losses(self, call: Callable[..., Any], ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of targets (B, T) -> (B, T), 0 where a target is IGNORED."""
        if self.ours:
            losses: Tensor = call(ids, targets, reduction="none")
            return losses
        logits = self.states(call, ids).flatten(0, 1)
        flat = F.cross_entropy(logits, targets.flatten(), reduction="none", ignore_index=IGNORED)
        return flat.view_as(targets)

    @torch.no_grad()
    def greedy(self, ids: list[int], most: int, stop: list[int], taken: int = 0) -> list[int]:
        """At most so many likeliest ids behind a prompt, with the cache; it ends before `stop`, BOS
        or EOS. taken: positions of a soft prompt.
        """
        most = min(most, self.max_seq_len - taken - len(ids))
        found: list[int] = []
        over = {self.tokenizer.bos_id, self.tokenizer.eos_id}
        for token in self._generate(ids, most, taken) if most > 0 else ():
            if token in over:
                break
            found.append(token)
            if stop and found[-len(stop) :] == stop:
                return found[: -len(stop)]
        return found

    def _generate(self, ids: list[int], most: int, taken: int) -> Any:
        if isinstance(self.module, Transformer):
            settings = GenerateConfig("", max_new_tokens=most, temperature=0)
            vocab_size = self.tokenizer.vocab_size
            return generate(self.module, ids, settings, 0, vocab_size, taken)
        module: Any = self.module
        prompt = torch.tensor([ids], device=next(module.parameters()).device)
        mask = torch.ones_like(prompt)
        found = module.generate(prompt, attention_mask=mask, max_new_tokens=most, do_sample=False)
        return found[0, len(ids) :].tolist()


def load_backbone(name: str, device: torch.device) -> Backbone:
    """The backbone that a run directory, a checkpoint or hf:FOLDER means, in float32."""
    if name.startswith(HUGGING_FACE):
        return _hugging_face(name.removeprefix(HUGGING_FACE), device)
    folder = checkpoint.resolve(Path(name))
    tokenizer = checkpoint.load_tokenizer(folder)
    module = checkpoint.load_model(folder, device, torch.float32)
    state = checkpoint.read_state(folder)
    about = {"folder": str(folder), "step": state["step"], "tokens_trained": state.get("tokens")}
    about |= {"parameters": module.config.num_parameters()}
    about |= {"parameters_without_embeddings": module.config.num_parameters(embeddings=False)}
    config = module.config
    return Backbone(module, tokenizer, config.hidden_size, config.max_seq_len, "lm_head", about)


def _hugging_face(name: str, device: torch.device) -> Backbone:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise InputError(
            f"{HUGGING_FACE}{name}: needs the package transformers; pip install transformers"
        ) from None
    register()
    try:
        tokenizer = HuggingFaceTokenizer(AutoTokenizer.from_pretrained(name), name)
        module: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{HUGGING_FACE}{name}: cannot be loaded ({text})") from None
    head = module.get_output_embeddings()
    head_name = next(path for path, one in module.named_modules() if one is head)
    longest = getattr(module.config, "max_position_embeddings", None) or 2048
    parameters = sum(p.numel() for p in module.parameters())
    about = {"folder": name, "parameters": parameters}
    width = int(head.weight.shape[1])
    return Backbone(module.to(device), tokenizer, width, longest, head_name, about)
