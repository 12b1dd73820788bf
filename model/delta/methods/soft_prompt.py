"""Soft prompts (Lester et al. 2021): trained vectors before the embedded input."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model.delta.base import Delta, DeltaConfig, DeltaLayer, register
from model.delta.target import Target, whole_shape

IGNORED = -100  # the target of a position that no loss is computed for
_LIMITS = ("max_seq_len", "max_position_embeddings")


@register
@dataclass
class SoftPromptConfig(DeltaConfig):
    """A soft prompt: P trained vectors before the embedded input (Lester et al. 2021, section 2).

    The backbone is a language model whose forward takes token ids (B, T) first. It runs on P + T
    positions, which must be within its limit, and returns logits (or losses) of T: those of the
    prompt are dropped, and no loss is computed for it. A mask, positions and targets that come
    along are extended; a cache holds the prompt too. There is no start that adds nothing. Not for
    backbones that keep attention within documents, which a prompt before the first would not reach.

    With Deltas.rows each row must have a prompt, all of one length. Prompts that act together stand
    in the order of activation.

    Attributes:
        targets: The token embedding.
        soft_tokens: P.
        init: "vocabulary" (embeddings of random tokens) or "normal" (N(0, init_std²)).
        init_std: Deviation of "normal".
    """

    method: ClassVar[str] = "soft_prompt"
    needs_matrix: ClassVar[bool] = False

    targets: list[str] = field(default_factory=lambda: ["re:.*(token_embedding|embed_tokens|wte)"])
    soft_tokens: int = 20
    init: Literal["vocabulary", "normal"] = "vocabulary"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        self._require("soft_tokens", self.soft_tokens >= 1, "at least 1")
        self._require("init_std", self.init_std >= 0, "at least 0")

    def build(self, backbone: nn.Module, targets: Sequence[Target]) -> Delta:
        """New vectors. ValueError where the backbone cannot have them."""
        if len(targets) != 1 or not isinstance(targets[0].module, nn.Embedding):
            kinds = ", ".join(f"{one.name} ({type(one.module).__name__})" for one in targets)
            raise ValueError(f"targets: {kinds}; allowed is one nn.Embedding, that of the tokens")
        if getattr(getattr(backbone, "config", None), "document_start_id", None) is not None:
            raise ValueError(
                "soft_prompt: this backbone keeps attention within documents (document_start_id), "
                "so a prompt would be seen by none; use prefix"
            )
        limit = limit_of(backbone)
        if limit is not None and self.soft_tokens >= limit:
            allowed = f"1 to {limit - 1}, under the {limit} positions of the backbone"
            self._require("soft_tokens", False, allowed)
        return SoftPromptDelta(self, targets, self._layer)

    def _layer(self, target: Target) -> DeltaLayer:
        weight = target.module.weight
        assert isinstance(weight, nn.Parameter)
        vocab, width = whole_shape(weight)
        layer = SoftPromptLayer(self.soft_tokens, width)
        with torch.no_grad():
            if self.init == "vocabulary":
                chosen = torch.randint(vocab, (self.soft_tokens,), device=weight.device)
                layer.prompt.copy_(F.embedding(chosen, weight))
            else:
                layer.prompt.normal_(0, self.init_std)
        return layer


def limit_of(backbone: nn.Module) -> int | None:
    """Positions that a backbone has, by its config; None where it names no limit."""
    config = getattr(backbone, "config", None)
    found = (getattr(config, name, None) for name in _LIMITS)
    return next((limit for limit in found if isinstance(limit, int)), None)


class SoftPromptLayer(DeltaLayer):
    """A prompt's vectors. prompt (P, d).

    start: its place among the positions of this forward pass, which the hook of the backbone sets;
    -1 where a cache holds it already, None outside of the backbone's forward.
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(tokens, width))
        self.start: int | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y (B, P + T, d) with the prompt in its place. x: ids (B, P + T), unused."""
        if self.start is None:
            raise ValueError(
                "soft_prompt: the embedding was called outside of the backbone's forward, which "
                "makes place for the prompt"
            )
        if self.start < 0:
            return y
        prompt = self.prompt.to(y.dtype).expand(y.size(0), -1, -1)
        return torch.cat([y[:, : self.start], prompt, y[:, self.start + prompt.size(1) :]], dim=1)


class SoftPromptDelta(Delta):
    """A soft prompt, for which the backbone's input is made longer and its output shorter."""

    def hooks(self, owner: Any, name: str) -> list[RemovableHandle]:
        """Hooks on the backbone itself."""
        run, backbone = _Run(owner, name), owner.backbone
        return [
            backbone.register_forward_pre_hook(run.enter, with_kwargs=True),
            backbone.register_forward_hook(run.leave, with_kwargs=True, always_call=True),
        ]


class _Run:
    """The hooks on a backbone: those of the first prompt that acts serve all of them."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        forward = inspect.signature(type(owner.backbone).forward)
        self.names = [parameter for parameter in forward.parameters if parameter != "self"]
        self.acting: list[SoftPromptLayer] = []
        self.added = self.length = 0  # positions of prompts, and all, in this pass

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Makes place for the prompts in what the backbone is given."""
        prompts = self._prompts()
        if not prompts or prompts[0][0] != self.name:
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids = given.get(self.names[0])
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ValueError(
                f"soft_prompt: the backbone needs {self.names[0]} (B, T), of token ids"
            )
        self.acting = [layer for _, layer, _ in prompts]
        total = self._place(prompts, ids.size(0))
        cached = _cached(given)
        limit = limit_of(module)
        if not cached and limit is not None and total + ids.size(1) > limit:
            raise ValueError(
                f"soft_prompt: {total} soft tokens and {ids.size(1)} of the input are more than "
                f"the {limit} positions of the backbone"
            )
        if cached:
            for layer in self.acting:
                layer.start = -1
        self.added = 0 if cached else total
        self.length = ids.size(1) + self.added
        longer = {
            name: _extended(name, value, name == self.names[0], total, self.added)
            for name, value in given.items()
        }
        positional = tuple(longer.pop(name) for name in self.names[: len(args)])
        return positional, longer

    def _prompts(self) -> list[tuple[str, SoftPromptLayer, Tensor | None]]:
        """Names and layers of the prompts that act, with their rows."""
        found = []
        for name, rows in self.owner.acting():
            for _, layer in self.owner[name].named_layers():
                if isinstance(layer, SoftPromptLayer):
                    found.append((name, layer, rows))
        return found

    def _place(self, prompts: list[tuple[str, SoftPromptLayer, Tensor | None]], batch: int) -> int:
        """Sets where each prompt begins; returns the positions of all of them."""
        sizes = [layer.prompt.size(0) for _, layer, _ in prompts]
        routed = [len(rows) for _, _, rows in prompts if rows is not None]
        if routed:
            if len(set(sizes)) > 1 or sum(routed) != batch:
                raise ValueError(
                    f"soft_prompt: of {batch} rows {sum(routed)} have a prompt, of "
                    f"{', '.join(map(str, sizes))} tokens; allowed is one for each row, all of one "
                    "length"
                )
            sizes = sizes[:1]
        for index, (_, layer, _) in enumerate(prompts):
            layer.start = 0 if routed else sum(sizes[:index])
        return sum(sizes)

    def leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Drops the prompts' positions from what the backbone returns."""
        if not self.acting:
            return None
        for layer in self.acting:
            layer.start = None
        self.acting = []
        return output if output is None or not self.added else self._cut(output)

    def _cut(self, output: Any) -> Any:
        """An output without the prompts' positions: a tensor (B, P + T, …), the tensors of a tuple,
        logits and last_hidden_state of an output of transformers.
        """
        if isinstance(output, Tensor):
            along = output.dim() > 1 and output.size(1) == self.length
            return output[:, self.added :] if along else output
        if isinstance(output, tuple):
            return tuple(self._cut(one) if isinstance(one, Tensor) else one for one in output)
        for name in ("logits", "last_hidden_state"):
            value = getattr(output, name, None)
            if isinstance(value, Tensor) and value.dim() == 3:
                output[name] = self._cut(value)
        return output


def _cached(given: dict[str, Any]) -> bool:
    """Whether a cache holds tokens of this sequence already: ours or one of transformers."""
    ours, theirs = given.get("cache"), given.get("past_key_values")
    if ours is not None:
        return int(ours.length) > 0
    return theirs is not None and int(theirs.get_seq_length()) > 0


def _extended(name: str, value: Any, ids: bool, total: int, added: int) -> Any:
    """An argument of the backbone for a sequence with `total` soft tokens, of which `added` come
    with this call. Placeholder ids are 0: the embedding's hook replaces their vectors.
    """
    if not isinstance(value, Tensor):
        return value
    if ids:
        return F.pad(value, (added, 0), value=0)
    if name in ("labels", "targets") and value.dim() == 2:
        return F.pad(value, (added, 0), value=IGNORED)
    if name == "attention_mask":
        if value.dim() != 2:
            raise ValueError(f"soft_prompt: attention_mask {tuple(value.shape)}; allowed is (B, S)")
        return F.pad(value, (total, 0), value=1)
    if name == "position_ids":
        first = torch.arange(added, device=value.device).expand(*value.shape[:-1], added)
        return torch.cat([first, value + total], dim=-1)
    return value
