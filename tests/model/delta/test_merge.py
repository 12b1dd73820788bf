"""Merging: dense and factorised weights take a delta and give it back."""

import pytest
import torch
from torch import nn

from model.delta import DeltaConfig, Deltas, LoraConfig, SoraConfig, TiedLoraConfig
from model.delta.merge import merge, unmerge
from tests.model.delta.backbones import FAMILIES, gpt2, llama, logits, ours, plain, randomise

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
CONFIGS: dict[str, DeltaConfig] = {
    "lora": LoraConfig(targets=TARGETS, r=3, alpha=5.0),
    "sora": SoraConfig(targets=TARGETS, r=3, alpha=5.0),
    "tied": TiedLoraConfig(targets=["q_proj", "v_proj"], r=3, alpha=5.0),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_family = pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)


def tuned(model: nn.Module, *configs: DeltaConfig) -> Deltas:
    """Deltas named by number that add something."""
    deltas = Deltas(model)
    for number, config in enumerate(configs):
        randomise(deltas.add(str(number), config), number)
    return deltas.double()


@every_config
@every_family
def test_a_merged_backbone_computes_the_same_alone(changes, config):
    model = ours(**changes)
    bare = logits(model)
    keys = list(model.state_dict())
    deltas = tuned(model, config)
    with_it = logits(model)
    merged = merge(deltas, "0")
    assert deltas.names() == []
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(logits(model), with_it, rtol=1e-9, atol=1e-11)
    assert list(model.state_dict()) == keys
    assert not torch.allclose(with_it, bare)
    unmerge(model, merged)
    assert torch.equal(logits(model), bare)


def test_factors_stay_factors_of_the_sum_of_ranks():
    model = ours(r=6)
    deltas = tuned(model, LoraConfig(targets=["q_proj"], r=3), LoraConfig(targets=["q_proj"], r=2))
    with_both = logits(model)
    layer = model.layers[0].attention.q_proj
    before = layer.B.detach().clone()
    merge(deltas, "0", "1")
    assert (layer.A.shape, layer.B.shape, layer.rank) == ((11, 24), (24, 11), 11)
    assert torch.equal(layer.B[:, :6], before)
    torch.testing.assert_close(logits(model), with_both, rtol=1e-9, atol=1e-11)


def test_only_the_named_delta_is_merged():
    model = ours()
    deltas = tuned(model, CONFIGS["lora"], CONFIGS["sora"])
    with_both = logits(model)
    merge(deltas, "1")
    assert deltas.names() == ["0"]
    torch.testing.assert_close(logits(model), with_both, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("make", "targets"), [(llama, ["q_proj", "up_proj"]), (gpt2, ["c_attn", "c_fc"])]
)
def test_models_of_transformers(make, targets):
    model = make()
    deltas = tuned(model, LoraConfig(targets=targets, r=3))
    with_it = logits(model)
    merge(deltas, "0")
    torch.testing.assert_close(logits(model), with_it, rtol=1e-9, atol=1e-11)


def test_trained_flags_and_dtype_stay():
    model = plain().to(torch.bfloat16)
    model.first.weight.requires_grad_(False)
    deltas = Deltas(model)
    randomise(deltas.add("a", LoraConfig(targets=["first", "second"], r=3)))
    exact = model.first.weight.double() + 16 / 3 * (
        deltas["a"].layer("first").B.double() @ deltas["a"].layer("first").A.double()
    )
    merge(deltas, "a")
    assert torch.equal(model.first.weight, exact.to(torch.bfloat16))
    assert not model.first.weight.requires_grad
    assert model.second.weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 6, "latent_norm": True}, "something stands between its factors"),
        ({"r": 6, "latent_activation": "silu"}, "something stands between its factors"),
    ],
)
def test_what_cannot_take_a_matrix_is_refused_unchanged(changes, message):
    model = ours(**changes)
    deltas = tuned(model, LoraConfig(targets=["q_proj"], r=3))
    with_it = logits(model)
    with pytest.raises(ValueError, match=message):
        merge(deltas, "0")
    assert deltas.names() == ["0"]
    assert torch.equal(logits(model), with_it)


def test_a_weight_of_two_modules_is_refused():
    model = plain()
    model.third = nn.Linear(12, 20, dtype=torch.float64)
    model.third.weight = model.first.weight
    deltas = tuned(model, LoraConfig(targets=["first"], r=3))
    with pytest.raises(ValueError, match="first: its weight is also that of third"):
        merge(deltas, "0")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="there are none"):
        merge(Deltas(plain()), "a")
