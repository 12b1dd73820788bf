"""Attaching deltas: where, how exactly, several, row by row, under compile and checkpointing."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.configure import configure
from model.delta import Deltas, LoraConfig, SoraConfig, TiedLoraConfig, Tuned
from model.delta.target import as_target, find_targets, matches, parse_layers
from model.execution import Execution
from tests.model.delta.backbones import FAMILIES, IDS, gpt2, llama, logits, ours, plain, randomise

every_family = pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def tuned(backbone: nn.Module, *names: str, targets: list[str] = TARGETS, **more) -> Deltas:
    """Deltas with LoRAs that add something."""
    deltas = Deltas(backbone)
    for seed, name in enumerate(names):
        randomise(deltas.add(name, LoraConfig(targets=targets, r=3, **more)), seed)
    return deltas.double()


# --- addressing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("layers.0.v_proj", "v_proj", True),
        ("layers.0.kv_proj", "v_proj", False),
        ("layers.0.attention.v_proj", "attention.v_proj", True),
        ("layers.0.attention.v_proj", "attention", False),
        ("v_proj", "v_proj", True),
        ("layers.10.v_proj", r"re:layers\.\d\..*", False),
        ("layers.1.v_proj", r"re:layers\.\d\..*", True),
        ("layers.1.v_proj", r"re:v_proj", False),
    ],
)
def test_a_pattern_is_an_end_of_whole_parts_or_a_whole_expression(name, pattern, expected):
    assert matches(name, pattern) is expected


def test_layers_are_numbers_and_ranges():
    assert parse_layers("0-2, 5,7-7") == {0, 1, 2, 5, 7}
    for wrong in ("", "a", "3-1", "-1", "1,,2"):
        with pytest.raises(ValueError, match="layers"):
            parse_layers(wrong)


def test_targets_by_layer_and_without_the_excluded():
    model = ours(r=6)
    found = find_targets(model, ["q_proj", "down_proj"], layers="1", exclude=["attention"])
    assert [one.name for one in found] == ["layers.1.feed_forward.down_proj"]
    names = [one.name for one in find_targets(model, ["re:.*_proj"], exclude=["re:.*gate.*"])]
    assert len(names) == 2 * 6
    with pytest.raises(ValueError, match="layers 7"):
        find_targets(model, ["q_proj"], layers="7")


def test_no_match_names_what_is_near():
    with pytest.raises(ValueError, match=r"'qproj' names no module; near it: .*q_proj"):
        find_targets(ours(), ["qproj"])
    with pytest.raises(ValueError, match="names no module"):
        find_targets(ours(), ["q_proj"], exclude=["nothing_like_it_at_all"])
    with pytest.raises(ValueError, match="not a regular expression"):
        find_targets(ours(), ["re:("])
    with pytest.raises(ValueError, match="attention is a Attention, which is no matrix"):
        find_targets(ours(), ["layers.0.attention"])


def test_kinds_and_widths_of_targets():
    low = find_targets(ours(r=6, num_kv_heads=1), ["k_proj"])[0]
    assert (low.kind, low.d_in, low.d_out, low.rank) == ("factorised", 24, 12, 6)
    dense = find_targets(ours(num_kv_heads=1), ["k_proj"])[0]
    assert (dense.kind, dense.d_in, dense.d_out, dense.rank) == ("linear", 24, 12, None)
    conv = find_targets(gpt2(), ["c_attn"])[0]
    assert (conv.kind, conv.d_in, conv.d_out) == ("transposed", 24, 72)
    assert as_target("x", nn.LayerNorm(4)).kind == "other"


# --- exactness -----------------------------------------------------------------------------------


@every_family
def test_a_new_delta_adds_nothing_and_leaves_the_keys_alone(changes):
    model = ours(**changes)
    before, keys = logits(model), list(model.state_dict())
    targets = ["q_proj", "o_proj", "up_proj"]
    for config in (
        LoraConfig(targets=targets),
        SoraConfig(targets=targets, r=4),
        TiedLoraConfig(targets=["q_proj", "o_proj"], r=4),
    ):
        deltas = Deltas(model)
        deltas.add("new", config)
        deltas.double()
        assert torch.equal(logits(model), before)
        assert list(model.state_dict()) == keys
        deltas.detach()


@every_family
def test_detaching_and_attaching_are_exact(changes):
    model = ours(**changes)
    before = logits(model)
    deltas = tuned(model, "a")
    with_it = logits(model)
    assert not torch.allclose(with_it, before)
    for _ in range(2):
        deltas.detach()
        assert torch.equal(logits(model), before)
        assert not any(module._forward_hooks for module in model.modules())
        deltas.attach()
        assert torch.equal(logits(model), with_it)
    with deltas.detached():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), with_it)
    deltas.activate()
    assert torch.equal(logits(model), before)
    deltas.remove("a")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("make", [lambda: ours(r=6), ours, llama], ids=["lpa", "vanilla", "llama"])
def test_a_delta_is_the_change_of_the_weights(make):
    """Against the same backbone with W + s B A in the place of W (an LPA's: its product)."""
    model = make()
    deltas = tuned(model, "a", targets=["v_proj"], alpha=6.0)
    with_it = logits(model)
    deltas.detach()
    for name, layer in deltas["a"].named_layers():
        module = model.get_submodule(name)
        dense = module.B @ module.A if hasattr(module, "B") else module.weight
        changed = nn.Linear(*reversed(dense.shape), bias=False).double()
        changed.weight = nn.Parameter(dense + 6.0 / 3 * layer.B @ layer.A)
        model.set_submodule(name, changed)
    torch.testing.assert_close(logits(model), with_it, rtol=1e-10, atol=1e-12)


def test_several_deltas_add_up_and_can_be_switched():
    model = plain()
    deltas = tuned(model, "a", "b", targets=["second"])
    x = torch.randn(5, 12, dtype=torch.float64)
    with deltas.detached():
        bare = model(x)
    found = {}
    for names in (("a",), ("b",), ("a", "b"), ("b", "a"), ()):
        deltas.activate(*names)
        found[names] = model(x) - bare
    assert torch.equal(found[()], torch.zeros(5, 6, dtype=torch.float64))
    torch.testing.assert_close(found["a", "b"], found["a",] + found["b",])
    torch.testing.assert_close(found["b", "a"], found["a", "b"])
    with pytest.raises(ValueError, match="delta 'c': there are a, b"):
        deltas.activate("c")
    with pytest.raises(ValueError, match="once"):
        deltas.activate("a", "a")
    with pytest.raises(ValueError, match="name"):
        deltas.add("a", LoraConfig(targets=["first"]))


@every_family
def test_each_row_can_have_its_own_delta(changes):
    model = ours(**changes)
    deltas = tuned(model, "a", "b")
    alone = {}
    for name in ("a", "b", None):
        deltas.activate(*([name] if name else []))
        alone[name] = logits(model)
    rows = ["b", None, "a"]
    with deltas.rows(rows):
        mixed = logits(model)
    for row, name in enumerate(rows):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-10, atol=1e-12)
    with deltas.rows(["a"]), pytest.raises(ValueError, match=r"3 rows in the batch, .* given 1"):
        logits(model)
    assert torch.equal(logits(model), alone[None])


def test_gradients_of_rows_are_those_of_their_deltas():
    model = plain()
    deltas = tuned(model, "a", "b", targets=["first", "second"])
    deltas.freeze_backbone()
    x = torch.randn(4, 12, dtype=torch.float64)
    with deltas.rows(["a", "b", "a", "b"]):
        model(x).square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in deltas.named_parameters()}
    for name, rows in (("a", [0, 2]), ("b", [1, 3])):
        deltas.zero_grad()
        deltas.activate(name)
        model(x[rows]).square().sum().backward()
        for key, parameter in deltas[name].named_parameters():
            torch.testing.assert_close(mixed[f"deltas.{name}.{key}"], parameter.grad)


def test_freezing_and_what_is_kept():
    model = ours(r=6)
    model.final_norm.weight.requires_grad_(False)
    deltas = tuned(model, "a")
    deltas.freeze_backbone(keep=["lm_head", "re:.*_norm"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "lm_head.weight",
        *(
            f"layers.{i}.{n}.weight"
            for i in (0, 1)
            for n in ("attention_norm", "feed_forward_norm")
        ),
    }
    assert all(p.requires_grad for p in deltas.parameters())
    deltas.unfreeze_backbone()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"final_norm.weight"}
    with pytest.raises(ValueError, match=r"keep: 'lm_hed' names no module; near it: lm_head"):
        deltas.freeze_backbone(keep=["lm_hed"])
    with pytest.raises(ValueError, match=r"keep: 're:\(' is not a regular expression"):
        deltas.freeze_backbone(keep=["re:("])
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen


def test_one_module_of_both():
    model = ours(r=6)
    deltas = tuned(model, "a")
    both = Tuned(model, deltas)
    names = {name for name, _ in both.named_parameters()}
    assert {f"backbone.{name}" for name, _ in model.named_parameters()} < names
    assert len(names) == len(list(model.parameters())) + len(list(deltas.parameters()))
    assert torch.equal(both(IDS), logits(model))


# --- other ways to compute -----------------------------------------------------------------------


def gradients(model: nn.Module, deltas: Deltas) -> dict[str, torch.Tensor]:
    deltas.zero_grad()
    logits(model).square().mean().backward()
    return {name: p.grad.clone() for name, p in deltas.named_parameters()}


EXECUTIONS = {
    "fused": {"kernels": "triton"},
    "recompute blocks": {"recompute_blocks": True},
    "recompute parts": {"recompute_qkv": True, "recompute_ffn": True},
    "fused, recompute": {"kernels": "triton", "recompute_qkv": True},
    "compiled": {"compile": "on"},
}


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS)
@pytest.mark.parametrize("changes", [{}, {"r": 6}], ids=["vanilla", "lpa"])
def test_execution_changes_nothing(changes, execution):
    model = ours(**changes)
    deltas = tuned(model, "a")
    deltas.freeze_backbone()
    expected, wanted = logits(model), gradients(model, deltas)
    configure(model, Execution(**execution), torch.device("cpu"), torch.float64)
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-11)
    for name, gradient in gradients(model, deltas).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("config", [LoraConfig, SoraConfig, TiedLoraConfig])
def test_torch_compile_of_the_whole(config):
    model = plain()
    deltas = Deltas(model)
    randomise(deltas.add("a", config(targets=["first"], r=4)))
    deltas.double()
    x = torch.randn(5, 12, dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    deltas.activate()
    torch.testing.assert_close(compiled(x), model(x))


def test_activation_checkpointing():
    model = plain()
    deltas = tuned(model, "a", targets=["first", "second"])
    x = torch.randn(5, 12, dtype=torch.float64)
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in deltas.parameters()]
    deltas.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for parameter, gradient in zip(deltas.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_backbones_have_float32_deltas(autocast):
    model = ours(torch.float32 if autocast else torch.bfloat16, r=6)
    deltas = Deltas(model)
    randomise(deltas.add("a", LoraConfig(targets=TARGETS, r=3)))
    assert {p.dtype for p in deltas.parameters()} == {torch.float32}
    exact = ours(r=6)
    exact.load_state_dict(model.state_dict())
    other = Deltas(exact)
    other.add("a", LoraConfig(targets=TARGETS, r=3))
    other.load_state_dict(deltas.state_dict())
    other.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = logits(model)
    error = (found.double() - logits(exact)).norm() / logits(exact).norm()
    assert error < 0.03


def test_conv1d_of_transformers():
    model = gpt2()
    before = logits(model)
    deltas = tuned(model, "a", targets=["c_attn", "c_proj"])
    with_it = logits(model)
    assert not torch.allclose(with_it, before)
    deltas.detach()
    with torch.no_grad():
        for name, layer in deltas["a"].named_layers():
            model.get_submodule(name).weight += (16 / 3 * layer.B @ layer.A).T
    torch.testing.assert_close(logits(model), with_it, rtol=1e-9, atol=1e-11)
