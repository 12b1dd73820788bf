"""Adapters: their formulas, what they are attached to, and what all methods have in common."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.delta import (
    AdapterConfig,
    BitFitConfig,
    CompacterConfig,
    DeltaConfig,
    Deltas,
    LoraConfig,
    LowRankAdapterConfig,
    ParallelAdapterConfig,
    config_from_dict,
)
from model.delta.files import fingerprint, load_delta, save_delta
from model.delta.merge import merge
from tests.model.delta.backbones import FAMILIES, gpt2, llama, logits, ours, plain, randomise

PROJECTIONS = ["q_proj", "o_proj", "down_proj"]
CONFIGS: dict[str, DeltaConfig] = {
    "adapter": AdapterConfig(targets=PROJECTIONS, bottleneck_dim=4),
    "parallel": ParallelAdapterConfig(targets=PROJECTIONS, bottleneck_dim=4, scale=2.0),
    "low rank": LowRankAdapterConfig(targets=PROJECTIONS, bottleneck_dim=4, rank=2),
    "compacter": CompacterConfig(targets=PROJECTIONS, bottleneck_dim=4, hypercomplex_division=2),
    "bitfit": BitFitConfig(),
}
SUB_LAYERS = {"ours": ["attention", "feed_forward"], "llama": ["self_attn", "mlp"]}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_family = pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)


def tuned(model: nn.Module, *configs: DeltaConfig) -> Deltas:
    """Deltas named by number that add something."""
    deltas = Deltas(model)
    for number, config in enumerate(configs):
        randomise(deltas.add(str(number), config), number)
    return deltas.double()


def x_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# --- formulas ------------------------------------------------------------------------------------

BY_HAND = {
    "relu": lambda h: h * (h > 0),
    "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
    "silu": lambda h: h / (1 + (-h).exp()),
    "tanh": lambda h: (h.exp() - (-h).exp()) / (h.exp() + (-h).exp()),
}


@pytest.mark.parametrize("activation", BY_HAND)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_the_formula(activation, bias, parallel):
    model, x = plain(), x_of(5, 12)
    y = model.first(x)
    more = {"targets": ["first"], "bottleneck_dim": 3, "activation": activation, "bias": bias}
    config = ParallelAdapterConfig(**more, scale=1.7) if parallel else AdapterConfig(**more)
    layer = tuned(model, config)["0"].layer("first")
    part = {name: value.detach() for name, value in layer.named_parameters()}
    assert len(part) == (4 if bias else 2)
    h = (x if parallel else y) @ part["down.weight"].T + part.get("down.bias", 0)
    added = BY_HAND[activation](h) @ part["up.weight"].T + part.get("up.bias", 0)
    torch.testing.assert_close(model.first(x), y + (1.7 if parallel else 1) * added)


def test_a_low_rank_adapter_is_an_adapter_of_products():
    model, x = plain(), x_of(5, 12)
    layer = tuned(model, LowRankAdapterConfig(targets=["first"], bottleneck_dim=6, rank=2))["0"]
    layer = layer.layer("first")
    assert layer.down.matrix().shape == (6, 20)
    assert torch.linalg.matrix_rank(layer.down.matrix()) == 2
    down, up = layer.down.left @ layer.down.right, layer.up.left @ layer.up.right
    bare = F.linear(x, model.first.weight, model.first.bias)
    expected = bare + F.linear(F.gelu(F.linear(bare, down, layer.down.bias)), up, layer.up.bias)
    torch.testing.assert_close(model.first(x), expected)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 2 * (20 + 6) + 20 + 6


@pytest.mark.parametrize("rank", [1, 2, None])
def test_a_compacter_projection_is_a_sum_of_kronecker_products(rank):
    model = plain()
    config = CompacterConfig(targets=["first"], bottleneck_dim=8, phm_rank=rank)
    layer = tuned(model, config)["0"].layer("first")
    for part, shape in ((layer.down, (8, 20)), (layer.up, (20, 8))):
        expected = torch.zeros(shape, dtype=torch.float64)
        for i in range(4):
            B = part.B[i] if rank is None else part.s[i] @ part.t[i]
            expected += torch.kron(part.A[i], B)
        torch.testing.assert_close(part.matrix(), expected)
    x = x_of(5, 12)
    y = F.linear(x, model.first.weight, model.first.bias)
    h = F.gelu(F.linear(y, layer.down.matrix(), layer.down.bias))
    torch.testing.assert_close(model.first(x), y + F.linear(h, layer.up.matrix(), layer.up.bias))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rank", [1, 3, None])
def test_parameters_of_compacter(shared, rank):
    """Mahabadi et al. 2021, section 4.3: 2 r (d + m) a layer and n³ in all, beside the biases."""
    d, m, n, layers = 24, 12, 4, 4
    more = {"bottleneck_dim": m, "shared": shared, "phm_rank": rank}
    delta = Deltas(ours()).add("a", CompacterConfig(**more))
    products = 2 * d * m // n if rank is None else 2 * rank * (d + m)
    rules = n**3 if shared else 2 * layers * n**3
    assert delta.num_parameters() == layers * (products + d + m) + rules
    found = {id(part.A) for _, layer in delta.named_layers() for part in (layer.down, layer.up)}
    assert len(found) == (1 if shared else 2 * layers)


def test_new_projections_have_the_variance_of_an_input_of_unit_scale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512))
    common = {"targets": ["0"], "bottleneck_dim": 256}
    for config in (
        LowRankAdapterConfig(**common, rank=16),
        CompacterConfig(**common, phm_rank=None),
        CompacterConfig(**common, phm_rank=16, hypercomplex_division=16),
    ):
        layer = Deltas(model).add("a", config).layer("0")
        assert layer.down.matrix().var().item() == pytest.approx(1 / 512, rel=0.25)
        assert not layer.up.matrix().any()


# --- where ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", SUB_LAYERS)
@pytest.mark.parametrize("parallel", [True, False])
def test_whole_sub_layers(backbone, parallel):
    """Against sub-layers whose forward has the adapter written out."""
    model = ours(r=6) if backbone == "ours" else llama()
    bare = logits(model)
    kind = ParallelAdapterConfig if parallel else AdapterConfig
    deltas = tuned(model, kind(targets=SUB_LAYERS[backbone], bottleneck_dim=4))
    found = logits(model)
    deltas.detach()
    for path, layer in deltas["0"].named_layers():
        module = model.get_submodule(path)

        def forward(*args, inner=module.forward, layer=layer, **kwargs):
            y = inner(*args, **kwargs)
            out = y[0] if isinstance(y, tuple) else y
            z = (args[0] if args else kwargs["hidden_states"]) if parallel else out
            out = out + layer.up(F.gelu(layer.down(z)))
            return (out, *y[1:]) if isinstance(y, tuple) else out

        module.forward = forward
    assert not torch.allclose(found, bare)
    torch.testing.assert_close(found, logits(model), rtol=1e-11, atol=1e-13)


class Doubling(nn.Module):
    """A sub-layer without a matrix."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """2 x."""
        return 2 * x


def test_a_width_that_cannot_be_told_is_asked_for():
    model = nn.Sequential(Doubling()).double()
    with pytest.raises(ValueError, match="width: null, but 0, a Doubling, has no matrix inside"):
        Deltas(model).add("a", AdapterConfig(targets=["0"]))
    deltas = tuned(model, AdapterConfig(targets=["0"], width=6, bottleneck_dim=2))
    layer, x = deltas["0"].layer("0"), x_of(3, 6)
    torch.testing.assert_close(model(x), 2 * x + layer.up(F.gelu(layer.down(2 * x))))
    norm = nn.Sequential(nn.LayerNorm(9))
    adapter = Deltas(norm).add("a", AdapterConfig(targets=["0"])).layer("0")
    assert adapter.down.matrix().shape == (24, 9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdapterConfig(bottleneck_dim=0), "bottleneck_dim: 0"),
        (lambda: AdapterConfig(width=0), "width: 0"),
        (lambda: LowRankAdapterConfig(rank=25), "rank: 25; allowed is 1 to bottleneck_dim 24"),
        (lambda: CompacterConfig(hypercomplex_division=5), "a divisor of bottleneck_dim 24"),
        (lambda: CompacterConfig(hypercomplex_division=0), "hypercomplex_division: 0"),
        (lambda: CompacterConfig(phm_rank=7), "phm_rank: 7; allowed is 1 to 6"),
    ],
)
def test_wrong_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LowRankAdapterConfig(targets=["second"], rank=7), "rank: 7 at second, 6 wide"),
        (CompacterConfig(targets=["second"]), "hypercomplex_division: 4 at second, 6 wide"),
        (
            CompacterConfig(targets=["second"], hypercomplex_division=6, phm_rank=2),
            "6 at second, 6 wide, with phm_rank 2",
        ),
    ],
)
def test_what_does_not_fit_a_target(config, message):
    with pytest.raises(ValueError, match=message):
        Deltas(plain()).add("a", config)


# --- what all methods have in common -------------------------------------------------------------


@every_config
@every_family
def test_attaching_is_exact(changes, config):
    model = ours(**changes)
    before, keys = logits(model), list(model.state_dict())
    deltas = Deltas(model)
    delta = deltas.add("a", config)
    deltas.double()
    assert torch.equal(logits(model), before)  # nothing is added at first
    assert list(model.state_dict()) == keys
    randomise(delta)
    with_it = logits(model)
    assert not torch.allclose(with_it, before)
    with deltas.detached():
        assert torch.equal(logits(model), before)
        assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(logits(model), with_it)
    deltas.freeze_backbone()
    logits(model).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.any() for p in delta.parameters())


@every_config
def test_rows_and_several_at_once(config):
    model = ours(r=6)
    deltas = tuned(model, config, config, LoraConfig(r=3))
    alone = {}
    for name in ("0", "1", "2", None):
        deltas.activate(*([name] if name else []))
        alone[name] = logits(model)
    for rows in (["1", None, "0"], ["2", "0", "0"]):
        with deltas.rows(rows):
            mixed = logits(model)
        for row, name in enumerate(rows):
            torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-10, atol=1e-12)
    deltas.activate("0", "2")
    both = logits(model)
    assert all(not torch.allclose(both, one) for one in alone.values())


@every_config
def test_files_merging_and_dictionaries(tmp_path: Path, config):
    model = ours(torch.float32, r=6)
    deltas = Deltas(model)
    randomise(deltas.add("a", config))
    expected = logits(model)
    save_delta(deltas["a"], tmp_path / "a", fingerprint(model))
    with pytest.raises(ValueError, match="adds no low-rank matrix to a weight"):
        merge(deltas, "a")
    fresh = ours(torch.float32, r=6)
    found = load_delta(tmp_path / "a", fresh).delta
    Deltas(fresh).insert("b", found)
    assert torch.equal(logits(fresh), expected)
    assert found.num_parameters() == deltas["a"].num_parameters()
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="allowed is"):
        config_from_dict(config.to_dict() | {"targets": "q_proj"})


@every_config
def test_checkpointing_and_compilation(config):
    model, x = plain(), x_of(5, 12)
    deltas = tuned(model, config_from_dict(config.to_dict() | {"targets": ["first", "second"]}))
    deltas.freeze_backbone()
    expected = model(x)
    expected.square().sum().backward()
    wanted = [p.grad.clone() for p in deltas.parameters()]
    deltas.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for parameter, gradient in zip(deltas.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("autocast", [True, False])
@every_config
def test_bfloat16_backbones(config, autocast):
    model = ours(torch.float32 if autocast else torch.bfloat16, r=6)
    deltas = Deltas(model)
    randomise(deltas.add("a", config), std=0.1)
    exact = ours(r=6)
    exact.load_state_dict(model.state_dict())
    other = Deltas(exact)
    other.add("a", config)
    other.load_state_dict(deltas.state_dict())
    other.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = logits(model)
    assert (found.double() - logits(exact)).norm() / logits(exact).norm() < 0.03


@every_config
def test_conv1d_of_transformers(config):
    model = gpt2()
    before = logits(model)
    targets = ["c_proj", "ln_1"] if config.method == "bitfit" else ["c_proj"]
    changed = config_from_dict(config.to_dict() | {"targets": targets})
    deltas = tuned(model, changed)
    assert not torch.allclose(logits(model), before)
    deltas.detach()
    assert torch.equal(logits(model), before)
