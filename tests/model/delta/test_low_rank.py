"""LoRA, SoRA and Tied-LoRA against peft, brute force, and each other."""

import math

import numpy as np
import peft
import pytest
import torch
from torch import nn

from model.delta import Deltas, LoraConfig, SoraConfig, TiedLoraConfig, config_from_dict
from model.delta.methods.lora import LoraLayer
from model.delta.prox import (
    gate_parameters,
    l1_term,
    proximal_step,
    reference_threshold,
    schedule,
    soft_threshold,
)
from model.delta.prune import compact, prune, rank_report
from tests.model.delta.backbones import Plain, llama, logits, ours, plain, randomise

BOTH = ["first", "second"]


def train(
    model: nn.Module, parameters: list[nn.Parameter], steps: int, x_seed: int = 0
) -> list[float]:
    """Losses of AdamW steps on random regression data."""
    generator = torch.Generator().manual_seed(x_seed)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 12, generator=generator, dtype=torch.float64)
        wanted = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        loss = (model(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def tuned(config: LoraConfig, seed: int = 0) -> tuple[Plain, Deltas]:
    """A plain backbone with a delta that adds something."""
    model = plain()
    deltas = Deltas(model)
    randomise(deltas.add("a", config), seed)
    return model, deltas.double()


# --- LoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_50_steps_of_lora_are_pefts(rslora):
    model, deltas = tuned(
        LoraConfig(targets=BOTH, r=4, alpha=8.0, scaling="rslora" if rslora else "lora")
    )
    deltas.freeze_backbone()
    options = peft.LoraConfig(r=4, lora_alpha=8, target_modules=BOTH, use_rslora=rslora)
    theirs = peft.get_peft_model(plain(), options, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, layer in deltas["a"].named_layers():
            other = theirs.base_model.model.get_submodule(name)
            other.lora_A["default"].weight.copy_(layer.A)
            other.lora_B["default"].weight.copy_(layer.B)
    ours_ = train(model, list(deltas.parameters()), 50)
    expected = train(theirs, [p for p in theirs.parameters() if p.requires_grad], 50)
    assert ours_ == pytest.approx(expected, rel=1e-12)
    assert ours_[-1] != pytest.approx(ours_[0], rel=1e-3)


def test_lora_starts_as_pefts_does():
    """A uniform with bound 1/√d_in, B zero."""
    layer = LoraLayer(100, 50, 20, 1.0).requires_grad_(False)
    assert layer.B.count_nonzero() == 0
    assert layer.A.abs().max() <= 1 / math.sqrt(100)
    assert layer.A.std().item() == pytest.approx(1 / math.sqrt(300), rel=0.1)


def test_dropout_is_of_the_input_in_training_alone():
    torch.manual_seed(0)
    layer = LoraLayer(4000, 3, 2, 1.0, dropout=0.25).double()
    randomise(layer)
    x, y = torch.ones(1, 4000, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    exact = x @ layer.A.T @ layer.B.T
    torch.testing.assert_close(layer.eval()(x, y), exact)
    several = torch.stack([layer.train()(x, y) for _ in range(300)])
    assert several.std(0).min() > 0
    error = (several.mean(0) - exact).abs() / (several.std(0) / math.sqrt(300))
    assert error.max() < 4


def test_dropout_follows_the_backbone():
    model, deltas = tuned(LoraConfig(targets=BOTH, r=4, dropout=0.5))
    x = torch.randn(3, 12, dtype=torch.float64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    assert len(deltas["a"].layers) == 2


def test_ranks_and_scales_of_single_targets():
    config = LoraConfig(targets=BOTH, r=4, alpha=8.0, ranks={"second": 2}, scales={"first": 0.5})
    delta = tuned(config)[1]["a"]
    assert [layer.rank for _, layer in delta.named_layers()] == [4, 2]
    assert [layer.scale for _, layer in delta.named_layers()] == [0.5, 4.0]
    without = tuned(LoraConfig(targets=BOTH, ranks={"first": 0}, r=3))[1]["a"]
    assert [name for name, _ in without.named_layers()] == ["second"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r: 0; allowed is at least 1"),
        ({"r": 7}, "r: 7 at second, which is 20 -> 6; allowed is 1 to 6"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"ranks": {"first": -1}}, "ranks"),
        ({"ranks": {"third": 2}}, "ranks: 'third' names no module; .*first"),
        ({"scales": {"third": 2.0}}, "scales: 'third' names no module"),
        ({"ranks": {"first": 0, "second": 0}}, "ranks: all are 0, so that no target is left"),
        ({"exclude": ["third"]}, "exclude: 'third' names no module"),
    ],
)
def test_a_lora_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tuned(LoraConfig(targets=BOTH, **changes))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(targets=["first"], r=3, ranks={"first": 2}, layers="0-1"),
        SoraConfig(gate_init="ones", alpha=3.0),
        TiedLoraConfig(tie=["A"], train=["u", "v"]),
    ],
)
def test_a_configuration_goes_through_a_dictionary(config):
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "none"}, "method: 'none'; allowed are .*lora"),
        ({"rank": 3}, "unknown key 'rank'"),
        ({"r": "3"}, "lora: r: '3'"),
        ({"targets": [3]}, "lora: targets"),
        ({"scaling": "other"}, "lora: scaling"),
        ({"ranks": {"a": 1.5}}, "lora: ranks"),
    ],
)
def test_a_wrong_dictionary_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(LoraConfig().to_dict() | changes)


# --- SoRA ----------------------------------------------------------------------------------------


def test_sora_with_open_gates_is_lora():
    model, deltas = tuned(LoraConfig(targets=BOTH, r=4))
    other, gated = tuned(SoraConfig(targets=BOTH, r=4, gate_init="ones"))
    gated.load_state_dict(deltas.state_dict(), strict=False)
    for gate in gate_parameters(gated):
        nn.init.ones_(gate).requires_grad_(False)
    expected = train(model, list(deltas.parameters()), 20)
    trained = [p for p in gated.parameters() if p.requires_grad]
    assert train(other, trained, 20) == pytest.approx(expected, rel=1e-12)


def test_gates_start_normal_or_open():
    gates = torch.cat(
        [
            SoraConfig(targets=["x"], r=500)
            .build(nn.Identity(), [_wide()])
            .layer("x")
            .gate.detach()
            for _ in range(4)
        ]
    )
    assert (gates.mean().item(), gates.std().item()) == pytest.approx((0, 1), abs=0.1)
    opened = SoraConfig(targets=["x"], gate_init="ones").build(nn.Identity(), [_wide()])
    assert opened.layer("x").gate.tolist() == [1.0] * 8


def _wide():
    from model.delta.target import Target

    return Target("x", nn.Identity(), "linear", 600, 600)


@pytest.mark.parametrize("xi", [0.0, 0.05, 0.3, 2.0])
def test_the_soft_threshold_is_the_minimiser(xi):
    """Of (z - g)²/2 + ξ|z|, by brute force over a fine grid."""
    g = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)
    grid = np.linspace(-1.6, 1.6, 32001)
    for one, found in zip(g.tolist(), soft_threshold(g, xi).tolist(), strict=True):
        best = grid[np.argmin((grid - one) ** 2 / 2 + xi * np.abs(grid))]
        assert found == pytest.approx(best, abs=1.01e-4)


def test_the_references_threshold_is_another():
    """Its own values: 0 below 2ξ, shrunk by ξ above, ±ξ itself kept."""
    g = torch.tensor([0.2, 0.3, 0.4, 0.5, 0.7, -0.2, -0.5, -0.7], dtype=torch.float64)
    expected = [0, 0.3, 0, 0, 0.4, 0, 0, -0.4]
    assert reference_threshold(g, 0.3).tolist() == pytest.approx(expected)
    assert soft_threshold(g, 0.3).tolist() == pytest.approx([0, 0, 0.1, 0.2, 0.4, 0, -0.2, -0.4])


@pytest.mark.parametrize("compat", [False, True])
def test_the_proximal_step_is_on_gates_alone(compat):
    _, deltas = tuned(SoraConfig(targets=BOTH, r=4))
    before = {name: p.detach().clone() for name, p in deltas.named_parameters()}
    operator = reference_threshold if compat else soft_threshold
    proximal_step(gate_parameters(deltas), 0.2, reference_compat=compat)
    for name, parameter in deltas.named_parameters():
        expected = operator(before[name], 0.2) if name.endswith("gate") else before[name]
        assert torch.equal(parameter, expected)
    with pytest.raises(ValueError, match="threshold"):
        proximal_step([], -0.1)


def test_the_l1_term():
    _, deltas = tuned(SoraConfig(targets=BOTH, r=4))
    gates = torch.cat(gate_parameters(deltas))
    term = l1_term(deltas)
    assert term.item() == pytest.approx(gates.abs().sum().item() / 8)
    term.backward()
    for gate in gate_parameters(deltas):
        torch.testing.assert_close(gate.grad, gate.sign().detach() / 8)


def test_the_l1_term_does_not_notice_that_closed_gates_are_dropped():
    """Their |g| is 0, so the sum is what it was; so is the mean, over the gates at first."""
    _, deltas = tuned(SoraConfig(targets=BOTH, r=4))
    delta = deltas["a"]
    with torch.no_grad():
        gate_parameters(deltas)[0][:3] = 0
    before = float(l1_term(deltas).detach())
    assert prune(delta) == 3
    assert float(l1_term(deltas, of=8).detach()) == pytest.approx(before)
    assert float(l1_term(deltas).detach()) == pytest.approx(before * 8 / 5)
    with torch.no_grad():
        for gate in gate_parameters(deltas):
            gate.zero_()
    prune(delta)
    for name, _ in list(delta.named_layers()):
        del delta.layers[name]
    assert float(l1_term(deltas, of=8)) == 0


def test_schedules():
    assert schedule(0, 7e-4, 8) == pytest.approx([1e-4 * i for i in range(8)])
    assert schedule(1e-4, 1e-2, 3, "exp_linear") == pytest.approx([1e-4, 1e-3, 1e-2])
    found = schedule(0, 2, 3, "log_linear")
    assert [math.exp(one) for one in found] == pytest.approx(
        [1, (1 + math.exp(2)) / 2, math.exp(2)]
    )
    for first, last, stages, kind in (
        (0, 1, 3, "exp_linear"), (1, 0, 3, "linear"), (-1, 0, 3, "linear"), (0, 1, 0, "linear"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="schedule"):
            schedule(first, last, stages, kind)


def closed(seed: int = 0) -> tuple[Plain, Deltas]:
    """A SoRA of which some gates are closed, in one layer all."""
    model, deltas = tuned(SoraConfig(targets=BOTH, r=5), seed)
    first, second = gate_parameters(deltas)
    with torch.no_grad():
        first[[1, 4]] = 0
        second.zero_()
    return model, deltas


def test_a_pruned_delta_computes_the_same():
    model, deltas = closed()
    x = torch.randn(7, 12, dtype=torch.float64)
    before = model(x)
    assert [(row.kept, row.rank) for row in rank_report(deltas["a"])] == [(3, 5), (0, 5)]
    rows = rank_report(deltas["a"])
    assert [row.parameters for row in rows] == [5 * (12 + 20 + 1), 5 * (20 + 6 + 1)]
    assert [row.parameters_kept for row in rows] == [3 * 33, 0]
    assert prune(deltas["a"]) == 2 + 5
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-14)
    assert [row.kept for row in rank_report(deltas["a"])] == [3, 0]
    assert deltas["a"].num_parameters() == 3 * 33
    assert prune(deltas["a"]) == 0


def test_a_compact_delta_is_a_lora_that_computes_the_same():
    model, deltas = closed()
    x = torch.randn(7, 12, dtype=torch.float64)
    before = model(x)
    small = compact(deltas["a"])
    deltas.remove("a")
    deltas.insert("small", small)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-14)
    assert small.config.method == "lora"
    assert small.num_parameters() == 3 * 32
    rebuilt = Deltas(plain())
    copied = rebuilt.add("small", config_from_dict(small.config.to_dict())).double()
    copied.load_state_dict(small.state_dict())
    torch.testing.assert_close(rebuilt.backbone(x), before, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="only SoRA"):
        compact(small)
    nothing = closed()[1]["a"]
    nn.init.zeros_(gate_parameters(nothing)[0])
    with pytest.raises(ValueError, match="every gate is closed"):
        compact(nothing)


def test_training_goes_on_after_pruning_as_without():
    """The optimizer's moments of what is left stay; closed gates are held at 0 in both."""
    runs = {}
    for pruned in (False, True):
        model, deltas = closed()
        parameters = list(deltas.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        held = [gate.detach() != 0 for gate in gate_parameters(deltas)]
        generator = torch.Generator().manual_seed(4)
        losses = []
        for step in range(12):
            if pruned and step == 6:
                prune(deltas["a"], optimizer)
                held = [mask[mask] for mask in held]
            x = torch.randn(16, 12, generator=generator, dtype=torch.float64)
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for gate, mask in zip(gate_parameters(deltas), held, strict=True):
                    gate.mul_(mask)
            losses.append(loss.item())
        runs[pruned] = losses
    assert runs[True] == pytest.approx(runs[False], rel=1e-10)


def test_a_proximal_step_closes_gates_for_good_use():
    """Regression on what a rank of 1 can express: the other ranks close, the loss stays low."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False)).double()
    change = torch.randn(20, 1).double() @ torch.randn(1, 12).double() / 4
    wanted = model[0].weight.detach() + change
    deltas = Deltas(model)
    deltas.add("a", SoraConfig(targets=["0"], r=6, alpha=6.0))
    deltas.double().freeze_backbone()
    optimizer = torch.optim.AdamW(deltas.parameters(), lr=1e-2, weight_decay=0)
    x = torch.randn(256, 12, dtype=torch.float64)
    for _ in range(1500):
        loss = (model(x) - x @ wanted.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        proximal_step(gate_parameters(deltas), 1e-2 * 0.3)
    (row,) = rank_report(deltas["a"])
    assert 1 <= row.kept <= 3
    assert loss < 0.05 * (change @ change.T).diagonal().sum()


# --- Tied-LoRA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [[], ["A"], ["B"], ["A", "B"]])
def test_what_is_tied_is_one_parameter(tie):
    model = ours(r=6, num_layers=3)
    delta = Deltas(model).add("a", TiedLoraConfig(targets=["q_proj", "v_proj"], r=4, tie=tie))
    layers = [layer for _, layer in delta.named_layers()]
    for name in ("A", "B", "u", "v"):
        different = len({id(getattr(layer, name)) for layer in layers})
        assert different == (1 if name in tie else 6)


@pytest.mark.parametrize(
    "train_", [["A"], ["u", "v"], ["v"], ["A", "B"], ["A", "B", "u", "v"], ["u"]]
)
def test_what_is_trained(train_):
    config = TiedLoraConfig(targets=["first"], r=4, train=train_)
    deltas = Deltas(plain())
    deltas.add("a", config)
    deltas.double().freeze_backbone()
    before = {n: p.detach().clone() for n, p in deltas.named_parameters()}
    train(deltas.backbone, [p for p in deltas.parameters() if p.requires_grad], 3)
    changed = {
        n.rpartition(".")[2] for n, p in deltas.named_parameters() if not torch.equal(p, before[n])
    }
    assert changed == set(train_)


def test_tl6_and_lora_have_the_papers_counts():
    """r = 8 on one fused 4096 -> 12288 target a layer, 32 layers."""
    with torch.device("meta"):
        layers = nn.Sequential(*(nn.Linear(4096, 12288, bias=False) for _ in range(32)))
        tied = Deltas(layers).add("tl6", TiedLoraConfig(targets=["re:.*"], r=8))
        lora = Deltas(layers).add("lora", LoraConfig(targets=["re:.*"], r=8))
    assert tied.num_parameters() == tied.num_parameters(trained=True) == 524_544
    assert lora.num_parameters() == 4_194_304


def test_frozen_factors_make_it_vera():
    """peft's VeRA: y + Λ_b B Λ_d A x with B and A frozen, random and shared, d and b trained."""
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    options = peft.VeraConfig(r=4, target_modules=["0", "2"], d_initial=0.3)
    theirs = peft.get_peft_model(model, options, autocast_adapter_dtype=False).double()
    other = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).double()
    other.load_state_dict(state)
    deltas = Deltas(other)
    config = TiedLoraConfig(targets=["0", "2"], r=4, alpha=4.0, train=["u", "v"])
    delta = deltas.add("a", config)
    deltas.double().freeze_backbone()
    with torch.no_grad():
        for name, layer in delta.named_layers():
            vera = theirs.base_model.model.get_submodule(name)
            layer.A.copy_(vera.vera_A["default"][:4, :12])
            layer.B.copy_(vera.vera_B["default"][:12, :4])
            layer.u.copy_(vera.vera_lambda_d["default"])
            layer.v.copy_(vera.vera_lambda_b["default"])

    def losses(net: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
        generator = torch.Generator().manual_seed(2)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        found = []
        for _ in range(50):
            x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
            loss = (net(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    expected = losses(theirs, [p for p in theirs.parameters() if p.requires_grad])
    found = losses(other, [p for p in deltas.parameters() if p.requires_grad])
    assert found == pytest.approx(expected, rel=1e-10)


def test_tied_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"tie: A of all targets, but d_in is 12 at first, 20 at"):
        Deltas(plain()).add("a", TiedLoraConfig(targets=BOTH, r=4))
    Deltas(plain()).add("a", TiedLoraConfig(targets=BOTH, r=4, tie=[]))
    with pytest.raises(ValueError, match="r: 9 at second"):
        Deltas(plain()).add("a", TiedLoraConfig(targets=["second"], r=9))
    with pytest.raises(ValueError, match="train"):
        TiedLoraConfig(train=[])


def test_deltas_of_a_llama_are_pefts():
    """The same LoRA on transformers' Llama, logits of both."""
    model = llama()
    deltas = Deltas(model)
    randomise(deltas.add("a", LoraConfig(targets=["q_proj", "down_proj"], r=4, alpha=8.0)))
    deltas.double()
    options = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(llama(), options, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, layer in deltas["a"].named_layers():
            other = theirs.base_model.model.get_submodule(name)
            other.lora_A["default"].weight.copy_(layer.A)
            other.lora_B["default"].weight.copy_(layer.B)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-12, atol=1e-13)
