"""The mathematics of eval.convert: factors against Eckart and Young, ranks against brute force, the
Fisher information against transformers' gradients.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from data.errors import InputError
from eval.convert import factorise as f
from eval.convert.budget import Kind, choose_ranks
from eval.convert.fisher import fisher_of_inputs
from model import ModelConfig, Transformer

FP32 = 2.0**-24  # largest relative rounding error of a float32


def matrix(d_out: int, d_in: int, seed: int = 0) -> Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("d_out", "d_in", "rank"), [(12, 20, 5), (20, 12, 3), (9, 9, 9), (7, 4, 1)]
)
def test_svd_loses_what_eckart_and_young_say(d_out: int, d_in: int, rank: int):
    weight = matrix(d_out, d_in)
    found = f.factorise(weight, rank)
    sigma = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    lost = math.sqrt((sigma[rank:] ** 2).sum())
    error = f.relative_error(weight, found) * np.linalg.norm(weight.double().numpy())
    # Rounding both factors moves no entry of the product by more than 2 FP32 |B| |A|, and these
    # have the Frobenius norm √Σσ each.
    assert error == pytest.approx(lost, abs=3 * FP32 * sigma[:rank].sum())
    assert f.kept_energy(found) == pytest.approx(1 - lost**2 / (sigma**2).sum(), rel=1e-12)
    assert_close(found.singular_values.numpy(), sigma, rtol=1e-12, atol=1e-12)


def test_singular_values_are_shared_between_the_factors():
    found = f.factorise(matrix(10, 16), 6)
    expected = torch.diag(found.singular_values[:6])
    for gram in (found.A.double() @ found.A.double().T, found.B.double().T @ found.B.double()):
        assert_close(gram, expected, rtol=0, atol=4 * FP32 * 16 * float(expected.max()))


def alternating(weight: Tensor, columns: Tensor, rank: int, seed: int) -> float:
    """The weighted error that alternating least squares finds from a random start."""
    a = matrix(rank, weight.size(1), seed).double()
    target = weight.double() * columns
    for _ in range(300):
        b = torch.linalg.lstsq((a * columns).T, target.T).solution.T
        a = torch.linalg.lstsq(b, target).solution / columns
    return float((target - b @ (a * columns)).norm() / target.norm())


def test_fwsvd_is_the_optimum_of_the_weighted_error():
    weight, rank = matrix(10, 14), 4
    columns = f.scales(matrix(1, 14, seed=3)[0].exp().square())
    assert columns is not None
    found = f.factorise(weight, rank, columns)
    error = f.relative_error(weight, found, columns)
    sigma = np.linalg.svd((weight.double() * columns).numpy(), compute_uv=False)
    assert error == pytest.approx(np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma), rel=1e-5)
    others = [alternating(weight, columns, rank, seed) for seed in range(5)]
    assert min(others) == pytest.approx(error, rel=1e-5), "they find the same minimum"
    plain = f.factorise(weight, rank)
    assert f.relative_error(weight, plain, columns) > 1.02 * error, "plain SVD is worse there"
    assert f.relative_error(weight, found) > 1.02 * f.relative_error(weight, plain)


def test_the_weights_are_those_of_the_inputs():
    """An input of weight near 0 is given up, and the others are as if it were not there."""
    weight, rank = matrix(6, 8), 3
    columns = f.scales(torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1]))
    found = f.factorise(weight, rank, columns)
    rest = f.factorise(weight[:, 1:], rank)
    product = (found.B.double() @ found.A.double())[:, 1:]
    expected = rest.B.double() @ rest.A.double()
    assert_close(product, expected, rtol=0, atol=1e-5)  # FLOOR is 1e-6, entries are about 1


def test_equal_weights_give_the_plain_svd():
    weight = matrix(8, 12)
    plain, weighted = (
        f.factorise(weight, 5),
        f.factorise(weight, 5, torch.full((12,), 0.037).double()),
    )
    for name in ("A", "B"):
        one, other = getattr(plain, name), getattr(weighted, name)
        signs = (one * other).sum(dim=1 if name == "A" else 0).sign()  # of singular vectors
        other = other * (signs[:, None] if name == "A" else signs)
        assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_no_information_at_all_is_no_weight():
    assert f.scales(None) is None
    assert torch.equal(f.scales(torch.zeros(4)), torch.ones(4).double())


def test_a_weight_of_zeros_loses_nothing():
    found = f.factorise(torch.zeros(4, 6), 2)
    assert (f.relative_error(torch.zeros(4, 6), found), f.kept_energy(found)) == (0.0, 1.0)


# --- ranks for a budget --------------------------------------------------------------------------


def kinds_of(shapes: dict[str, tuple[int, int]], layers: int, seed: int) -> dict[str, Kind]:
    random = np.random.RandomState(seed)
    found = {}
    for name, (d_in, d_out) in shapes.items():
        scale = random.uniform(0.1, 3)
        sigma = np.sort(random.exponential(scale, (layers, min(d_in, d_out))), axis=1)[:, ::-1]
        found[name] = Kind(d_in, d_out, layers, torch.from_numpy((sigma**2).sum(axis=0)))
    return found


def error_of(kinds: dict[str, Kind], ranks: dict[str, int | None]) -> float:
    return sum(0.0 if r is None else float(kinds[k].energy[r:].sum()) for k, r in ranks.items())


def cost_of(kinds: dict[str, Kind], ranks: dict[str, int | None]) -> int:
    return sum(
        kind.layers * (kind.d_in * kind.d_out if r is None else r * (kind.d_in + kind.d_out))
        for kind, r in ((kinds[name], r) for name, r in ranks.items())
    )


SHAPES = {
    "all alike": {"q": (6, 6), "k": (6, 6), "v": (6, 6), "o": (6, 6)},
    "grouped": {"q": (8, 8), "k": (8, 2), "v": (8, 2), "o": (8, 8)},
    "wide heads": {"q": (6, 10), "k": (6, 5), "v": (6, 5), "o": (10, 6)},
}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("share", [0.45, 0.61, 0.8, 0.97, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ranks_are_the_best_of_all_that_the_budget_allows(shapes: str, share: float, seed: int):
    kinds = kinds_of(SHAPES[shapes], 2, seed)
    found = choose_ranks(kinds, share)
    budget = share * sum(kind.dense for kind in kinds.values())
    assert cost_of(kinds, found) <= budget * (1 + 1e-9)
    options = [[None, *range(1, min(kind.d_in, kind.d_out) + 1)] for kind in kinds.values()]
    best = min(
        error_of(kinds, ranks)
        for ranks in (dict(zip(kinds, r, strict=True)) for r in itertools.product(*options))
        if cost_of(kinds, ranks) <= budget * (1 + 1e-9)
    )
    assert error_of(kinds, found) == pytest.approx(best, rel=1e-9, abs=1e-12)


@given(st.floats(0.4, 1.0), st.integers(0, 10_000))
def test_a_larger_budget_loses_no_more(share: float, seed: int):
    kinds = kinds_of(SHAPES["grouped"], 1, seed)
    errors = [error_of(kinds, choose_ranks(kinds, s)) for s in (share, (1 + share) / 2, 1.0)]
    assert errors[0] >= errors[1] >= errors[2] == 0.0


def test_a_budget_that_not_even_rank_1_fits_is_refused():
    kinds = kinds_of(SHAPES["all alike"], 1, 0)
    with pytest.raises(InputError, match=r"0.3 of 144 .* rank 1 takes, 48; allowed .* 0.3333"):
        choose_ranks(kinds, 0.3)
    assert choose_ranks(kinds, 1 / 3) == dict.fromkeys("qkvo", 1)


# --- the Fisher information ----------------------------------------------------------------------


def test_fisher_information_is_that_of_transformers_gradients():
    """One gradient a window, squared, averaged over the windows, summed over the outputs."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, initializer_range=0.2,
        )
    ).double()  # fmt: skip
    ours = Transformer(
        ModelConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
                    num_kv_heads=2)
    ).double()  # fmt: skip
    names = {"attention": "self_attn", "feed_forward": "mlp"}
    source = theirs.state_dict()
    for name, parameter in ours.named_parameters():
        name = name.replace("attention_norm", "input_layernorm")
        name = name.replace("feed_forward_norm", "post_attention_layernorm")
        name = name.replace("token_embedding", "embed_tokens").replace("final_norm", "norm")
        for a, b in names.items():
            name = name.replace(f".{a}.", f".{b}.")
        name = name if name == "lm_head.weight" else f"model.{name}"
        parameter.data.copy_(source[name])
    windows = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    found = fisher_of_inputs(ours, iter(windows), 3, torch.device("cpu"))
    sums: dict[str, Tensor] = {}
    for window in windows:
        theirs.zero_grad()
        theirs(window[None], labels=window[None]).loss.backward()
        for number, layer in enumerate(theirs.model.layers):
            for ours_name, module in (("attention", layer.self_attn), ("feed_forward", layer.mlp)):
                for leaf, projection in module.named_children():
                    if leaf.endswith("_proj"):
                        key = f"layers.{number}.{ours_name}.{leaf}.weight"
                        square = projection.weight.grad.square().sum(dim=0) / 3
                        sums[key] = sums.get(key, 0) + square
    assert found.keys() == sums.keys()
    for key, value in sums.items():
        assert found[key].shape == (ours.get_parameter(key).size(1),)
        # Transformers' rotary table and norms are in float32 whatever the model's dtype.
        assert_close(found[key], value, rtol=1e-4, atol=1e-12)
    assert all(p.requires_grad for p in ours.parameters())
