"""ModelConfig: every number that shapes a model, its validation, and its parameter and FLOP
counts.
"""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.shape import Bias, Shape

Family = Literal["llama", "paper-1"]
FORMAT_VERSION = 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_type(name: str, value: Any, hint: Any) -> None:
    """ValueError where a value has not the type that is written beside its field."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
    if choices is not None:
        if value not in choices:
            raise ValueError(f"{name}: {value!r}; allowed are {', '.join(map(repr, choices))}")
        return
    kinds = typing.get_args(hint) or (hint,)
    fits = isinstance(value, kinds)  # None is of NoneType, which is among the kinds of X | None
    if isinstance(value, bool):  # Python counts it among the integers
        fits = bool in kinds
    elif float in kinds and isinstance(value, int):
        fits = True
    if not fits:
        allowed = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ValueError(f"{name}: {value!r}; allowed is {allowed}")


@dataclass(frozen=True)
class Ranks:
    """The rank of each kind of projection; null (None) means a dense weight.

    Attributes:
        q: Rank of the query projection.
        k: Rank of the key projection.
        v: Rank of the value projection.
        o: Rank of the attention output projection.
        ffn: Rank of the feed-forward projections (an ablation: LPA leaves them dense).
    """

    q: int | None = None
    k: int | None = None
    v: int | None = None
    o: int | None = None
    ffn: int | None = None

    @classmethod
    def from_scalar(cls, rank: int) -> "Ranks":
        """What a single number means: that rank for q, k, v and o, a dense FFN."""
        return cls(q=rank, k=rank, v=rank, o=rank)


@dataclass
class ModelConfig:
    """The shape of a model.

    Attributes:
        family: "llama" (pre-RMSNorm, RoPE, SwiGLU, no biases) or "paper-1" (the paper's setting 1:
            LayerNorm on the sub-layer's output, learned positions, ReLU, biases, dropout).
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream, d.
        intermediate_size: Width of the feed-forward network.
        num_layers: Number of blocks.
        num_heads: Number of query heads.
        num_kv_heads: Number of key and value heads (grouped-query attention); null: num_heads.
        head_dim: Width of a head; null: hidden_size / num_heads.
        max_seq_len: Longest sequence in tokens; with learned positions the size of their table.
        r: Rank of the attention projections (an integer: q, k, v and o alike), or
            {q, k, v, o, ffn}, each an integer or null (dense); null: the vanilla Transformer.
        rope_theta: Base of the rotary angles (family llama).
        norm_eps: Epsilon of RMSNorm or LayerNorm.
        dropout: Dropout before each residual addition; null: 0 for llama, 0.1 for paper-1.
        tie_embeddings: The output head shares the token embedding.
        lm_head_bias: The output head has a bias; null: no for llama, yes for paper-1.
        init: "matched" (the product B·A has the variance of the dense weight) or "authors" (torch's
            defaults, as in the authors' code: the product has a third of it). See init_weights.
        init_std: Standard deviation of a dense weight under "matched".
        qk_norm: RMSNorm over each head's queries and keys before rotary positions, with one learned
            weight (head_dim,) for the queries of all heads and one for the keys (Henry et al. 2020,
            Dehghani et al. 2023).
        latent_norm: RMSNorm of the latent A x of each low-dimensional projection that reads the
            residual stream (not o_proj and down_proj), with a learned weight (r,), times √(d_in/r):
            y = B (√(d_in/r) · RMSNorm(A x)).
        latent_activation: "silu": y = B silu(A x) in every low-dimensional projection, as in CoLA
            (Liu et al. 2025), an ablation; "none": LPA.
        zero_init_outputs: o_proj and down_proj start at zero, so that each block starts as the
            identity (family llama). See init_weights.
        document_start_id: Attention stays within documents, each of which begins with this token
            (the tokenizer's BOS); null: it crosses their borders. Learned positions go on counting.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    family: Family = "llama"
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_seq_len: int = 2048
    r: int | Ranks | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1.0e-6
    dropout: float | None = None
    tie_embeddings: bool = False
    lm_head_bias: bool | None = None
    init: Literal["matched", "authors"] = "matched"
    init_std: float = 0.02
    qk_norm: bool = False
    latent_norm: bool = False
    latent_activation: Literal["none", "silu"] = "none"
    zero_init_outputs: bool = False
    document_start_id: int | None = None

    def __post_init__(self) -> None:
        self._check_values()
        paper = self.family == "paper-1"
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"model.num_heads: {self.num_heads} heads do not divide model.hidden_size "
                    f"{self.hidden_size}; give heads that do, or model.head_dim"
                )
            self.head_dim = self.hidden_size // self.num_heads
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        if self.dropout is None:
            self.dropout = 0.1 if paper else 0.0
        if self.lm_head_bias is None:
            self.lm_head_bias = paper
        self._check_shapes()

    def _check_values(self) -> None:
        """Types and ranges: a model.json does not pass the command line, which checks a YAML."""
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_type(f"model.{field.name}", value, hints[field.name])
            zero_allowed = field.name in ("dropout", "document_start_id")
            if _is_number(value) and not (0 < value < math.inf or (zero_allowed and value == 0)):
                raise ValueError(f"model.{field.name}: {value}; it must be greater than 0")
        for name, rank in dataclasses.asdict(self.ranks).items():
            _check_type(f"model.r.{name}", rank, int | None)
            if rank is not None and rank <= 0:
                raise ValueError(f"model.r.{name}: {rank}; a rank is at least 1, or null for dense")

    def _check_shapes(self) -> None:
        assert self.head_dim is not None
        assert self.num_kv_heads is not None
        assert self.dropout is not None
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads: {self.num_kv_heads} does not divide "
                f"model.num_heads {self.num_heads}"
            )
        if self.family == "llama" and self.head_dim % 2:
            raise ValueError(f"model.head_dim: {self.head_dim}; rotary positions need an even one")
        if self.dropout >= 1:
            raise ValueError(f"model.dropout: {self.dropout}; allowed is 0 <= dropout < 1")
        if self.tie_embeddings and self.lm_head_bias:
            raise ValueError("model.lm_head_bias: a head tied to the embedding has no bias")
        if self.document_start_id is not None and self.document_start_id >= self.vocab_size:
            raise ValueError(
                f"model.document_start_id: {self.document_start_id}; allowed are token ids, 0 to "
                f"{self.vocab_size - 1}, or null"
            )
        if self.latent_norm and self.latent_activation != "none":
            raise ValueError(
                f"model.latent_activation: {self.latent_activation}, and latent_norm is true; "
                "allowed is one of the two"
            )
        if self.zero_init_outputs and self.family == "paper-1":
            # LayerNorm of zero has a gradient of 1/√eps, and its output is of unit scale as soon as
            # its input is not zero.
            raise ValueError(
                "model.zero_init_outputs: true, but family paper-1 normalises these outputs; "
                "allowed is false, or family llama"
            )
        for name, shape in self.block_projections().items():
            if shape.rank is not None and shape.rank > min(shape.d_in, shape.d_out):
                raise ValueError(
                    f"model.r: rank {shape.rank} of {name} is over its dimensions "
                    f"{shape.d_in} -> {shape.d_out}; allowed is 1 to {min(shape.d_in, shape.d_out)}"
                )

    @property
    def ranks(self) -> Ranks:
        """`r` written out, one rank a kind of projection."""
        if isinstance(self.r, Ranks):
            return self.r
        return Ranks() if self.r is None else Ranks.from_scalar(self.r)

    def warnings(self) -> list[str]:
        """Settings that have no effect."""
        r = self.ranks
        if self.latent_norm and (r.q, r.k, r.v, r.ffn) == (None,) * 4:
            return ["model.latent_norm has no effect: none of q, k, v and ffn is low-dimensional"]
        if self.latent_activation != "none" and r == Ranks():
            return ["model.latent_activation has no effect: no projection is low-dimensional"]
        return []

    @property
    def _latent_eps(self) -> float | None:
        return self.norm_eps if self.latent_norm else None

    @property
    def _latent_silu(self) -> bool:
        return self.latent_activation == "silu"

    def attention_projections(self) -> dict[str, Shape]:
        """The projections of the attention of one block, by name."""
        assert self.head_dim is not None
        assert self.num_kv_heads is not None
        d, r = self.hidden_size, self.ranks
        wide, narrow = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        # The authors' code for setting 1 puts the bias of q, k, v on the latent and that of o on
        # the output.
        into: Bias = "latent" if self.family == "paper-1" else "none"
        out: Bias = "output" if self.family == "paper-1" else "none"
        eps, silu = self._latent_eps, self._latent_silu
        return {
            "q_proj": Shape(d, wide, r.q, into, eps, silu),
            "k_proj": Shape(d, narrow, r.k, into, eps, silu),
            "v_proj": Shape(d, narrow, r.v, into, eps, silu),
            "o_proj": Shape(wide, d, r.o, out, None, silu),
        }

    def feed_forward_projections(self) -> dict[str, Shape]:
        """The projections of the feed-forward network of one block, by name."""
        d, f, r = self.hidden_size, self.intermediate_size, self.ranks.ffn
        eps, silu = self._latent_eps, self._latent_silu
        if self.family == "paper-1":
            return {
                "up_proj": Shape(d, f, r, "latent", eps, silu),
                "down_proj": Shape(f, d, r, "output", None, silu),
            }
        return {
            "gate_proj": Shape(d, f, r, "none", eps, silu),
            "up_proj": Shape(d, f, r, "none", eps, silu),
            "down_proj": Shape(f, d, r, "none", None, silu),
        }

    def block_projections(self) -> dict[str, Shape]:
        """Every projection of one block, by name."""
        return self.attention_projections() | self.feed_forward_projections()

    def num_parameters(self, embeddings: bool = True) -> int:
        """Parameters of the model; without embeddings: the blocks and the final norm alone."""
        norm = self.hidden_size * (2 if self.family == "paper-1" else 1)  # LayerNorm has a bias
        assert self.head_dim is not None
        heads = 2 * self.head_dim if self.qk_norm else 0
        block = sum(p.parameters() for p in self.block_projections().values()) + 2 * norm + heads
        body = self.num_layers * block + (norm if self.family == "llama" else 0)
        if not embeddings:
            return body
        table = self.vocab_size * self.hidden_size
        head = (0 if self.tie_embeddings else table) + (self.vocab_size if self.lm_head_bias else 0)
        positions = self.max_seq_len * self.hidden_size if self.family == "paper-1" else 0
        return body + table + positions + head

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of the forward pass per token at this sequence length; training costs three times
        as many.

        2 · (entries of the matrices multiplied: dense weights, factors A and B, output head) for
        the projections, and for causal attention 2 · 2 · num_heads · head_dim · (seq_len + 1) / 2
        per layer (scores and weighted sum over the (seq_len + 1) / 2 keys that a query sees on
        average). Norms, activations, rotary positions and softmax are left out, as is usual
        (Kaplan et al. 2020, table 1).
        """
        assert self.head_dim is not None
        matmul = sum(p.matmul_parameters() for p in self.block_projections().values())
        attention = 4 * self.num_heads * self.head_dim * (seq_len + 1) / 2
        head = 2 * self.vocab_size * self.hidden_size
        return self.num_layers * (2 * matmul + attention) + head

    def to_json(self, path: Path) -> None:
        """Writes `model.json`."""
        fields = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        path.write_text(json.dumps(fields, indent=2) + "\n")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
        """The inverse of `dataclasses.asdict`; ValueError on keys ModelConfig does not have."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known - {"format_version"})
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        version = fields.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version {version}; this code reads {FORMAT_VERSION}")
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        missing = sorted(required - set(fields))
        if missing:
            raise ValueError(f"the key {missing[0]!r} is missing")
        kept = {k: v for k, v in fields.items() if k in known}
        if isinstance(kept.get("r"), dict):
            kept["r"] = Ranks(**kept["r"])
        return cls(**kept)

    @classmethod
    def from_json(cls, path: Path) -> "ModelConfig":
        """Reads `model.json`. ValueError, naming the file, where it is not one."""
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a model description: {error}") from None
