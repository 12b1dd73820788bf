"""The configuration of LPA models in transformers."""

from typing import Any

from transformers import PreTrainedConfig

KINDS = ("q", "k", "v", "o", "ffn")


class LpaConfig(PreTrainedConfig):
    """The shape of an LPA model: Llama's names where Llama has the number.

    Attributes:
        family: "llama" (RMSNorm before each sub-layer, rotary positions, SwiGLU) or "paper-1"
            (LayerNorm on the output of a sub-layer, learned positions, ReLU, biases, no norm at
            the end).
        ranks: {q, k, v, o, ffn}: the rank of each kind of projection, None for a dense weight.
        rope_theta: Base of the rotary angles (family llama).
        norm_eps: Epsilon of every norm.
        dropout: Dropout before each residual addition.
        lm_head_bias: The output head has a bias.
        qk_norm: RMSNorm over each head's queries and keys, before rotary positions.
        latent_norm: y = B (√(d_in/r) · RMSNorm(A x)) in low-dimensional q, k, v, gate and up.
        latent_activation: "silu": y = B silu(A x) in every low-dimensional projection; or "none".
        document_start_id: Attention stays within documents, each of which begins with this token;
            None: it crosses their borders.
        initializer_range: Standard deviation of a dense weight in a new model.
    """

    model_type = "lpa"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' name and type)

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    family: str = "llama"
    ranks: dict[str, int | None] | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1.0e-6
    dropout: float = 0.0
    lm_head_bias: bool = False
    qk_norm: bool = False
    latent_norm: bool = False
    latent_activation: str = "none"
    document_start_id: int | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.ranks = {kind: (self.ranks or {}).get(kind) for kind in KINDS}
        if self.family not in ("llama", "paper-1"):
            raise ValueError(f"family: {self.family!r}; allowed are 'llama' and 'paper-1'")
        if self.latent_activation not in ("none", "silu"):
            raise ValueError(
                f"latent_activation: {self.latent_activation!r}; allowed are 'none' and 'silu'"
            )
        super().__post_init__(**kwargs)
