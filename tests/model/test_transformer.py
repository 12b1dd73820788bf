"""The whole model against transformers' Llama (and Qwen3, for qk_norm), against the paper's setting
1 written out, and against itself: causal, batched, cached, cast.
"""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from model import ModelConfig, Ranks, Transformer, init_weights
from model.cache import KVCache

VOCAB, LONGEST = 61, 48
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_layers": 3,
    "num_heads": 4,
    "max_seq_len": LONGEST,
}
VARIANTS = {
    "vanilla": {},
    "lpa": {"r": 5},
    "each its rank": {"r": Ranks(q=3, k=None, v=7, o=2, ffn=9)},
    "grouped": {"num_kv_heads": 2},
    "grouped lpa": {"num_kv_heads": 2, "r": 5},
    "one kv head": {"num_kv_heads": 1},
    "tied": {"tie_embeddings": True},
    "tied lpa": {"tie_embeddings": True, "r": 5},
    "wide heads": {"head_dim": 12, "r": 5},
    "theta and eps": {"rope_theta": 100.0, "norm_eps": 0.1},
    "qk norm": {"qk_norm": True},
    "qk norm grouped lpa": {"qk_norm": True, "num_kv_heads": 2, "r": 5, "norm_eps": 0.1},
}
PAPER = {
    "vanilla": {},
    "lpa": {"r": 5},
    "all low": {"r": Ranks(q=3, k=4, v=5, o=6, ffn=9)},
    "without head bias": {"lm_head_bias": False},
    "qk norm": {"qk_norm": True},
    "both norms": {"qk_norm": True, "latent_norm": True, "r": Ranks(q=3, v=5, o=6, ffn=9)},
    "latent silu": {"latent_activation": "silu", "r": Ranks(q=3, v=5, o=6, ffn=9)},
}
NORMED = {
    "latent norm": {"latent_norm": True, "r": 5},
    "both norms": {"latent_norm": True, "qk_norm": True, "num_kv_heads": 2, "r": 5},
    "latent silu": {"latent_activation": "silu", "num_kv_heads": 2, "r": Ranks(3, 4, 5, 6, 9)},
}
OF_LLAMA = ("vanilla", "lpa", "grouped lpa", "tied", "qk norm")
EVERY = (
    {k: v for k, v in VARIANTS.items() if k in OF_LLAMA}
    | NORMED
    | {f"paper-1 {k}": {"family": "paper-1", **v} for k, v in PAPER.items()}
)
every = pytest.mark.parametrize("changes", EVERY.values(), ids=EVERY.keys())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(**changes: Any) -> Transformer:
    """A model in float64 and eval mode, with weights that leave nothing at a special value: scores
    far from uniform, norm weights not 1, biases not 0.
    """
    model = Transformer(ModelConfig(**(SHAPE | changes)))
    init_weights(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif "embedding" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.3 * noise / math.sqrt(parameter.size(1)))
    return model.double().eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits64(model: Transformer, ids: Tensor, cache: KVCache | None = None) -> Tensor:
    """Logits before forward rounds them to float32."""
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(ids, cache=cache)
    handle.remove()
    return seen[0]


def dense_weight(layer: nn.Module) -> Tensor:
    return layer.weight if isinstance(layer, nn.Linear) else layer.B @ layer.A


# --- family llama against transformers -----------------------------------------------------------


class ExactRotary(nn.Module):
    """The angles in float64, the table in float32, as our model has it by definition."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        exponents = -torch.arange(0, self.head_dim, 2).double() / self.head_dim
        angles = position_ids[..., None].double() * torch.tensor(self.theta).double() ** exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().float().to(x.dtype), angles.sin().float().to(x.dtype)


def llama(model: Transformer, exact: bool) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """transformers' model with our weights; Qwen3 is Llama with qk_norm. exact: with norms in
    float64 and a better rotary table, because both of transformers' own are float32 whatever the
    dtype of the model.
    """
    ours = model.config
    kind = (Qwen3ForCausalLM, Qwen3Config) if ours.qk_norm else (LlamaForCausalLM, LlamaConfig)
    theirs = kind[0](
        kind[1](
            vocab_size=ours.vocab_size,
            hidden_size=ours.hidden_size,
            intermediate_size=ours.intermediate_size,
            num_hidden_layers=ours.num_layers,
            num_attention_heads=ours.num_heads,
            num_key_value_heads=ours.num_kv_heads,
            head_dim=ours.head_dim,
            max_position_embeddings=ours.max_seq_len,
            rms_norm_eps=ours.norm_eps,
            tie_word_embeddings=ours.tie_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
            attn_implementation="sdpa",
        )
    )
    theirs = theirs.double().eval()
    inner, state = theirs.model, {}
    state["model.embed_tokens.weight"] = model.token_embedding.weight
    state["model.norm.weight"] = model.final_norm.weight
    state["lm_head.weight"] = model.lm_head.weight
    for i, block in enumerate(model.layers):
        prefix = f"model.layers.{i}."
        state[prefix + "input_layernorm.weight"] = block.attention_norm.weight
        state[prefix + "post_attention_layernorm.weight"] = block.feed_forward_norm.weight
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            state[f"{prefix}self_attn.{name}.weight"] = dense_weight(getattr(block.attention, name))
        for name in ("q_norm", "k_norm") if ours.qk_norm else ():
            state[f"{prefix}self_attn.{name}.weight"] = getattr(block.attention, name).weight
        for name in ("gate_proj", "up_proj", "down_proj"):
            state[f"{prefix}mlp.{name}.weight"] = dense_weight(getattr(block.feed_forward, name))
    theirs.load_state_dict({k: v.detach().clone() for k, v in state.items()}, strict=True)
    if exact:
        inner.rotary_emb = ExactRotary(ours)
        for layer in inner.layers:
            layer.input_layernorm = double_norm(layer.input_layernorm)
            layer.post_attention_layernorm = double_norm(layer.post_attention_layernorm)
            for name in ("q_norm", "k_norm") if ours.qk_norm else ():
                setattr(layer.self_attn, name, double_norm(getattr(layer.self_attn, name)))
        inner.norm = double_norm(inner.norm)
    return theirs


def double_norm(norm: nn.Module) -> nn.Module:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scale = (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
            return x / scale * self.weight

    exact = Norm()
    exact.weight = norm.weight
    return exact


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_are_those_of_llama(changes):
    """Everything in float64 but the rotary table, which is the same in both: what is left is the
    order of float64 sums.
    """
    model = build(**changes)
    theirs = llama(model, exact=True)
    for length in (1, 2, 17, LONGEST):
        ids = tokens(2, length)
        assert_close(logits64(model, ids), theirs(ids).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_are_those_of_llama_as_it_ships(changes):
    """transformers' norms and angles are float32: 6e-8 relative in each norm, up to 3e-6 rad at
    position 47, and 3 layers over logits of up to about 10.
    """
    model, ids = build(**changes), tokens(2, LONGEST)
    assert_close(model(ids).double(), llama(model, exact=False)(ids).logits, rtol=0, atol=1e-4)


def test_the_llama_oracle_is_sensitive():
    """A change of one weight in a thousand shows, so the tolerances above mean something."""
    model, ids = build(), tokens(2, LONGEST)
    theirs = llama(model, exact=True)
    with torch.no_grad():
        theirs.model.layers[1].self_attn.k_proj.weight[0, 0] += 1e-3
    difference = (logits64(model, ids) - theirs(ids).logits).abs().max()
    assert difference > 1e-6


@pytest.mark.parametrize("changes", [{}, {"r": 5}, {"num_kv_heads": 2, "r": 5}])
def test_loss_is_that_of_llama(changes):
    """Their labels are our targets one position later. The loss itself is taken in float32."""
    model, ids = build(**changes), tokens(3, LONGEST)
    ignored = torch.full((3, 1), -100)
    labels = ids.clone()
    labels[0, :20] = -100
    loss = model(ids, torch.cat((labels[:, 1:], ignored), dim=1))
    theirs = llama(model, exact=True)(ids, labels=labels)
    assert loss.dtype == torch.float32
    assert_close(loss.double(), theirs.loss.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("changes", [{}, {"r": 5}, {"num_kv_heads": 2, "r": 5, "qk_norm": True}])
def test_gradients_are_those_of_llama(changes):
    """Of a dense weight, and of factors by the chain rule. Backward enters through the float32 of
    the logits, hence 1e-6 and not 1e-11.
    """
    model, ids = build(**changes), tokens(2, LONGEST)
    theirs = llama(model, exact=True)
    model(ids[:, :-1], ids[:, 1:]).backward()
    F.cross_entropy(theirs(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).backward()

    def close(actual: Tensor, expected: Tensor) -> None:
        assert_close(actual, expected, rtol=0, atol=1e-6 * expected.abs().max().item())

    for block, other in zip(model.layers, theirs.model.layers, strict=True):
        close(block.feed_forward.down_proj.weight.grad, other.mlp.down_proj.weight.grad)
        close(block.feed_forward.gate_proj.weight.grad, other.mlp.gate_proj.weight.grad)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            layer = getattr(block.attention, name)
            grad = getattr(other.self_attn, name).weight.grad
            if isinstance(layer, nn.Linear):
                close(layer.weight.grad, grad)
            else:
                close(layer.B.grad, grad @ layer.A.T)
                close(layer.A.grad, layer.B.T @ grad)
        for name in ("q_norm", "k_norm") if model.config.qk_norm else ():
            ours, oracle = getattr(block.attention, name), getattr(other.self_attn, name)
            close(ours.weight.grad, oracle.weight.grad)
    close(model.token_embedding.weight.grad, theirs.model.embed_tokens.weight.grad)


# --- family paper-1 against a forward written out ------------------------------------------------


def paper_projection(layer: nn.Module, x: Tensor, silu: bool = False) -> Tensor:
    state = dict(layer.named_parameters())
    if "weight" in state:
        return x @ state["weight"].T + state["bias"]
    y = x @ state["A"].T + state.get("bias_A", 0.0)
    if "latent_norm.weight" in state:
        scale = math.sqrt(x.size(-1) / y.size(-1))
        y = scale * root_mean_square_norm(y, state["latent_norm.weight"])
    if silu:
        y = y / (1 + (-y).exp())
    return y @ state["B"].T + state.get("bias_B", 0.0)


def root_mean_square_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight


def paper_norm(norm: nn.LayerNorm, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * norm.weight + norm.bias


def paper_forward(model: Transformer, ids: Tensor) -> Tensor:
    """Setting 1: x + LN(attention(x)), then x + LN(W_2 relu(W_1 x)); no final norm."""
    config, (B, T) = model.config, ids.shape
    H, D, eps = config.num_heads, config.head_dim, config.norm_eps
    silu = config.latent_activation == "silu"
    x = model.token_embedding.weight[ids] + model.position_embedding.weight[:T]
    for block in model.layers:
        attention = block.attention
        q, k, v = (
            paper_projection(layer, x, silu).reshape(B, T, H, D).transpose(1, 2)
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if config.qk_norm:
            q = root_mean_square_norm(q, attention.q_norm.weight)
            k = root_mean_square_norm(k, attention.k_norm.weight)
        scores = q @ k.transpose(-1, -2) / math.sqrt(D)
        hidden = torch.tril(torch.ones(T, T)) == 0
        y = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        y = paper_projection(attention.o_proj, y.transpose(1, 2).reshape(B, T, H * D), silu)
        x = x + paper_norm(block.attention_norm, y, eps)
        y = paper_projection(block.feed_forward.up_proj, x, silu).clamp(min=0)
        y = paper_projection(block.feed_forward.down_proj, y, silu)
        x = x + paper_norm(block.feed_forward_norm, y, eps)
    logits = x @ model.lm_head.weight.T
    return logits if model.lm_head.bias is None else logits + model.lm_head.bias


@pytest.mark.parametrize("changes", PAPER.values(), ids=PAPER.keys())
def test_paper_1_is_its_definition(changes):
    model = build(family="paper-1", norm_eps=1e-3, **changes)
    for length in (1, 17, LONGEST):
        ids = tokens(2, length)
        assert_close(logits64(model, ids), paper_forward(model, ids), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("r", "biases"),
    [
        (None, {"q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"}),
        (5, {"q_proj.bias_A", "k_proj.bias_A", "v_proj.bias_A", "o_proj.bias_B"}),
    ],
)
def test_paper_1_has_its_biases(r, biases):
    attention = build(family="paper-1", r=r).layers[0].attention
    assert {n for n, p in attention.named_parameters() if p.ndim == 1} == biases


# --- properties ----------------------------------------------------------------------------------


@every
def test_a_token_changes_nothing_before_it(changes):
    model, ids, at = build(**changes), tokens(2, 20), 13
    other = ids.clone()
    other[:, at] = (other[:, at] + 1) % VOCAB
    before, after = logits64(model, ids), logits64(model, other)
    assert before[:, :at].equal(after[:, :at])
    changed = (before - after).abs().amax((0, 2))
    assert (changed[at:] > 1e-6).all()


@every
def test_a_prefix_has_the_logits_it_has_in_the_whole(changes):
    model, ids = build(**changes), tokens(2, LONGEST)
    whole = logits64(model, ids)
    for length in (1, 9):
        assert_close(logits64(model, ids[:, :length]), whole[:, :length], rtol=0, atol=1e-11)


@every
def test_sequences_of_a_batch_are_independent(changes):
    model, ids = build(**changes), tokens(4, 20)
    together = logits64(model, ids)
    for row in range(4):
        alone = logits64(model, ids[row : row + 1])
        assert_close(together[row : row + 1], alone, rtol=0, atol=1e-11)


@every
def test_order_of_tokens_matters(changes):
    """Positions are seen: the last token's logits change when two earlier ones swap."""
    model, ids = build(**changes), tokens(1, 12)
    swapped = ids[:, [1, 0, *range(2, 12)]]
    assert ids[0, 0] != ids[0, 1]
    assert (logits64(model, ids) - logits64(model, swapped))[:, -1].abs().max() > 1e-4


def test_loss_is_cross_entropy_in_nats():
    model, ids = build(r=5), tokens(2, 20)
    targets = tokens(2, 20, seed=1)
    log_probabilities = logits64(model, ids).log_softmax(-1)
    expected = -log_probabilities.gather(-1, targets[..., None])[..., 0]
    each = model(ids, targets, reduction="none")
    assert each.shape == (2, 20)
    assert_close(each.double(), expected, rtol=1e-5, atol=1e-6)
    assert_close(model(ids, targets).double(), expected.mean(), rtol=1e-6, atol=0)


def test_ignored_targets_count_for_nothing():
    model, ids, targets = build(r=5), tokens(2, 20), tokens(2, 20, seed=1)
    some = targets.clone()
    some[0, 3:18] = -100
    some[1, ::2] = -100
    kept = some != -100
    each = model(ids, some, reduction="none")
    assert each[kept].equal(model(ids, targets, reduction="none")[kept])
    assert each[~kept].equal(torch.zeros(int((~kept).sum())))
    assert_close(model(ids, some), each[kept].mean(), rtol=1e-6, atol=0)


def test_ignored_targets_have_no_gradient():
    model, ids = build(), tokens(1, 10)
    targets = torch.full((1, 10), -100)
    targets[0, 4] = 7
    model(ids, targets).backward()
    later = set(ids[0, 5:].tolist()) - set(ids[0, :5].tolist())
    assert later
    assert model.token_embedding.weight.grad[sorted(later)].abs().max() == 0
    assert model.token_embedding.weight.grad[ids[0, 4]].abs().max() > 0


@every
def test_a_sequence_over_the_longest_is_refused(changes):
    model = build(**changes)
    assert model(tokens(1, LONGEST)).shape == (1, LONGEST, VOCAB)
    with pytest.raises(ValueError, match=rf"{LONGEST + 1} .*model\.max_seq_len {LONGEST}"):
        model(tokens(1, LONGEST + 1))


def cache_for(model: Transformer, batch: int, capacity: int = LONGEST) -> KVCache:
    return KVCache(model.config, batch, capacity, torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("chunks", [(48,), (1,) * 48, (20, 9, 1, 1, 17), (1, 30, 1, 16)])
@every
def test_decoding_in_chunks_is_the_forward(changes, chunks):
    """Prefill, chunks behind a filled cache, and single tokens."""
    model, ids = build(**changes), tokens(2, LONGEST)
    cache, parts = cache_for(model, 2), []
    cache.keys.fill_(math.nan)  # memory that is read before it is written shows
    cache.values.fill_(math.nan)
    with torch.no_grad():
        for chunk in ids.split(chunks, dim=1):
            parts.append(logits64(model, chunk, cache))
        assert cache.length == LONGEST
        whole = logits64(model, ids)
    assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-11)


def test_cache_holds_key_value_heads_alone():
    model = build(num_kv_heads=2)
    assert cache_for(model, 3, 10).keys.shape == (3, 3, 10, 2, 8)


def test_a_full_cache_is_refused():
    model, cache = build(), cache_for(build(), 1, capacity=6)
    model(tokens(1, 4), cache=cache)
    with pytest.raises(ValueError, match="6 tokens, 7"):
        model(tokens(1, 3), cache=cache)
    assert cache.length == 4
    model(tokens(1, 2), cache=cache)
    assert cache.length == 6


@every
def test_a_cache_does_not_go_past_the_longest_sequence(changes):
    model = build(**changes)
    cache = cache_for(model, 1, capacity=LONGEST + 10)
    model(tokens(1, LONGEST), cache=cache)
    with pytest.raises(ValueError, match=r"model\.max_seq_len"):
        model(tokens(1, 1), cache=cache)


@pytest.mark.parametrize("family", ["llama", "paper-1"])
def test_dropout_acts_in_training_alone(family):
    dropping, ids = build(family=family, dropout=0.4), tokens(2, 20)
    still = build(family=family, dropout=0.0)
    assert logits64(dropping, ids).equal(logits64(still, ids))
    dropping.train(), still.train()
    assert logits64(still, ids).equal(logits64(still.eval(), ids))
    torch.manual_seed(0)
    first, second = logits64(dropping, ids), logits64(dropping, ids)
    assert not torch.allclose(first, second, atol=1e-3)
    torch.manual_seed(0)
    assert logits64(dropping, ids).equal(first)


@pytest.mark.parametrize("family", ["llama", "paper-1"])
def test_dropout_is_before_each_residual_addition(family):
    """With everything dropped, what is left is the embedding: both additions are covered."""
    model, ids = build(family=family, dropout=0.5), tokens(2, 20)
    model.train()
    for block in model.layers:
        block.dropout.p = 1.0
    x = model.token_embedding(ids)
    if model.position_embedding is not None:
        x = x + model.position_embedding.weight[:20]
    assert logits64(model, ids).equal(model.lm_head(model.final_norm(x)))


@every
def test_the_state_is_the_parameters(changes):
    model = build(**changes)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert list(model.buffers()) == []
    assert set(model.state_dict()) == names
    again = Transformer(model.config).double().eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert logits64(again, tokens(2, 9)).equal(logits64(model, tokens(2, 9)))


def test_a_tied_head_is_the_embedding():
    model = build(tie_embeddings=True)
    assert model.lm_head.weight is model.token_embedding.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    untied = build()
    assert untied.lm_head.weight is not untied.token_embedding.weight


@every
def test_logits_and_loss_are_float32(changes):
    ids = tokens(2, 9)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model = build(**changes).to(dtype)
        assert model(ids).dtype == model(ids, ids).dtype == torch.float32


def first_rotary(model: Transformer, length: int) -> tuple[Tensor, Tensor]:
    seen: list[Any] = []
    hook = model.layers[0].attention.register_forward_pre_hook(lambda _m, args: seen.append(args))
    model(torch.zeros(1, length, dtype=torch.long))
    hook.remove()
    return seen[0][1]


def test_a_cast_model_keeps_its_rotary_table():
    """In bfloat16, positions over 256 are not even integers apart."""
    model = build(max_seq_len=4096, num_layers=1)
    exact = first_rotary(model, 4096)
    cast = first_rotary(copy.deepcopy(model).to(torch.bfloat16).float().to(torch.bfloat16), 4096)
    for a, b in zip(exact, cast, strict=True):
        assert b.dtype == torch.float32
        assert a.equal(b)


def test_bfloat16_is_as_good_at_late_positions_as_at_early_ones():
    """The error of the logits in bfloat16 does not grow along 2048 positions."""
    model, ids = build(max_seq_len=2048, num_layers=2, r=5), tokens(2, 2048)
    with torch.no_grad():
        exact = logits64(model, ids)
        error = (copy.deepcopy(model).to(torch.bfloat16)(ids) - exact).square().mean((0, 2)).sqrt()
    scale = exact.square().mean().sqrt()
    early, late = error[16:272].mean() / scale, error[-256:].mean() / scale
    assert early < 0.03
    assert late < 1.5 * early
