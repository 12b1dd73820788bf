"""Ensembles: the scores by their formulas, the weights, and what the combination computes."""

import math

import pytest
import torch
from torch import Tensor, nn

from model.delta import Deltas, LoraConfig, SoraConfig, TiedLoraConfig
from model.delta.ensemble import (
    HIGHER_IS_BETTER,
    Mixture,
    Outputs,
    average,
    combine,
    score,
    weights,
)
from model.delta.files import fingerprint, load_delta, save_delta
from tests.model.delta.backbones import Plain, logits, ours, plain, randomise

BOTH = ["first", "second"]
BATCHES = [
    (
        torch.randn(n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(n)),
        torch.arange(n) % 6,
    )
    for n in (5, 8)
]


def tuned(*configs, targets=BOTH) -> tuple[Plain, Deltas]:
    """A plain backbone with deltas a, b, c ..."""
    model = plain()
    deltas = Deltas(model)
    for seed, config in enumerate(configs or [LoraConfig(targets=targets, r=3)] * 3):
        randomise(deltas.add("abc"[seed], config, activate=False), seed)
    return model, deltas.double()


def run(model: nn.Module):
    def outputs(batch: object) -> Outputs:
        x, labels = batch
        return Outputs(model(x), labels)

    return outputs


def probabilities(model: nn.Module, deltas: Deltas, name: str) -> list[tuple[Tensor, Tensor]]:
    deltas.activate(name)
    found = [(torch.softmax(model(x), -1).detach(), labels) for x, labels in BATCHES]
    deltas.activate()
    return found


def by_hand(method: str, p: Tensor, label: int, wanted: Tensor) -> float:
    onehot = [float(i == label) for i in range(6)]
    values = p.tolist()
    if method == "loss":
        return -math.log(values[label])
    if method == "el2n":
        return math.sqrt(sum((a - b) ** 2 for a, b in zip(values, onehot, strict=True)))
    if method == "cosine":
        return values[label] / math.sqrt(sum(a * a for a in values))
    return sum(a * math.log(a / b) for a, b in zip(wanted.tolist(), values, strict=True))


@pytest.mark.parametrize("method", ["loss", "el2n", "cosine", "kl"])
def test_scores_are_their_formulas(method):
    model, deltas = tuned()
    deltas.activate("b")
    target = probabilities(model, deltas, "c")
    deltas.activate("b")
    found = score(deltas, ["a", "b"], run(model), BATCHES, method, target="c")
    assert deltas.active == ("b",)
    for name in ("a", "b"):
        terms = [
            by_hand(method, p[i], int(labels[i]), wanted[i])
            for (p, labels), (wanted, _) in zip(
                probabilities(model, deltas, name), target, strict=True
            )
            for i in range(len(labels))
        ]
        assert len(terms) == 13
        assert found[name] == pytest.approx(sum(terms) / 13, rel=1e-5)


def test_the_gradient_norm_is_over_the_deltas_parameters():
    model, deltas = tuned()
    found = score(deltas, ["a"], run(model), BATCHES, "grand")["a"]
    norms = []
    deltas.activate("a")
    for x, labels in BATCHES:
        deltas.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in deltas["a"].parameters())))
    assert found == pytest.approx(sum(norms) / 2, rel=1e-5)


@pytest.mark.parametrize("method", ["loss", "el2n", "cosine", "kl"])
def test_a_delta_that_knows_the_labels_has_the_largest_weight(method):
    """The signs: a is trained on the labels, b on shuffled ones, c is like a."""
    model = plain()
    deltas = Deltas(model)
    for name, shift in (("a", 0), ("b", 3), ("c", 0)):
        torch.manual_seed(ord(name))
        deltas.add(name, LoraConfig(targets=BOTH, r=3))
        deltas.double().freeze_backbone()
        deltas.activate(name)
        optimizer = torch.optim.AdamW(deltas[name].parameters(), lr=0.02)
        for _ in range(120):
            x, labels = BATCHES[1]
            loss = nn.functional.cross_entropy(model(x), (labels + shift) % 6)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    scores = score(deltas, ["a", "b"], run(model), BATCHES[1:], method, target="c")
    found = weights(scores, 0.1, HIGHER_IS_BETTER[method])
    assert found["a"] > 0.9


def test_weights_are_a_softmax():
    found = weights({"a": 1.0, "b": 2.0}, 0.5)
    assert found["a"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert sum(found.values()) == pytest.approx(1)
    assert weights({"a": 1.0, "b": 2.0}, 0.5, higher_is_better=True)["b"] == found["a"]
    for scores, temperature in (({"a": 1.0}, 0.0), ({}, 1.0)):
        with pytest.raises(ValueError, match="temperature"):
            weights(scores, temperature)


def test_scoring_refuses_what_it_cannot_score():
    model, deltas = tuned()
    with pytest.raises(ValueError, match="target"):
        score(deltas, ["a"], run(model), BATCHES, "kl")
    with pytest.raises(ValueError, match="batches"):
        score(deltas, ["a"], run(model), [], "loss")


def test_scoring_has_no_dropout_and_leaves_modes_alone():
    model, deltas = tuned(LoraConfig(targets=BOTH, r=3, dropout=0.5))
    model.second.eval()
    found = [score(deltas, ["a"], run(model), BATCHES, "loss") for _ in range(2)]
    assert found[0] == found[1]
    assert (model.training, model.first.training, model.second.training) == (True, True, False)


@pytest.mark.parametrize(
    "configs",
    [
        [LoraConfig(targets=BOTH, r=3, alpha=5.0)],
        [LoraConfig(targets=BOTH, r=3, scaling="rslora")],
        [LoraConfig(targets=BOTH, r=3), SoraConfig(targets=["second"], r=4)],
        [
            LoraConfig(targets=["first"], r=2),
            TiedLoraConfig(targets=["second"], r=3),
            SoraConfig(targets=BOTH, r=2),
        ],
    ],
    ids=["identity", "identity, rslora", "unequal", "three methods"],
)
def test_a_combination_is_the_weighted_sum_of_what_its_parts_add(configs):
    """For one target at a time, where outputs are linear in ΔW; one part of weight 1 is itself."""
    model, deltas = tuned(*configs)
    names = deltas.names()
    by = {"a": 1.0} if len(names) == 1 else dict(zip(names, (0.7, 0.5, -0.2), strict=False))
    combined = combine({name: deltas[name] for name in names}, by)
    deltas.insert("all", combined, activate=False)
    for path, width in (("first", 12), ("second", 20)):
        module = model.get_submodule(path)
        x = torch.randn(4, width, dtype=torch.float64)
        bare = module(x)
        expected = bare.clone()
        for name in names:
            deltas.activate(name)
            expected += by[name] * (module(x) - bare)
        deltas.activate("all")
        torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-13)
        deltas.activate()


def test_a_truncated_combination_is_the_best_of_its_rank():
    _, deltas = tuned()
    parts, by = {n: deltas[n] for n in "abc"}, {"a": 0.2, "b": 0.5, "c": 0.3}
    exact, small = combine(parts, by), combine(parts, by, rank=2)
    for path in BOTH:
        whole = torch.matmul(*exact.layer(path).factors())
        found = torch.matmul(*small.layer(path).factors())
        values = torch.linalg.svdvals(whole)
        assert torch.linalg.matrix_rank(found) == 2
        assert (whole - found).norm().item() == pytest.approx(values[2:].norm().item())


def test_a_combination_has_no_more_rank_than_its_widths(tmp_path):
    """Three of rank 5 on 12 -> 20 and 20 -> 6: exact in rank 12 and 6, and so it can be read."""
    model, deltas = tuned(*[LoraConfig(targets=BOTH, r=5)] * 3)
    parts, by = {n: deltas[n] for n in "abc"}, {"a": 0.2, "b": 0.5, "c": 0.3}
    combined = combine(parts, by)
    save_delta(combined, tmp_path / "all", fingerprint(model))
    read = load_delta(tmp_path / "all", model).delta
    for path in BOTH:
        expected = sum(by[n] * torch.matmul(*parts[n].layer(path).factors()) for n in "abc")
        for found in (combined.layer(path), read.layer(path)):
            assert found.rank == min(expected.shape)
            product = torch.matmul(*found.factors())
            # Files hold float32.
            torch.testing.assert_close(product, expected, rtol=1e-6, atol=1e-6, check_dtype=False)


def test_an_average_is_of_parameters():
    _, deltas = tuned()
    parts, by = {n: deltas[n] for n in "abc"}, {"a": 0.2, "b": 0.5, "c": 0.3}
    found = average(parts, by)
    for key, value in found.state_dict().items():
        expected = sum(by[n] * parts[n].state_dict()[key] for n in "abc")
        torch.testing.assert_close(value, expected)
    same = average({"a": deltas["a"]}, {"a": 1.0})
    assert all(torch.equal(v, deltas["a"].state_dict()[k]) for k, v in same.state_dict().items())
    assert all(p is not q for p, q in zip(same.parameters(), deltas["a"].parameters(), strict=True))


def test_unlike_deltas_are_not_averaged():
    _, deltas = tuned(LoraConfig(targets=BOTH, r=3), LoraConfig(targets=BOTH, r=2))
    with pytest.raises(ValueError, match="b: its configuration or shapes"):
        average({"a": deltas["a"], "b": deltas["b"]}, {"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="weights: of a, and the deltas are a, b"):
        combine({"a": deltas["a"], "b": deltas["b"]}, {"a": 1.0})


def test_what_cannot_be_mixed_is_refused():
    _, deltas = tuned()
    parts = {name: deltas[name] for name in "ab"}
    for mix in (combine, average):
        with pytest.raises(ValueError, match="weights: nan of a; allowed are finite numbers"):
            mix(parts, {"a": float("nan"), "b": 1.0})
    with pytest.raises(ValueError, match="rank: -1; allowed is at least 1"):
        combine(parts, {"a": 0.5, "b": 0.5}, rank=-1)


def test_learned_weights_find_the_part_that_helps(tmp_path):
    """The data are what b makes; only the weights are trained; the mixture comes to a LoRA."""
    model, deltas = tuned()
    deltas.activate("b")
    x = torch.randn(64, 12, dtype=torch.float64)
    wanted = model(x).detach()
    deltas.activate()
    mixture = Mixture({n: deltas[n] for n in "abc"}, dict.fromkeys("abc", 1 / 3))
    deltas.insert("mix", mixture)
    deltas.double().freeze_backbone()
    trained = [p for p in mixture.parameters() if p.requires_grad]
    assert [p.shape for p in trained] == [(3,)]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(300):
        loss = (model(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mixture.weights.tolist() == pytest.approx([0, 1, 0], abs=0.02)
    with pytest.raises(ValueError, match=r"Mixture: a file cannot hold it; save what combined\("):
        save_delta(mixture, tmp_path / "mix", "")
    assert not (tmp_path / "mix").exists()
    expected = model(x)
    deltas.activate()
    deltas.insert("all", mixture.combined())
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)


def test_a_language_models_tokens():
    """Batches of ids, as fine-tuning has them: the mean over tokens does not depend on batches."""
    model = ours(r=6)
    deltas = Deltas(model)
    randomise(deltas.add("a", LoraConfig(targets=["q_proj"], r=3)))
    deltas.double()
    ids = torch.randint(0, 40, (6, 9), generator=torch.Generator().manual_seed(0))

    def outputs(batch: object) -> Outputs:
        assert isinstance(batch, Tensor)
        return Outputs(logits(model, batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    one = score(deltas, ["a"], outputs, [ids], "loss")
    three = score(deltas, ["a"], outputs, ids.split([1, 2, 3]), "loss")
    assert one["a"] == pytest.approx(three["a"], rel=1e-6)
