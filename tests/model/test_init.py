"""The distribution of every initial parameter, and what it may and may not depend on."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import ModelConfig, Ranks, Transformer, init_weights
from model.projection import LowDim

SHAPE: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_layers": 8,
    "num_heads": 4,
    "max_seq_len": 64,
}
LAYERS = 8
STD = 0.02
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
VARIANTS = {
    "vanilla": {},
    "lpa": {"r": 12},
    "all low": {"r": Ranks(q=4, k=8, v=12, o=16, ffn=20)},
    "tied": {"tie_embeddings": True},
    "head bias": {"lm_head_bias": True},
    "paper-1": {"family": "paper-1"},
    "paper-1 lpa": {"family": "paper-1", "r": 12},
    "paper-1 all low": {"family": "paper-1", "r": Ranks(q=4, k=8, v=12, o=16, ffn=20)},
    "norms": {"qk_norm": True, "latent_norm": True, "r": 12},
    "paper-1 norms": {"family": "paper-1", "qk_norm": True, "latent_norm": True, "r": 12},
    "zero": {"zero_init_outputs": True, "r": Ranks(q=4, k=8, v=12, o=16)},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
inits = pytest.mark.parametrize("init", ["matched", "authors"])


def initialised(seed: int = 0, **changes: Any) -> Transformer:
    model = Transformer(ModelConfig(**(SHAPE | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    init_weights(model, seed)
    return model


def layers_named(model: Transformer, name: str) -> list[nn.Module]:
    return [
        getattr(owner, name)
        for block in model.layers
        for owner in (block.attention, block.feed_forward)
        if hasattr(owner, name)
    ]


def mean_square(tensors: list[Tensor]) -> float:
    """The variance, for a distribution of mean 0."""
    return torch.stack([t.detach().double().square().mean() for t in tensors]).mean().item()


def product_error(d_in: int, d_out: int, rank: int, count: int) -> float:
    """Relative standard deviation of the mean square of `count` products B·A of normal factors.

    The entries of one product are uncorrelated but not independent: ||BA||² moves with ||A||²
    (2 / (r d_in)) and ||B||² (2 / (r d_out)) and as much as for free entries (2 / (d_in d_out)).
    """
    return math.sqrt((2 / (rank * d_in) + 2 / (rank * d_out) + 2 / (d_in * d_out)) / count)


def check_matched(model: Transformer, name: str) -> None:
    """The weight of a projection, dense or a product, has the documented variance."""
    layers = layers_named(model, name)
    std = STD / math.sqrt(2 * LAYERS) if name in ("o_proj", "down_proj") else STD
    if isinstance(layers[0], LowDim):
        weights = [layer.B @ layer.A for layer in layers]
        tolerance = 4 * product_error(layers[0].d_in, layers[0].d_out, layers[0].rank, len(layers))
    else:
        weights = [layer.weight for layer in layers]
        tolerance = 4 * math.sqrt(2 / (weights[0].numel() * len(layers)))
    assert tolerance < 0.2
    assert len(layers) == LAYERS
    assert mean_square(weights) == pytest.approx(std**2, rel=tolerance)


@pytest.mark.parametrize("name", ATTENTION + FEED_FORWARD)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"r": Ranks(q=8, k=8, v=8, o=8, ffn=8)},
        {"r": Ranks(q=64, k=64, v=64, o=64, ffn=64)},
        {"r": Ranks(q=4, k=9, v=17, o=30, ffn=40), "hidden_size": 128},
        {"r": Ranks(q=16, k=16, v=16, o=16), "num_kv_heads": 2, "head_dim": 48},
    ],
)
def test_a_product_has_the_variance_of_the_dense_weight(changes, name):
    check_matched(initialised(**changes), name)


@pytest.mark.parametrize("name", ATTENTION)
def test_the_latent_has_the_scale_of_the_input(name):
    """A has variance 1/d_in, so A x has the mean square of x."""
    model = initialised(r=24)
    assert mean_square([layer.A for layer in layers_named(model, name)]) == pytest.approx(
        1 / 96, rel=4 * math.sqrt(2 / (24 * 96 * LAYERS))
    )


@pytest.mark.parametrize("count", [2, 32])
def test_residual_outputs_shrink_with_the_depth(count):
    model = initialised(num_layers=count, r=Ranks(ffn=64))
    for name in ("o_proj", "down_proj"):
        weights = [
            layer.B @ layer.A if isinstance(layer, LowDim) else layer.weight
            for layer in layers_named(model, name)
        ]
        assert mean_square(weights) == pytest.approx(STD**2 / (2 * count), rel=0.1)


def test_init_std_scales_weights_and_embeddings():
    small, large = initialised(init_std=0.01, r=12), initialised(init_std=0.05, r=12)
    for name, parameter in small.named_parameters():
        other = large.get_parameter(name)
        fixed = name.endswith((".A", "norm.weight"))
        torch.testing.assert_close(parameter * (1 if fixed else 5), other)


@pytest.mark.parametrize("rank", [6, 24, 96])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
def test_a_latent_norm_keeps_the_variance_of_the_output(name, rank):
    """s² d_in for an input of unit scale, that of a dense weight; and for one of any other scale,
    which the norm takes out. An output's error is that of ||B||², the latent's length being fixed.
    """
    ranks = Ranks(q=rank, k=rank, v=rank, o=rank, ffn=rank)
    for scale in (1.0, 30.0):
        outputs = []
        for layer in layers_named(initialised(r=ranks, latent_norm=True), name):
            x = torch.randn(500, layer.d_in, generator=torch.Generator().manual_seed(5))
            outputs.append(layer(scale * x))
        expected = STD**2 * layer.d_in
        tolerance = 5 * math.sqrt(2 / (rank * layer.d_out * LAYERS) + 2 / (500 * rank))
        assert mean_square(outputs) == pytest.approx(expected, rel=tolerance)


def test_a_latent_norm_leaves_the_outputs_of_sub_layers_alone():
    ranks = Ranks(12, 12, 12, 12, 20)
    normed, plain = initialised(r=ranks, latent_norm=True), initialised(r=ranks)
    for name in ("o_proj", "down_proj"):
        x = torch.randn(7, layers_named(plain, name)[0].d_in)
        for one, other in zip(layers_named(normed, name), layers_named(plain, name), strict=True):
            assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("rank", [6, 24, 96])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
def test_a_latent_silu_keeps_the_variance_of_the_output(name, rank):
    """s² d_in for an input of unit scale."""
    ranks = Ranks(q=rank, k=rank, v=rank, o=rank, ffn=rank)
    outputs = []
    for layer in layers_named(initialised(r=ranks, latent_activation="silu"), name):
        x = torch.randn(2000, layer.d_in, generator=torch.Generator().manual_seed(5))
        outputs.append(layer(x))
    tolerance = 5 * math.sqrt(2 / (rank * layer.d_out * LAYERS) + 20 / (rank * LAYERS * 96))
    assert mean_square(outputs) == pytest.approx(STD**2 * 96, rel=tolerance + 0.02)


@pytest.mark.parametrize("rank", [12, 48])
def test_a_latent_norm_multiplies_the_authors_variance(rank):
    """By 3 d_in/r for an input of unit scale."""
    found = {}
    x = torch.randn(500, 96, generator=torch.Generator().manual_seed(5))
    for normed in (True, False):
        model = initialised(init="authors", r=rank, latent_norm=normed)
        found[normed] = mean_square([layer(x) for layer in layers_named(model, "q_proj")])
    assert found[True] / found[False] == pytest.approx(3 * 96 / rank, rel=0.15)


@inits
@pytest.mark.parametrize("changes", [{}, {"r": Ranks(12, 12, 12, 12, 20)}, {"latent_norm": True}])
def test_blocks_that_begin_as_the_identity(changes, init):
    """The outputs are zero, all else is as without the switch, and every output's weight learns."""
    changes = {"qk_norm": True, "init": init, **changes}
    model, other = initialised(zero_init_outputs=True, **changes), initialised(**changes)
    x = torch.randn(2, 9, 96)
    for block in model.layers:
        assert block(x, model._embed(torch.zeros(1, 9).long(), torch.arange(9))[1]).equal(x)
    zero = [n for n, p in model.named_parameters() if p.count_nonzero() == 0]
    leaf = "B" if "r" in changes else "weight"
    outputs = ("attention.o_proj", "feed_forward.down_proj")
    assert zero == [f"layers.{i}.{name}.{leaf}" for i in range(LAYERS) for name in outputs]
    for name, parameter in model.named_parameters():
        assert name in zero or parameter.equal(other.get_parameter(name)), name
    ids = torch.arange(24).view(2, 12)
    model(ids, ids + 1).backward()
    assert all(model.get_parameter(name).grad.count_nonzero() for name in zero)


@pytest.mark.parametrize("rank", [6, 24, 96])
def test_the_authors_product_has_a_third_of_the_dense_variance(rank):
    """U(±1/√n) has variance 1/(3n): 1/(3 d_in) dense, r · 1/(3 d_in) · 1/(3r) = 1/(9 d_in)."""
    low = initialised(init="authors", r=rank)
    dense = initialised(init="authors")
    for name in ATTENTION:
        product = mean_square([layer.B @ layer.A for layer in layers_named(low, name)])
        weight = mean_square([layer.weight for layer in layers_named(dense, name)])
        tolerance = 4 * product_error(96, 96, rank, LAYERS)
        assert weight == pytest.approx(1 / (3 * 96), rel=0.02)
        assert product == pytest.approx(1 / (9 * 96), rel=tolerance)


@pytest.mark.parametrize("changes", [{}, {"r": Ranks(q=12, k=12, v=12, o=12, ffn=20)}])
@pytest.mark.parametrize("family", ["llama", "paper-1"])
def test_the_authors_weights_are_torchs_defaults(family, changes):
    """Uniform within 1/√fan_in, biases too: the extremes touch the bound and stay inside."""
    model = initialised(init="authors", family=family, lm_head_bias=True, **changes)
    bounds: dict[str, list[tuple[float, float]]] = {}
    for owner, module in model.named_modules():
        fan_in = {}
        if isinstance(module, LowDim):
            d_in, rank = module.d_in, module.rank
            fan_in = {"A": d_in, "bias_A": d_in, "B": rank, "bias_B": rank}
        elif isinstance(module, nn.Linear):
            fan_in = {"weight": module.in_features, "bias": module.in_features}
        for leaf, parameter in module.named_parameters(recurse=False):
            if leaf in fan_in:
                kind = f"{owner.rpartition('.')[2]}.{leaf}"
                extreme = parameter.detach().abs().max().item() * math.sqrt(fan_in[leaf])
                mean = parameter.detach().mean().item() * math.sqrt(fan_in[leaf])
                bounds.setdefault(kind, []).append((extreme, mean))
    assert len(bounds) > 5
    for kind, found in bounds.items():
        assert 0.9 < max(extreme for extreme, _ in found) <= 1 + 1e-6, kind
        assert abs(sum(mean for _, mean in found) / len(found)) < 0.2, kind


def test_the_authors_embeddings_are_standard_normal():
    model = initialised(init="authors", family="paper-1")
    for table in (model.token_embedding, model.position_embedding):
        assert mean_square([table.weight]) == pytest.approx(1, rel=0.08)


@pytest.mark.parametrize("family", ["llama", "paper-1"])
def test_matched_tables_and_head_have_init_std(family):
    model = initialised(family=family)
    tables = [model.token_embedding, model.lm_head]
    for table in tables + ([model.position_embedding] if family == "paper-1" else []):
        assert mean_square([table.weight]) == pytest.approx(STD**2, rel=0.08)


@inits
@variants
def test_norms_start_as_the_identity(changes, init):
    for name, parameter in initialised(init=init, **changes).named_parameters():
        if "norm" in name:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name


@variants
def test_matched_biases_start_at_zero(changes):
    model = initialised(**changes)
    biases = [n for n, p in model.named_parameters() if "bias" in n and "norm" not in n]
    assert bool(biases) == ("paper-1" in changes.values() or "lm_head_bias" in changes)
    for name in biases:
        assert (model.get_parameter(name) == 0).all(), name


@inits
@variants
def test_nothing_is_left_uninitialised(changes, init):
    for name, parameter in initialised(init=init, **changes).named_parameters():
        assert parameter.isfinite().all(), name


@inits
def test_weights_are_centred_and_different(init):
    """No two matrices of a model are the same draw."""
    model = initialised(init=init, r=Ranks(q=12, k=12, v=12))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    for matrix in matrices:
        assert abs(matrix.mean() / matrix.std()) < 5 / math.sqrt(matrix.numel())
    starts = {tuple((m.flatten()[:4] / m.std()).tolist()) for m in matrices}
    assert len(starts) == len(matrices)


@inits
@variants
def test_models_share_what_is_not_factorised(changes, init):
    """The vanilla Transformer and LPA start from the same embeddings, head and feed-forward."""
    model = dict(initialised(init=init, seed=7, **changes).named_parameters())
    same_family = {k: v for k, v in changes.items() if k != "r"}
    vanilla = dict(initialised(init=init, seed=7, **same_family).named_parameters())
    shared = [n for n in model if n in vanilla]
    assert "token_embedding.weight" in shared
    assert any("norm" in n for n in shared)
    for name in shared:
        assert model[name].equal(vanilla[name]), name
    if not isinstance(changes.get("r"), Ranks):
        assert any("feed_forward.down_proj" in n for n in shared)


@inits
@variants
def test_the_seed_decides(changes, init):
    first, again, other = (initialised(seed, init=init, **changes) for seed in (1, 1, 2))
    for name, parameter in first.named_parameters():
        assert parameter.equal(again.get_parameter(name)), name
        constant = parameter.unique().numel() == 1
        assert constant or not parameter.equal(other.get_parameter(name)), name


@inits
def test_the_global_generator_is_neither_read_nor_moved(init):
    torch.manual_seed(1)
    first = initialised(init=init, r=12)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = initialised(init=init, r=12)
    assert torch.get_rng_state().equal(state)
    for name, parameter in first.named_parameters():
        assert parameter.equal(second.get_parameter(name)), name


def test_the_start_is_pinned():
    """A reference: a change of these numbers changes every run's start, and needs a reason."""
    model = initialised(seed=0, r=12)
    embedding = model.token_embedding.weight[0, :2].tolist()
    assert embedding == pytest.approx([-0.011819807, 0.030386142], rel=1e-6)
    factor = model.layers[3].attention.o_proj.B[5, :2].tolist()
    assert factor == pytest.approx([0.0027772868, -0.019196473], rel=1e-6)


def test_gather_holds_each_parameter_while_it_is_written():
    """ZeRO stage 3: each parameter once, whole and writable inside `gather`, never outside."""
    model = Transformer(ModelConfig(**(SHAPE | {"r": 12, "tie_embeddings": True})))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    gathered: list[int] = []

    @contextmanager
    def gather(parameter: Tensor) -> Iterator[None]:
        assert parameter.isnan().all()
        yield
        assert parameter.isfinite().all()
        gathered.append(id(parameter))

    init_weights(model, 0, gather)
    assert gathered == [id(p) for p in model.parameters()]
    expected = initialised(r=12, tie_embeddings=True)
    for name, parameter in model.named_parameters():
        assert parameter.equal(expected.get_parameter(name)), name


def test_a_shard_that_is_elsewhere_is_left_alone():
    """An empty parameter, as ZeRO stage 3 leaves it on the ranks that do not write it."""
    model = Transformer(ModelConfig(**(SHAPE | {"r": 12})))
    weight = model.layers[0].attention.q_proj.B
    weight.data = torch.empty(0)
    init_weights(model, 0)
    assert weight.numel() == 0
    expected = initialised(r=12)
    assert model.lm_head.weight.equal(expected.lm_head.weight)


def test_the_dtype_only_rounds():
    half = Transformer(ModelConfig(**(SHAPE | {"r": 12}))).to(torch.bfloat16)
    init_weights(half, 0)
    for name, parameter in initialised(r=12).named_parameters():
        assert half.get_parameter(name).equal(parameter.to(torch.bfloat16)), name
