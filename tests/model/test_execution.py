"""How a model is computed changes nothing but rounding, and the log says what runs."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from kernels import attention, dispatch, ops
from kernels.triton import configs
from kernels.verify import verify
from model import ModelConfig, Transformer, init_weights
from model.cache import KVCache
from model.config import Ranks
from model.configure import configure
from model.execution import Execution, Plan, fused_on, plan
from tests.model.measure import Calls

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 4,
    "max_seq_len": 64,
}  # fmt: skip
FAMILIES = {
    "vanilla": {},
    "lpa": {"r": 8},
    "grouped lpa": {"r": 8, "num_kv_heads": 2},
    "grouped vanilla": {"num_kv_heads": 1},
    "unequal ranks": {"r": Ranks(q=8, k=4, v=12)},
    "dense o": {"r": Ranks(q=8, k=8, v=8)},
    "everything low": {"r": Ranks(8, 8, 8, 8, 8)},
    "wide heads": {"r": 8, "head_dim": 16},
    "tied": {"r": 8, "tie_embeddings": True},
    "documents": {"r": 8, "document_start_id": 3},
    "latent norm": {"r": 8, "num_kv_heads": 2, "latent_norm": True},
    "latent norm, everything low": {"r": Ranks(8, 4, 12, 8, 16), "latent_norm": True},
}
every_family = pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
UNFUSED = {
    "qk norm": {"qk_norm": True},
    "both norms": {"r": 8, "num_kv_heads": 2, "qk_norm": True, "latent_norm": True},
    "latent silu": {"r": Ranks(8, 4, 12, 8, 16), "latent_activation": "silu"},
    "paper-1, both norms": {"family": "paper-1", "r": 8, "qk_norm": True, "latent_norm": True},
}
REBUILD = [
    {"recompute_qkv": True},
    {"recompute_ffn": True},
    {"recompute_qkv": True, "recompute_ffn": True},
    {"recompute_blocks": True},
    {"recompute_blocks": True, "recompute_every": 2},
]


def build(execution: dict[str, Any] | None = None, **changes: Any) -> Transformer:
    """A model in float64 whose norm weights are not 1, computed as `execution` says."""
    model = Transformer(ModelConfig(**(SHAPE | changes)))
    init_weights(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "proj" in name:
                parameter.mul_(3)  # attention far from uniform
    model.double()
    if execution is not None:
        training = execution.get("attention") != "flex"  # which has no backward pass on the CPU
        configure(model, Execution(**execution), CPU, torch.float64, training)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def loss_and_grads(model: Transformer) -> list[Tensor]:
    """The loss of each token of a batch, and the gradient of every parameter."""
    torch.manual_seed(0)
    model.zero_grad()
    losses = model(tokens(2, 20), tokens(2, 20, seed=1), reduction="none")
    losses.mean().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None for g in grads)
    return [losses.detach(), *(g for g in grads if g is not None)]


def assert_same(model: Transformer, expected: Transformer, atol: float = 1e-12) -> None:
    ours, theirs = loss_and_grads(model), loss_and_grads(expected)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-6)  # losses are float32
    for got, want in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=atol)


@every_family
def test_fused_is_plain(changes):
    assert_same(build({"kernels": "triton"}, **changes), build(**changes))


@every_family
def test_the_fused_operators_run(changes):
    """Once a layer each, and forward and backward alike: else the test above compares plain torch
    with itself.
    """
    with Calls() as calls:
        loss_and_grads(build({"kernels": "triton"}, **changes))
    low = changes.get("r") is not None
    expected = ["norm_down", "up_rotary"] if low else ["norm_qkv"]
    for name in expected:
        assert calls.count[f"lpa::{name}"] == calls.count[f"lpa::{name}_backward"] == 3
    ranks = ModelConfig(**(SHAPE | changes)).ranks
    # A latent norm stands between the operator's two products in gate and up.
    network = 1 if changes.get("latent_norm") else 3
    low_dim = 3 * ((ranks.o is not None) + network * (ranks.ffn is not None))
    assert calls.count["lpa::low_dim"] == calls.count["lpa::low_dim_backward"] == low_dim


def test_auto_on_the_cpu_is_plain_torch():
    with Calls() as calls:
        loss_and_grads(build({"kernels": "auto"}, r=8))
    assert not [name for name in calls.count if name.startswith("lpa::")]


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("rebuild", REBUILD, ids=lambda r: "+".join(r))
@every_family
def test_recomputation_changes_nothing(changes, rebuild, kernels):
    assert_same(build({"kernels": kernels, **rebuild}, **changes), build(**changes))


@pytest.mark.parametrize("rebuild", REBUILD, ids=lambda r: "+".join(r))
@pytest.mark.parametrize("changes", UNFUSED.values(), ids=UNFUSED)
def test_recomputation_changes_nothing_unfused(changes, rebuild):
    changes = {"dropout": 0.0, **changes}
    assert_same(build(rebuild, **changes), build(**changes))


@pytest.mark.parametrize(("every", "count"), [(1, 5), (2, 3), (3, 2), (4, 2), (5, 1), (9, 1)])
def test_every_nth_block_is_recomputed(every, count):
    """From the first on; the others run once."""
    with Calls() as calls:
        how = {"kernels": "triton", "recompute_blocks": True, "recompute_every": every}
        loss_and_grads(build(how, r=8, num_layers=5))
    assert calls.count["lpa::up_rotary"] == 5 + count
    config = ModelConfig(**(SHAPE | {"num_layers": 5}))
    line = planned(config, recompute_blocks=True, recompute_every=every).lines[-1]
    assert line.endswith(f": whole blocks, {count} of 5" if every > 1 else ": whole blocks")


def test_recompute_every_is_at_least_one():
    for value in (0, -2):
        with pytest.raises(ValueError, match=rf"execution\.recompute_every: {value}; .* least 1"):
            Execution(recompute_every=value)


def test_recompute_every_alone_has_no_effect():
    (line,) = Execution(recompute_every=2).warnings()
    assert line == "execution.recompute_every has no effect without recompute_blocks"
    assert Execution(recompute_every=2, recompute_blocks=True).warnings() == []
    assert Execution(recompute_every=1, recompute_qkv=True).warnings() == []


@pytest.mark.parametrize("compile", ["on", "off"])
@pytest.mark.parametrize("rebuild", REBUILD[:4], ids=lambda r: "+".join(r))
def test_recomputation_uses_the_chosen_backend(rebuild, compile):
    """Though it runs in the backward pass, outside of the model's forward."""
    torch._dynamo.reset()
    model = build({"attention": "math", "compile": compile, **rebuild}, r=8)
    if compile == "off":  # compiled code cannot be watched
        with Calls() as calls:
            loss_and_grads(model)
        assert not [name for name in calls.count if "flash" in name]
    assert_same(model, build(r=8), atol=1e-11)


@pytest.mark.parametrize("rebuild", REBUILD, ids=lambda r: "+".join(r))
@pytest.mark.parametrize("family", ["llama", "paper-1"])
def test_recomputation_drops_the_same_elements(family, rebuild):
    changes = {"family": family, "dropout": 0.3, "r": 8}
    model, expected = build(rebuild, **changes), build(**changes)
    assert_same(model.train(), expected.train())


@pytest.mark.parametrize(
    ("rebuild", "again", "kept"),
    [
        ({"recompute_qkv": True}, "lpa::up_rotary", ("lpa::norm_down", "lpa::low_dim")),
        ({"recompute_blocks": True}, "lpa::norm_down", ()),
    ],
    ids=["qkv", "blocks"],
)
def test_what_is_recomputed(rebuild, again, kept):
    """recompute_qkv calls the up-projection twice and nothing that is expensive."""
    core = "aten::_scaled_dot_product_flash_attention_for_cpu"
    with Calls() as calls:
        loss_and_grads(build({"kernels": "triton", **rebuild}, r=8))
    assert calls.count[again] == 6
    for name in (*kept, *((core,) if kept else ())):
        assert calls.count[name] == 3, name


def test_recomputed_latents_are_normalised_again():
    """recompute_qkv keeps them as norm_down made them."""
    normed = {"r": 8, "latent_norm": True}
    with Calls() as plain:
        loss_and_grads(build({"kernels": "triton"}, **normed))
    with Calls() as rebuilt:
        loss_and_grads(build({"kernels": "triton", "recompute_qkv": True}, **normed))
    assert rebuilt.count["lpa::norm_down"] == plain.count["lpa::norm_down"] == 3
    assert rebuilt.count["lpa::up_rotary"] == 2 * plain.count["lpa::up_rotary"] == 6
    # q, k and v of each of three layers
    assert rebuilt.count["aten::rsqrt"] - plain.count["aten::rsqrt"] == 9


def test_recompute_ffn_keeps_its_products():
    with Calls() as plain:
        loss_and_grads(build({"kernels": "triton"}, r=8))
    with Calls() as rebuilt:
        loss_and_grads(build({"kernels": "triton", "recompute_ffn": True}, r=8))
    assert rebuilt.count["aten::mm"] == plain.count["aten::mm"]
    assert rebuilt.count["aten::silu"] == 2 * plain.count["aten::silu"] == 6


# --- hooks and replaced modules ------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["attention", "attention_norm", "attention.q_proj", "attention.o_proj"]
)
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_a_hook_sees_its_module_called(path, register):
    """Fused attention would pass it by; the other layers stay fused."""
    model, seen = build({"kernels": "triton"}, r=8), []
    module = model.layers[1].get_submodule(path)
    handle = getattr(module, register)(lambda *args: seen.append(args) or None)
    with Calls() as calls:
        loss_and_grads(model)
    assert len(seen) == 1
    assert calls.count["lpa::norm_down"] == 2
    assert_same(model, build(r=8))
    handle.remove()
    with Calls() as calls:
        loss_and_grads(model)
    assert calls.count["lpa::norm_down"] == 3


@pytest.mark.parametrize("path", ["attention.q_proj.latent_norm", "attention.v_proj.latent_norm"])
def test_a_hook_of_a_latent_norm_is_called_by_the_fused_layer(path):
    models = [build(how, r=8, latent_norm=True) for how in ({"kernels": "triton"}, None)]
    for model in models:
        norm = model.layers[1].get_submodule(path)
        norm.register_forward_hook(lambda _m, _i, out: 3 * out)
    with Calls() as calls:
        assert_same(*models)
    assert calls.count["lpa::norm_down"] == 3
    assert not torch.allclose(
        loss_and_grads(models[0])[0], loss_and_grads(build(r=8, latent_norm=True))[0]
    )


@pytest.mark.parametrize("compile", ["on", "off"])
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_a_hook_that_comes_after_the_first_call(kernels, compile):
    """Compiled code is not asked again whether there are hooks."""
    torch._dynamo.reset()
    model, plain = build({"kernels": kernels, "compile": compile}, r=8), build(r=8)
    loss_and_grads(model)
    for each in (model, plain):
        projection = each.layers[1].attention.q_proj
        projection.register_forward_hook(lambda _m, _i, out: 3 * out)
    assert_same(model, plain, atol=1e-11)
    assert not torch.allclose(loss_and_grads(model)[1], loss_and_grads(build(r=8))[1])


def test_a_forward_put_on_an_instance_is_called():
    fused, plain = build({"kernels": "triton"}, r=8), build(r=8)
    for model in (fused, plain):
        layer = model.layers[0].attention.k_proj
        layer.forward = lambda x, old=layer.forward: 3 * old(x)
    assert_same(fused, plain)


def test_hooks_of_all_modules_see_all_calls():
    model, seen = build({"kernels": "triton"}, r=8), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    model(tokens(1, 5))
    handle.remove()
    assert [kind.__name__ for kind in seen].count("LowDim") == 12


def test_biases_and_dropout_that_came_later_count():
    fused, plain = build({"kernels": "triton"}), build()
    for model in (fused, plain):
        bias = torch.linspace(-1, 1, 32, dtype=torch.float64)
        model.layers[0].attention.q_proj.bias = nn.Parameter(bias)
        model.layers[1].dropout.p = 0.5
        model.train()
    assert_same(fused, plain)


def test_norms_kept_in_float32():
    """In a bf16 model, as some trainers keep them."""
    models = [build(execution, r=8).bfloat16() for execution in ({"kernels": "triton"}, None)]
    for model in models:
        for block in model.layers:
            block.attention_norm.float()
    ours, theirs = (model(tokens(2, 9)) for model in models)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)


@pytest.mark.parametrize("execution", [None, {"kernels": "triton", "compile": "on"}])
def test_models_can_be_copied_and_pickled(execution):
    """A pickle of our own, read at once."""
    model = build(execution, r=8)
    expected = model(tokens(1, 5))
    copied = copy.deepcopy(model)
    model.layers[0].attention.q_proj.A.data.zero_()
    torch.testing.assert_close(copied(tokens(1, 5)), expected)
    if execution is None:
        again = pickle.loads(pickle.dumps(copied))
        torch.testing.assert_close(again(tokens(1, 5)), expected)


def test_configured_again():
    """The last word counts: compiled, not compiled, compiled."""
    model = build({"compile": "on"}, r=8)
    assert "forward" in vars(model.layers[0])
    configure(model, Execution(compile="off"), CPU, torch.float64)
    assert "forward" not in vars(model.layers[0])


def test_a_replaced_projection_is_called():
    """As adapters do that wrap a layer in one of their own."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    fused, plain = build({"kernels": "triton"}, r=8), build(r=8)
    for model in (fused, plain):
        attention = model.layers[0].attention
        attention.v_proj = Doubled(attention.v_proj)
    assert_same(fused, plain)
    assert not torch.allclose(loss_and_grads(fused)[0], loss_and_grads(build(r=8))[0])


# --- compilation ---------------------------------------------------------------------------------


def graphs(execution: dict[str, Any], **changes: Any) -> tuple[Transformer, int]:
    """A compiled model after a step, and how many graphs it took."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build({"compile": "on", "loss": "whole", **execution}, **changes)
    model.zero_grad()
    model(tokens(2, 20), tokens(2, 20, seed=1)).backward()
    return model, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("rebuild", [{}, REBUILD[2], REBUILD[3]], ids=lambda r: "+".join(r))
@pytest.mark.parametrize("family", ["lpa", "vanilla"])
def test_compiled_blocks_are_one_graph(family, rebuild, kernels):
    """fullgraph holds, all three layers share the graph, the final norm has one of its own, and the
    numbers are those of eager.
    """
    model, count = graphs({"kernels": kernels, **rebuild}, **FAMILIES[family])
    assert count == 2
    assert_same(model, build(**FAMILIES[family]), atol=1e-11)


@pytest.mark.parametrize("rebuild", [{}, REBUILD[2]], ids=lambda r: "+".join(r))
@pytest.mark.parametrize(
    ("kernels", "changes"),
    [
        ("triton", FAMILIES["latent norm"]),
        ("reference", FAMILIES["latent norm, everything low"]),
        ("reference", UNFUSED["qk norm"]),
        ("reference", UNFUSED["both norms"]),
    ],
    ids=str,
)
def test_compiled_blocks_with_norms_are_one_graph(kernels, changes, rebuild):
    model, count = graphs({"kernels": kernels, **rebuild}, **changes)
    assert count == 2
    assert_same(model, build(**changes), atol=1e-11)


@pytest.mark.parametrize(
    ("kernels", "norms", "form"),
    [
        ("triton", {}, "full"),
        ("triton", {"latent_norm": True}, "full"),
        ("triton", {}, "latent"),
        ("reference", {"latent_norm": True, "qk_norm": True}, "full"),
        ("reference", {"latent_norm": True, "qk_norm": True}, "value_latent"),
    ],
    ids=str,
)
def test_compiled_decoding_is_the_forward(kernels, norms, form):
    """Single tokens behind a filled cache: one more graph, whose position is symbolic."""
    model, _ = graphs({"kernels": kernels}, r=8, num_kv_heads=2, **norms)
    model.eval()
    cache, ids = KVCache(model.config, 2, 40, CPU, torch.float64, form), tokens(2, 20)
    with torch.no_grad():
        parts = [model(ids[:, :7], cache=cache)]
        before = 0
        for at in range(7, 20):
            parts.append(model(ids[:, at : at + 1], cache=cache))
            if at == 9:
                before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
        whole = build(r=8, num_kv_heads=2, **norms).eval()(ids)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


# --- documents -----------------------------------------------------------------------------------


def logits(model: Transformer, ids: Tensor, cache: KVCache | None = None) -> Tensor:
    """In float64, before the model rounds them."""
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        model(ids, cache=cache)
    handle.remove()
    return seen[0]


DOCUMENTS = [torch.cat((torch.tensor([3]), 4 + tokens(n, seed=n) % 46)) for n in (7, 1, 12, 3)]


@pytest.mark.parametrize(
    ("execution", "norms"),
    [
        ({}, {}),
        ({"kernels": "triton"}, {}),
        ({"attention": "flex"}, {}),
        ({"kernels": "triton"}, {"latent_norm": True}),
        ({"attention": "flex"}, {"latent_norm": True, "qk_norm": True}),
    ],
    ids=str,
)
def test_packed_documents_are_each_alone(execution, norms):
    model = build(execution, r=8, num_kv_heads=2, document_start_id=3, **norms)
    packed = torch.stack((torch.cat(DOCUMENTS), torch.cat(DOCUMENTS[::-1])))
    alone = [logits(model, document[None])[0] for document in DOCUMENTS]
    expected = torch.stack((torch.cat(alone), torch.cat(alone[::-1])))
    # The rotary table is in float32: equal distances have angles that are equal to 1e-7 or so.
    torch.testing.assert_close(logits(model, packed), expected, rtol=0, atol=1e-5)
    across = build(execution, r=8, num_kv_heads=2, **norms)
    assert (logits(across, packed) - expected).abs().max() > 1e-2


def test_text_before_the_first_document_is_one_of_its_own():
    model = build(r=8, document_start_id=3)
    packed = torch.cat((DOCUMENTS[0][2:], DOCUMENTS[2]))[None]
    parts = [logits(model, DOCUMENTS[0][None, 2:]), logits(model, DOCUMENTS[2][None])]
    torch.testing.assert_close(logits(model, packed), torch.cat(parts, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norms", [{}, {"latent_norm": True, "qk_norm": True}], ids=str)
def test_documents_in_a_cache(norms):
    model, ids = build(r=8, document_start_id=3, **norms), torch.cat(DOCUMENTS)[None]
    cache = KVCache(model.config, 1, 40, CPU, torch.float64)
    parts = [logits(model, chunk, cache) for chunk in ids.split((5, 9, 1, 1, 11), dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids), rtol=0, atol=1e-11)


# --- the plan ------------------------------------------------------------------------------------


def planned(config: ModelConfig, device: str = "cpu", **execution: Any) -> Plan:
    return plan(config, Execution(**execution), torch.device(device), torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Makes the plan believe in a GPU of some architecture, without running anything on it."""

    def pretend(architecture: int) -> None:
        monkeypatch.setattr(dispatch, "architecture", lambda device: architecture)
        capability = divmod(architecture, 10)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


SIZES = {
    "130m": {"hidden_size": 768, "num_heads": 12, "r": 128},
    "370m": {"hidden_size": 1024, "num_heads": 16, "r": 256},
    "3b": {"hidden_size": 3072, "num_heads": 24, "r": 512},
}


@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("changes", [{}, {"r": None}, {"latent_norm": True}], ids=str)
def test_auto_uses_triton_at_the_sizes_of_the_table(gpu, architecture, size, changes):
    gpu(architecture)
    config = ModelConfig(**(SHAPE | SIZES[size] | changes))
    result = planned(config, "cuda")
    assert result.fused
    assert result.compiled
    assert any(line.startswith("kernels: fused operators; Triton: norm") for line in result.lines)
    assert not any("plain torch inside" in line for line in result.lines)
    assert fused_on(config, Execution(), architecture, torch.bfloat16)


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        (89, {}, "sm_89 has no tested configuration; sm_80, sm_90, sm_100 have"),
        (90, {"r": 320}, "hidden size 1024 with rank 320 and heads of 64 has no tested"),
        (90, {"r": 512}, "hidden size 1024 with rank 512 and heads of 64 has no tested"),
        (90, {"num_heads": 8}, "hidden size 1024 with rank 256 and heads of 128 has no tested"),
        (90, {"r": Ranks(q=512, k=256, v=256)}, "hidden size 1024 with rank 512/256 and heads"),
        (90, {"family": "paper-1"}, "family paper-1 has no fused layer"),
        (90, {"dropout": 0.1}, "dropout stands between"),
        (90, {"qk_norm": True}, "qk_norm stands between the projections of q and k and their rot"),
        (90, {"qk_norm": True, "r": None}, "qk_norm stands between the projections"),
        (90, {"r": Ranks(q=256, v=256)}, "of q, k and v some are dense (k)"),
    ],
)
def test_auto_says_why_it_does_not(gpu, architecture, changes, reason):
    gpu(architecture)
    config = ModelConfig(**(SHAPE | SIZES["370m"] | changes))
    result = planned(config, "cuda")
    assert not result.fused
    assert reason in result.lines[0]
    assert not fused_on(config, Execution(), architecture, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_auto_is_for_bfloat16(gpu, dtype):
    gpu(90)
    config = ModelConfig(**(SHAPE | SIZES["370m"]))
    result = plan(config, Execution(), torch.device("cuda"), dtype)
    assert not result.fused
    assert str(dtype).removeprefix("torch.") in result.lines[0]
    assert not fused_on(config, Execution(), 90, dtype)


def test_triton_names_what_falls_back():
    result = planned(ModelConfig(**(SHAPE | {"r": 8})), kernels="triton")
    assert result.fused
    assert "plain torch inside (the device is cpu): norm, norm + down" in result.lines[0]


@pytest.mark.parametrize(
    ("changes", "execution", "message"),
    [
        ({"family": "paper-1"}, {"kernels": "triton"}, r"execution\.kernels: triton, but family"),
        (
            {"qk_norm": True},
            {"kernels": "triton"},
            r"execution\.kernels: triton, but qk_norm stands",
        ),
        ({}, {"attention": "cudnn"}, r"execution\.attention: cudnn needs a GPU; the device is cpu"),
        ({}, {"attention": "flash_attn"}, r"execution\.attention: flash_attn needs a GPU"),
        ({}, {"loss": "liger"}, r"execution\.loss: liger needs a GPU; the device is cpu"),
        ({"document_start_id": 3}, {"attention": "flex"}, "flex trains on a GPU alone"),
        (
            {"document_start_id": 3},
            {"attention": "flash"},
            r"execution\.attention: flash takes no document mask; allowed are auto, flex, math",
        ),
    ],
)
def test_what_cannot_be_had_is_an_error(changes, execution, message):
    with pytest.raises(ValueError, match=message):
        planned(ModelConfig(**(SHAPE | changes)), **execution)


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_backends_that_need_half_precision(gpu, backend):
    gpu(90)
    arguments = (ModelConfig(**SHAPE), Execution(attention=backend), torch.device("cuda"))
    with pytest.raises(ValueError, match=f"attention: {backend} computes in bf16 or fp16, not"):
        plan(*arguments, torch.float32)
    plan(*arguments, torch.bfloat16)


def test_efficient_attention_has_no_grouped_heads(gpu):
    gpu(90)
    planned(ModelConfig(**SHAPE), "cuda", attention="efficient")
    with pytest.raises(ValueError, match="efficient has no grouped"):
        planned(ModelConfig(**(SHAPE | {"num_kv_heads": 2})), "cuda", attention="efficient")


def test_what_is_recomputed_is_what_the_log_says():
    config = ModelConfig(**SHAPE)
    both = {"recompute_qkv": True, "recompute_ffn": True}
    assert "backward: q, k, v; the FFN's" in planned(config, **both).lines[-1]
    assert planned(config, **both, recompute_blocks=True).lines[-1].endswith(": whole blocks")
    line = planned(config, recompute_qkv=True, attention="math").lines[-1]
    assert line.endswith("q, k, v and attention, which math computes in pieces")


def test_flash_attn_that_is_not_installed(gpu):
    gpu(90)
    with pytest.raises(ValueError, match="flash_attn is not installed"):
        planned(ModelConfig(**SHAPE), "cuda", attention="flash_attn")


@pytest.mark.parametrize(
    ("architecture", "first"),
    [(80, "FLASH"), (90, "CUDNN"), (100, "CUDNN")],
)
def test_cudnn_is_first_from_hopper_on(gpu, architecture, first):
    gpu(architecture)
    order = attention._order("auto", torch.device("cuda"))
    assert order[0] == getattr(SDPBackend, f"{first}_ATTENTION")
    assert len(order) == len(set(order)) == 4
    line = next(x for x in planned(ModelConfig(**SHAPE), "cuda").lines if "SDPA" in x)
    assert f"({first.lower()}, " in line


def test_the_chosen_backend_is_the_one_used():
    """math is made of other operators than the CPU's flash attention."""
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    for backend, count in (("flash", 3), ("math", 0)):
        model = build({"attention": backend}, r=8)
        with Calls() as calls, torch.no_grad():
            model(tokens(1, 9))
        assert calls.count[flash] == count


# --- the check on the device ---------------------------------------------------------------------


def checked(**changes: Any) -> str:
    sizes = {"d": 64, "widths": [64, 32, 32], "ranks": [32, 32, 32], "head_dim": 32}
    return verify(**(sizes | changes), device=CPU, dtype=torch.float32)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch):
    """verify() compares, though the definitions in torch compute the operators."""
    monkeypatch.setattr(dispatch, "architecture", lambda device: configs.INTERPRETER)
    monkeypatch.setattr(dispatch, "usable", lambda *args, **kwargs: (False, "pretended"))


@pytest.mark.parametrize("ranks", [[32, 32, 32], [32, 16, 48], [None, None, None]])
def test_what_is_right_passes(pretended, ranks):
    assert checked(ranks=ranks) == ""


@pytest.mark.parametrize("ranks", [[32, 32, 32], [None, None, None]])
@pytest.mark.parametrize(
    ("kernel", "what"),
    [("project", "q"), ("unrotate", "gradient of"), ("norm", "gradient of x")],
)
def test_what_is_wrong_is_found(pretended, monkeypatch, ranks, kernel, what):
    """One part in a thousand is."""
    if kernel == "norm":
        kernel = "norm_backward_matmul" if ranks[0] else "norm_backward"
    right = getattr(dispatch, kernel)

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        result = right(*args, **kwargs)
        return result.mul_(1.001)

    monkeypatch.setattr(dispatch, kernel, wrong)
    assert what in checked(ranks=ranks)


def test_a_kernel_that_does_not_launch_is_found(monkeypatch):
    """Here for want of a driver."""
    monkeypatch.setattr(dispatch, "architecture", lambda device: configs.INTERPRETER)
    assert checked().startswith("they raise ")


def test_a_model_falls_back_where_the_check_fails(monkeypatch):
    monkeypatch.setattr("model.configure.verify", lambda **_: "q is off by 1e-1")
    monkeypatch.setattr(dispatch, "architecture", lambda device: configs.INTERPRETER)
    model = build(r=32, hidden_size=64, num_heads=2, head_dim=32, num_layers=1)
    chosen = configure(model, Execution(), CPU, torch.float16)
    assert not chosen.fused
    assert not model.layers[0].fused
    assert chosen.lines[0] == (
        "kernels: plain torch; the fused operators failed their check: q is off by 1e-1"
    )
    with pytest.raises(ValueError, match=r"execution\.kernels: triton, but on cpu q is off"):
        configure(model, Execution(kernels="triton"), CPU, torch.float16)


def test_operators_by_themselves_match_those_of_the_model():
    """The public operators, used as the documentation says, are the layer."""
    model, x = build(r=8, num_layers=1), torch.randn(2, 9, 32, dtype=torch.float64)
    block = model.layers[0]
    rotary = model._embed(tokens(2, 9), torch.arange(9))[1]
    assert rotary is not None
    a = block.attention
    h, residual = ops.norm_down(
        x, block.attention_norm.weight, (a.q_proj.A, a.k_proj.A, a.v_proj.A), 1e-6
    )
    q, k, v = ops.up_rotary(h, (a.q_proj.B, a.k_proj.B, a.v_proj.B), *rotary, 8)
    y = attention.attend(q, k, v).flatten(2)
    y = ops.low_dim_linear(y, a.o_proj.A, a.o_proj.B, residual=residual)
    torch.testing.assert_close(y, block._attend(x, rotary, None, None), rtol=0, atol=1e-12)
