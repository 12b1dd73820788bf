"""The custom operators on the CPU: numbers against the layers written out in float64, and what
torch does with them (compile, checkpoint, autocast, fake tensors).
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kernels import ops
from tests.kernels.oracle import (
    EPS,
    F64,
    OPERATORS,
    Case,
    Shape,
    assert_case,
    case,
    randn,
    run,
)

PLAIN = Shape()
SHAPES = {
    "plain": PLAIN,
    "grouped": Shape(heads=6, kv_heads=2),
    "unequal_ranks": Shape(ranks=(8, 4, 2), kv_heads=1),
    "one_token": Shape(batch=3, length=1, start=7),
    "one_sequence": Shape(batch=1, length=4, start=2),
}
SINGLE, LAYERS = OPERATORS[:4], OPERATORS[4:]


def exactly_near(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Float64: some roundings of 1e-16 each."""
    for result, value in zip(results, expected, strict=True):
        assert_close(result, value, rtol=1e-12, atol=1e-13)


def expected_results(one: Case, incoming: Sequence[Tensor]) -> list[Tensor]:
    return run(one.plain, list(one.inputs.values()), incoming)


class Calls(TorchDispatchMode):
    """The operators lpa::* that really run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "lpa":
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.made.append((func._opname, given))
        return func(*args, **(kwargs or {}))

    def count(self) -> Counter[str]:
        return Counter(name for name, _ in self.made)

    def arguments(self, name: str) -> dict[str, Any]:
        """Those of the only call of that name."""
        (given,) = (given for made, given in self.made if made == name)
        return given


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_outputs_and_gradients(name, shape):
    one = case(name, shape)
    incoming = one.incoming()
    results = run(one.ours, list(one.inputs.values()), incoming)
    exactly_near(results, expected_results(one, incoming))


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 4)])
def test_any_leading_dimensions(shape):
    """norm_down and low_dim_linear know no time."""
    for name in ("norm_down", "low_dim_linear"):
        one = case(name, Shape(batch=24 if len(shape) == 3 else 6, length=1))
        inputs = {
            key: t.reshape(*shape, -1) if key in ("x", "residual") else t
            for key, t in one.inputs.items()
        }
        changed = Case(one.ours, one.plain, inputs, one.outputs)
        incoming = changed.incoming()
        results = run(one.ours, list(inputs.values()), incoming)
        assert results[0].shape[:-1] == shape
        exactly_near(results, expected_results(changed, incoming))


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    return [c for n in range(1, len(names) + 1) for c in itertools.combinations(names, n)]


@pytest.mark.parametrize(
    ("name", "used"),
    [
        *(("norm_down", used) for used in subsets(("h", "residual"))),
        *(("up_rotary", used) for used in [("q",), ("k",), ("v",), ("q", "k", "v")]),
        *(("norm_qkv", (*used, *rest)) for used in [(), ("q",), ("k",), ("v",), ("q", "k", "v")]
          for rest in [(), ("residual",)] if used or rest),
        ("low_dim_linear", ("y",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)  # fmt: skip
def test_gradcheck(name, used):
    """Whatever outputs are used, the residual among them or not."""
    one = case(name, Shape(batch=2, length=2, d=3, ranks=(2, 1, 2), head_dim=2, kv_heads=1))
    places = [one.outputs.index(output) for output in used]

    def chosen(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = one.ours(*inputs)
        return tuple(outputs[place] for place in places)

    inputs = [t.detach().requires_grad_() for t in one.inputs.values()]
    unused = used == ("residual",)  # then the weights have no gradient, which is no zero
    assert torch.autograd.gradcheck(chosen, inputs, check_undefined_grad=not unused)


@pytest.mark.parametrize("given", subsets(("bias_a", "bias_b", "residual")), ids="+".join)
def test_low_dim_linear_without_some_of_its_terms(given):
    one = case("low_dim_linear", PLAIN)
    missing = {key: torch.zeros_like(t) for key, t in one.inputs.items() if key not in given}
    x, a, b = (one.inputs[key] for key in ("x", "a", "b"))
    leaves = [t.detach().requires_grad_() for t in (x, a, b, *(one.inputs[key] for key in given))]
    y = ops.low_dim_linear(*leaves[:3], **dict(zip(given, leaves[3:], strict=True)))
    incoming = one.incoming()
    results = [y.detach(), *torch.autograd.grad(y, leaves, incoming)]
    inputs = {**one.inputs, **{key: missing[key] for key in missing if key not in "xab"}}
    everything = run(one.plain, list(inputs.values()), incoming)
    keys = ["y", *inputs]
    kept = [t for key, t in zip(keys, everything, strict=True) if key in ("y", *"xab", *given)]
    exactly_near(results, kept)


def test_low_dim_linear_of_factors_alone():
    one = case("low_dim_linear", PLAIN)
    x, a, b = (one.inputs[key] for key in ("x", "a", "b"))
    assert torch.autograd.gradcheck(
        ops.low_dim_linear, [t.detach().requires_grad_() for t in (x, a, b)]
    )
    exactly_near([ops.low_dim_linear(x, a, b)], [torch.einsum("or,rd,btd->bto", b, a, x)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", OPERATORS)
def test_half_precision(name, dtype):
    """Errors against float64 of the same rounded inputs: at most twice those of plain torch."""
    shape = Shape(2, 48, 128, (32, 32, 16), heads=4, kv_heads=2, head_dim=32, start=1000)
    one = case(name, shape, dtype)
    incoming = one.incoming()
    assert_case(one, incoming, run(one.ours, list(one.inputs.values()), incoming))


@pytest.mark.parametrize("name", SINGLE)
def test_rows_of_zeros_and_of_large_numbers(name):
    one = case(name, PLAIN)
    first = next(iter(one.inputs.values()))
    first[0, 0] = 0
    first[0, 1] *= 1e3
    first[1, 2] *= 1e-3
    incoming = one.incoming()
    results = run(one.ours, list(one.inputs.values()), incoming)
    for result, value in zip(results, expected_results(one, incoming), strict=True):
        assert_close(result, value, rtol=1e-11, atol=1e-11)


def spread(t: Tensor) -> Tensor:
    """The same numbers, columns of a wider tensor."""
    if t.dim() == 1:
        return torch.stack((t, t), dim=1)[:, 0]
    whole = torch.full((*t.shape[:-1], t.size(-1) + 3), torch.nan, dtype=t.dtype)
    whole[..., 2:-1] = t
    return whole[..., 2:-1]


def swapped(t: Tensor) -> Tensor:
    """The same numbers, the first two dimensions swapped in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else spread(t)


@pytest.mark.parametrize("strided", [spread, swapped])
@pytest.mark.parametrize("name", SINGLE)
def test_strided_inputs_and_gradients(name, strided):
    """(B, H, T, D) turned is what attention kernels return for q, k and v."""
    one = case(name, Shape(heads=3, kv_heads=2))
    incoming = one.incoming()
    expected = expected_results(one, incoming)
    inputs = [strided(t) for t in one.inputs.values()]
    assert not any(t.is_contiguous() for t in inputs)
    turned = [swapped(t) if t.dim() < 4 else t.transpose(1, 2).contiguous().transpose(1, 2)
              for t in incoming]  # fmt: skip
    assert not any(t.is_contiguous() for t in turned)
    exactly_near(run(one.ours, inputs, turned), expected)


def test_gradients_of_one_number():
    """The gradient of a sum is one number in memory, expanded."""
    for name in SINGLE:
        one = case(name, PLAIN)
        incoming = [torch.ones((), dtype=F64).expand(y.shape) for y in one.incoming()]
        results = run(one.ours, list(one.inputs.values()), incoming)
        exactly_near(results, expected_results(one, incoming))


# --- what is not asked for ----------------------------------------------------------------------

PARAMETERS = {
    "norm_down": ("norm_weight", "a_q", "a_k", "a_v"),
    "up_rotary": ("b_q", "b_k", "b_v"),
    "norm_qkv": ("norm_weight", "w_q", "w_k", "w_v"),
    "low_dim_linear": ("a", "b"),
}
BACKWARD = {name: f"{name}_backward" for name in PARAMETERS}
BACKWARD["low_dim_linear"] = "low_dim_backward"


def backward_of_some(
    one: Case, wanted: set[str], outputs: Sequence[str]
) -> tuple[dict[str, Tensor | None], Calls]:
    """Gradients where only some inputs require any, and the calls of the backward pass."""
    leaves = {
        key: t.detach().clone().requires_grad_(key in wanted) for key, t in one.inputs.items()
    }
    results = dict(zip(one.outputs, one.ours(*leaves.values()), strict=True))
    incoming = dict(zip(one.outputs, one.incoming(), strict=True))
    with Calls() as calls:
        torch.autograd.backward(
            [results[key] for key in outputs], [incoming[key] for key in outputs]
        )
    return {key: leaf.grad for key, leaf in leaves.items()}, calls


def expected_gradients(one: Case) -> dict[str, Tensor]:
    gradients = expected_results(one, one.incoming())[len(one.outputs) :]
    return dict(zip(one.inputs, gradients, strict=True))


@pytest.mark.parametrize("name", PARAMETERS)
def test_frozen_weights(name):
    """Only the gradient of the input: those of the weights are not computed."""
    one = case(name, PLAIN)
    wanted = {key for key, rows in zip(one.inputs, one.batched, strict=True) if rows}
    gradients, calls = backward_of_some(one, wanted, one.outputs)
    assert calls.arguments(BACKWARD[name])["weights"] is False
    for key, value in expected_gradients(one).items():
        if key in wanted:
            exactly_near([gradients[key]], [value])
        else:
            assert gradients[key] is None


@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_are_not_frozen(name):
    one = case(name, PLAIN)
    for trained in PARAMETERS[name]:  # any one of them
        gradients, calls = backward_of_some(one, {trained}, one.outputs[:1])
        assert calls.arguments(BACKWARD[name])["weights"] is True
        assert {key for key, t in gradients.items() if t is not None} == {trained}


@pytest.mark.parametrize("name", PARAMETERS)
def test_frozen_input(name):
    one = case(name, PLAIN)
    outputs = [output for output in one.outputs if output != "residual"]
    wanted = {key for key, rows in zip(one.inputs, one.batched, strict=True) if not rows}
    gradients, calls = backward_of_some(one, wanted, outputs)
    for key, value in expected_gradients(one).items():
        if key in wanted:
            exactly_near([gradients[key]], [value])
        else:
            assert gradients[key] is None
    if name == "low_dim_linear":
        assert calls.arguments(BACKWARD[name])["inputs"] is False


def test_without_biases_none_is_summed():
    one = case("low_dim_linear", PLAIN)
    x, a, b = (one.inputs[key].detach().requires_grad_() for key in ("x", "a", "b"))
    with Calls() as calls:
        ops.low_dim_linear(x, a, b).sum().backward()
    assert calls.arguments("low_dim_backward")["biases"] is False


@pytest.mark.parametrize(("name", "backward"), [("norm_down", 0), ("norm_qkv", 1)])
def test_the_residual_alone(name, backward):
    """Where only the residual is used, the gradient passes through norm_down untouched."""
    one = case(name, PLAIN)
    gradients, calls = backward_of_some(one, set(one.inputs), ["residual"])
    exactly_near([gradients["x"]], [one.incoming()[-1]])
    assert calls.count() == ({BACKWARD[name]: 1} if backward else {})


@pytest.mark.parametrize("name", OPERATORS)
def test_without_gradients(name):
    """The same outputs, and nothing kept for a backward pass."""
    one = case(name, PLAIN)
    inputs = [t.detach().requires_grad_() for t in one.inputs.values()]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        with torch.no_grad():
            outputs = one.ours(*inputs)
        assert not kept
        expected = one.ours(*inputs)
        assert kept
    assert all(a.equal(b) for a, b in zip(outputs, expected, strict=True))


# --- memory -------------------------------------------------------------------------------------


def saved_bytes(function: Callable[..., Any], inputs: Sequence[Tensor], count: int) -> int:
    """Bytes of the storages that the forward pass keeps, without those of the last `count` inputs,
    the parameters.
    """
    leaves = [t.detach().requires_grad_() for t in inputs]
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = function(*leaves)
    for parameter in leaves[-count:]:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del outputs
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_the_normalised_input_is_not_saved():
    """x, h and rstd stay, and the rotary table: no normalised x, no q, k or v before rotation."""
    shape = Shape(length=16, d=32, head_dim=8)
    down, up = case("norm_down", shape), case("up_rotary", shape)
    inputs = [*down.inputs.values(), *list(up.inputs.values())[1:]]

    def fused(x: Tensor, w: Tensor, *f: Tensor) -> Any:
        h, residual = down.ours(x, w, *f[:3])
        return up.ours(h, *f[3:]), residual

    def plain(x: Tensor, w: Tensor, *f: Tensor) -> Any:
        h, residual = down.plain(x, w, *f[:3])
        return up.plain(h, *f[3:]), residual

    x, h = down.inputs["x"], up.inputs["h"]
    table = sum(t.nbytes for t in shape.table())
    rows = x.size(0) * x.size(1)
    assert saved_bytes(fused, inputs, 7) == x.nbytes + h.nbytes + rows * 8 + table
    assert saved_bytes(plain, inputs, 7) >= 2 * x.nbytes + h.nbytes  # the hooks see x̂ there


def test_the_vanilla_layer_saves_its_input_alone():
    one = case("norm_qkv", PLAIN)
    x = one.inputs["x"]
    table = sum(t.nbytes for t in PLAIN.table())
    rows = x.size(0) * x.size(1)
    assert saved_bytes(one.ours, list(one.inputs.values()), 4) == x.nbytes + rows * 8 + table


# --- torch.library ------------------------------------------------------------------------------


def operator_arguments(shape: Shape, dtype: torch.dtype = F64) -> dict[str, list[list[Any]]]:
    """For each operator some lists of arguments, as the public functions make them."""
    inputs: dict[str, Tensor] = {}
    for name in SINGLE:
        inputs |= {k: t if t.dim() < 3 else t.flatten(0, 1)
                   for k, t in case(name, shape, dtype).inputs.items()}  # fmt: skip
    x, h, w = inputs["x"], inputs["h"], inputs["norm_weight"]
    rows = x.size(0)
    a, b, dense = ([inputs[f"{letter}_{c}"] for c in "qkv"] for letter in "abw")
    table = [*shape.table(), shape.head_dim]
    rstd = randn(rows, seed=20).abs().to(torch.promote_types(dtype, torch.float32))
    dq, dk, dv = (randn(rows, n, seed=21).to(dtype) for n in shape.widths)
    dh, dx = torch.randn_like(h), torch.randn_like(x)
    pair = [inputs["a"], inputs["b"]]
    biases = [inputs["bias_a"], inputs["bias_b"]]
    latent, dy = randn(rows, shape.ranks[0], seed=22).to(dtype), dq
    flags = (False, True)
    return {
        "row_rstd": [[x, EPS]],
        "norm_down": [[x, rstd, w, *a]],
        "norm_down_backward": [
            [dh, d_residual, h, x, rstd, w, *a, weights]
            for d_residual, weights in zip((dx, None), flags, strict=True)
        ],
        "up_rotary": [[h, *b, *table]],
        "up_rotary_backward": [[dq, dk, dv, h, *b, *table, weights] for weights in flags],
        "norm_qkv": [[x, rstd, w, *dense, *table]],
        "norm_qkv_backward": [
            [dq, dk, dv, d_residual, x, rstd, w, *dense, *table, weights]
            for d_residual, weights in zip((dx, None), flags, strict=True)
        ],
        "low_dim": [
            [x, *pair, *biases, dq],
            [x, *pair, None, None, None],
            [x, *pair, None, biases[1], None],
        ],
        "low_dim_backward": [
            [dy, x, latent, *pair, *wanted]  # inputs, weights, biases
            for wanted in [(True, False, True), (False, True, False), (True, True, True)]
        ],
    }


LIBRARY = tuple(operator_arguments(PLAIN))
DIFFERENTIABLE = ("up_rotary", "low_dim")  # the others are called by autograd functions


def test_every_operator_is_tested():
    defined = {name.removesuffix(".default") for name in torch._C._dispatch_get_all_op_names()
               if name.startswith("lpa::")}  # fmt: skip
    assert defined == {f"lpa::{name}" for name in LIBRARY}


def library_operator(name: str) -> Any:
    return getattr(torch.ops.lpa, name).default


def inputs_of(name: str, arguments: list[Any]) -> list[Any]:
    return [
        t.detach().requires_grad_()
        if name in DIFFERENTIABLE and isinstance(t, Tensor) and t.dtype == F64
        else t
        for t in arguments
    ]


@pytest.mark.parametrize("name", LIBRARY)
def test_opcheck(name):
    """The schema is true (nothing is mutated, no output is an input), fake tensors predict shapes
    and strides, autograd and dynamic shapes work under AOTDispatcher.
    """
    for arguments in operator_arguments(PLAIN)[name]:
        strided = [swapped(t) if isinstance(t, Tensor) else t for t in arguments]
        for given in (arguments, strided):
            results = torch.library.opcheck(library_operator(name), inputs_of(name, given))
            assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_fake_cuda_tensors(name, dtype):
    """Shapes, strides and dtypes on a GPU, without one."""
    for arguments in operator_arguments(SHAPES["grouped"], dtype)[name]:
        real = library_operator(name)(*arguments)
        with FakeTensorMode():
            fake = library_operator(name)(
                *(
                    torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                    if isinstance(t, Tensor)
                    else t
                    for t in arguments
                )
            )
        several = isinstance(real, tuple)
        for a, b in zip(real if several else [real], fake if several else [fake], strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            assert b.device.type == "cuda"


def test_public_functions_of_fake_cuda_tensors():
    shape = SHAPES["grouped"]
    batch, length, heads, kv_heads = shape.batch, shape.length, shape.heads, shape.kv_heads
    sizes = {key: t.shape for name in SINGLE for key, t in case(name, shape).inputs.items()}
    with FakeTensorMode():
        on_gpu = functools.partial(torch.empty, device="cuda", dtype=torch.bfloat16)
        given = {key: on_gpu(size) for key, size in sizes.items()}
        a, b, w = ([given[f"{letter}_{c}"] for c in "qkv"] for letter in "abw")
        table = [torch.empty(length, shape.head_dim // 2, device="cuda") for _ in range(2)]
        h, residual = ops.norm_down(given["x"], given["norm_weight"], a, EPS)
        lpa = ops.up_rotary(h, b, *table, shape.head_dim)
        *dense, same = ops.norm_qkv(
            given["x"], given["norm_weight"], w, EPS, *table, shape.head_dim
        )
        y = ops.low_dim_linear(*(given[key] for key in ("x", "a", "b", "bias_a", "bias_b")))
    for q, k, v in (lpa, dense):
        assert q.shape == (batch, length, heads, shape.head_dim)
        assert k.shape == v.shape == (batch, length, kv_heads, shape.head_dim)
    assert h.shape == sizes["h"]
    assert residual.shape == same.shape == sizes["x"]
    assert y.shape == sizes["residual"]
    for t in (h, residual, *lpa, *dense, same, y):
        assert (t.device.type, t.dtype) == ("cuda", torch.bfloat16)


# --- torch.compile, checkpoints, autocast -------------------------------------------------------


def same_as_eager(function: Callable[..., Any], one: Case, dtype: torch.dtype = F64) -> None:
    inputs = list(one.inputs.values())
    incoming = one.incoming()
    exactly_near(run(function, inputs, incoming), run(one.ours, inputs, incoming))


@pytest.mark.parametrize(
    ("name", "dynamic"), [*((name, False) for name in SINGLE), *((name, True) for name in LAYERS)]
)
def test_compiled_without_code_generation(name, dynamic):
    """aot_eager: all of torch.compile but Inductor. fullgraph: nothing falls out of the graph."""
    torch.compiler.reset()
    one = case(name, PLAIN)
    compiled = torch.compile(one.ours, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    same_as_eager(compiled, one)


def test_compiled_layer():
    torch.compiler.reset()
    one = case("layer", PLAIN)
    same_as_eager(torch.compile(one.ours, fullgraph=True), one)


@pytest.mark.parametrize("name", OPERATORS)
def test_under_checkpoint(name):
    one = case(name, PLAIN)
    same_as_eager(functools.partial(checkpoint, one.ours, use_reentrant=False), one)


ALL = ("norm_down", "up_rotary", "low_dim")


@pytest.mark.parametrize("kept", [(), *subsets(ALL)], ids="+".join)
def test_selective_checkpoint(kept):
    """An operator that must be saved runs once, the others again in the backward pass."""
    one = case("layer", PLAIN)
    saved = [library_operator(name) for name in kept]

    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = operator in saved
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    # Something behind the layer that needs its result, or the last operator would not run again.
    def layer(*inputs: Tensor) -> tuple[Tensor, ...]:
        return (one.ours(*inputs)[0].sin(),)

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    function = functools.partial(checkpoint, layer, use_reentrant=False, context_fn=contexts)
    inputs, incoming = list(one.inputs.values()), one.incoming()
    with Calls() as calls:
        results = run(function, inputs, incoming)
    assert all(a.equal(b) for a, b in zip(results, run(layer, inputs, incoming), strict=True))
    counts = calls.count()
    assert {name: counts[name] for name in ALL} == {name: 1 if name in kept else 2 for name in ALL}
    assert all(counts[BACKWARD.get(name, "low_dim_backward")] == 1 for name in ALL)


@pytest.mark.parametrize("name", SINGLE)
def test_autocast(name):
    """As with inputs cast beforehand; gradients in the dtype of the inputs."""
    one = case(name, Shape(length=8, d=32, head_dim=8), torch.float32)
    inputs = [t for key, t in one.inputs.items() if key != "residual"]
    places = [i for i, key in enumerate(one.outputs) if key != "residual"]
    incoming = [one.incoming()[place].bfloat16() for place in places]

    def without_residual(*inputs: Tensor) -> list[Tensor]:
        outputs = one.ours(*inputs)
        return [outputs[place] for place in places]

    def under_autocast(*inputs: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return without_residual(*inputs)

    expected = run(without_residual, [t.bfloat16() for t in inputs], incoming)
    results = run(under_autocast, inputs, incoming)
    assert all(y.dtype == torch.bfloat16 for y in results[: len(places)])
    assert all(g.dtype == torch.float32 for g in results[len(places) :])
    assert all(a.float().equal(b.float()) for a, b in zip(results, expected, strict=True))


def test_under_autocast_the_residual_stream_keeps_its_dtype():
    """It comes out as it went in, its gradient is added in float32, and so is a layer's result."""
    for name in ("norm_down", "norm_qkv"):
        one = case(name, PLAIN, torch.float32)
        x, *rest = one.inputs.values()
        with torch.autocast("cpu", torch.bfloat16):
            *outputs, residual = one.ours(x.requires_grad_(), *rest)
        assert residual.dtype == torch.float32
        assert residual.equal(x)
        sums = sum(y.float().sum() for y in outputs)
        (through_norm,) = torch.autograd.grad(sums, x, retain_graph=True)
        (both,) = torch.autograd.grad(sums + (0.001 * residual).sum(), x)
        assert both.equal(through_norm + 0.001)
    inputs = case("low_dim_linear", PLAIN, torch.float32).inputs
    residual = inputs.pop("residual").requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.low_dim_linear(*inputs.values(), residual=residual)
        assert y.dtype == torch.float32
        assert y.equal(residual + ops.low_dim_linear(*inputs.values()))
        half = {key: t.bfloat16() for key, t in inputs.items()}  # as attention's output is
        assert y.equal(ops.low_dim_linear(*half.values(), residual=residual))
    assert torch.autograd.grad(y.sum(), residual)[0].equal(torch.ones_like(residual))


def test_autocast_leaves_float64_alone():
    """As torch's own does."""
    for name in SINGLE:
        one = case(name, PLAIN)
        with torch.autocast("cpu", torch.bfloat16):
            results = one.ours(*one.inputs.values())
        for ours, theirs in zip(results, one.ours(*one.inputs.values()), strict=True):
            assert ours.dtype == torch.float64
            assert ours.equal(theirs)


def test_large_rows_do_not_overflow_float16():
    """x Aᵀ passes 65504 here before it is scaled, and h is of the size of 1."""
    inputs = {k: t.half() for k, t in case("norm_down", PLAIN).inputs.items()}
    inputs["x"] = inputs["x"] * 1e4
    h, _ = ops.norm_down(
        inputs["x"], inputs["norm_weight"], tuple(10 * inputs[f"a_{c}"] for c in "qkv"), EPS
    )
    assert h.isfinite().all()
    assert (inputs["x"].float() @ (10 * inputs["a_q"]).float().t()).abs().max() > 65504


def test_an_empty_batch():
    arguments = good()
    for name, function in (("norm_down", ops.norm_down), ("norm_qkv", ops.norm_qkv)):
        inputs = arguments[name]
        x = inputs["x"][:0].requires_grad_()
        outputs = function(**inputs | {"x": x})
        sum(t.sum() for t in outputs).backward()
        assert outputs[0].shape[0] == 0
        assert x.grad.shape == x.shape
    assert (
        ops.up_rotary(**arguments["up_rotary"] | {"h": arguments["up_rotary"]["h"][:0]})[0].shape[0]
        == 0
    )


def test_what_is_frozen_is_not_computed():
    """Biases alone, weights alone; and nothing at all where only the residual wants a gradient."""
    seen: list[tuple[bool, ...]] = []
    inputs = {key: t.detach() for key, t in good()["low_dim_linear"].items()}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.lpa.low_dim_backward.default:
                seen.append(args[5:])
            return func(*args, **(kwargs or {}))

    for wanted in (("bias_b",), ("a",), ("residual",), ("x", "b")):
        leaves = {k: t.clone().requires_grad_(k in wanted) for k, t in inputs.items()}
        with Watch():
            ops.low_dim_linear(**leaves).sum().backward()
        assert {k for k, t in leaves.items() if t.grad is not None} == set(wanted)
    assert seen == [(False, False, True), (False, True, False), (True, True, False)]


# --- errors -------------------------------------------------------------------------------------


def good() -> dict[str, dict[str, Any]]:
    """Arguments of the public functions, all right."""
    inputs = {key: t for name in SINGLE for key, t in case(name, PLAIN).inputs.items()}
    a, b, w = ([inputs[f"{letter}_{c}"] for c in "qkv"] for letter in "abw")
    cos, sin = PLAIN.table()
    table = {"cos": cos, "sin": sin, "head_dim": PLAIN.head_dim}
    norm = {"x": inputs["x"], "norm_weight": inputs["norm_weight"], "eps": EPS}
    rest = ("x", "a", "b", "bias_a", "bias_b", "residual")
    return {
        "norm_down": {**norm, "factors": a},
        "up_rotary": {"h": inputs["h"], "factors": b, **table},
        "norm_qkv": {**norm, "weights": w, **table},
        "low_dim_linear": {key: inputs[key] for key in rest},
    }


def of_three(place: int, change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """Changes one of three matrices."""
    return lambda three: [change(t) if i == place else t for i, t in enumerate(three)]


def shaped(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t.new_ones(shape)


def on_meta(t: Tensor) -> Tensor:
    return t.to("meta")


ONE_DTYPE = "torch.float32; allowed is torch.float64, as the input"
ONE_DEVICE = "on meta; allowed is cpu, as the input"
TABLE = "allowed is (5, 2), a row for each position and a column for each pair of a head"
BAD: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("norm_down", "x", Tensor.long, "x: torch.int64; allowed are floating dtypes"),
    ("norm_down", "factors", lambda f: f[:2], "factors: 2 matrices; allowed are 3, for q, k and v"),
    ("norm_down", "factors", of_three(1, shaped(4, 11)),
     "factors[k]: shape (4, 11); allowed is (rows, 12)"),
    ("norm_down", "factors", of_three(2, shaped(12)),
     "factors[v]: shape (12,); allowed is (rows, 12)"),
    ("norm_down", "factors", of_three(0, Tensor.float), f"factors[q]: {ONE_DTYPE}"),
    ("norm_down", "factors", of_three(2, on_meta), f"factors[v]: {ONE_DEVICE}"),
    ("norm_down", "norm_weight", shaped(1), "norm_weight: shape (1,); allowed is (12,)"),
    ("norm_down", "norm_weight", Tensor.float, f"norm_weight: {ONE_DTYPE}"),
    ("norm_down", "norm_weight", on_meta, f"norm_weight: {ONE_DEVICE}"),
    ("norm_down", "x", shaped(12), "x: shape (12,); allowed is (..., rows, d)"),
    ("norm_down", "x", shaped(), "x: shape (); allowed is (..., rows, d)"),
    ("up_rotary", "factors", lambda f: f[1:],
     "factors: 2 matrices; allowed are 3, for q, k and v"),
    ("up_rotary", "factors", of_three(0, shaped(8)),
     "factors[q]: shape (8,); allowed is (rows, r)"),
    ("up_rotary", "cos", on_meta, f"cos: {ONE_DEVICE}"),
    ("up_rotary", "sin", Tensor.int,
     "sin: torch.int32; allowed are torch.float32 and torch.float64"),
    ("norm_qkv", "cos", on_meta, f"cos: {ONE_DEVICE}"),
    ("low_dim_linear", "x", shaped(12), "x: shape (12,); allowed is (..., rows, d_in)"),
    ("low_dim_linear", "residual", Tensor.float, f"residual: {ONE_DTYPE}"),
    ("up_rotary", "h", Tensor.int, "h: torch.int32; allowed are floating dtypes"),
    ("up_rotary", "h", shaped(10, 12), "h: shape (10, 12); allowed is (B, T, 12), the ranks' sum"),
    ("up_rotary", "h", shaped(2, 5, 11),
     "h: shape (2, 5, 11); allowed is (B, T, 12), the ranks' sum"),
    ("up_rotary", "factors", of_three(0, Tensor.float), f"b_q: {ONE_DTYPE}"),
    ("up_rotary", "factors", of_three(1, on_meta), f"b_k: {ONE_DEVICE}"),
    ("up_rotary", "factors", of_three(0, shaped(10, 4)),
     "b_q: 10 rows; allowed are multiples of head_dim 4"),
    ("up_rotary", "factors", of_three(2, shaped(4, 4)),
     "b_v: 4 rows; allowed are 8, as b_k has"),
    ("up_rotary", "head_dim", lambda _: 3, "head_dim: 3; allowed are even numbers from 2"),
    ("up_rotary", "head_dim", lambda _: 0, "head_dim: 0; allowed are even numbers from 2"),
    ("up_rotary", "cos", shaped(4, 2), f"cos: shape (4, 2); {TABLE}"),
    ("up_rotary", "sin", shaped(5, 4), f"sin: shape (5, 4); {TABLE}"),
    ("norm_qkv", "x", Tensor.bool, "x: torch.bool; allowed are floating dtypes"),
    ("norm_qkv", "x", shaped(10, 12), "x: shape (10, 12); allowed is (B, T, d)"),
    ("norm_qkv", "weights", lambda w: w[:1], "weights: 1 matrices; allowed are 3, for q, k and v"),
    ("norm_qkv", "weights", of_three(1, shaped(8, 11)),
     "weights[k]: shape (8, 11); allowed is (rows, 12)"),
    ("norm_qkv", "weights", of_three(0, Tensor.float), f"weights[q]: {ONE_DTYPE}"),
    ("norm_qkv", "weights", of_three(0, shaped(6, 12)),
     "w_q: 6 rows; allowed are multiples of head_dim 4"),
    ("norm_qkv", "weights", of_three(1, shaped(4, 12)), "w_v: 8 rows; allowed are 4, as w_k has"),
    ("norm_qkv", "norm_weight", shaped(13), "norm_weight: shape (13,); allowed is (12,)"),
    ("norm_qkv", "sin", shaped(6, 2), f"sin: shape (6, 2); {TABLE}"),
    ("low_dim_linear", "x", Tensor.int, "x: torch.int32; allowed are floating dtypes"),
    ("low_dim_linear", "a", shaped(4, 11), "a: shape (4, 11); allowed is (r, 12)"),
    ("low_dim_linear", "a", Tensor.float, f"a: {ONE_DTYPE}"),
    ("low_dim_linear", "b", shaped(8, 5), "b: shape (8, 5); allowed is (d_out, 4)"),
    ("low_dim_linear", "b", on_meta, f"b: {ONE_DEVICE}"),
    ("low_dim_linear", "bias_a", shaped(1), "bias_a: shape (1,); allowed is (4,)"),
    ("low_dim_linear", "bias_b", shaped(8, 1), "bias_b: shape (8, 1); allowed is (8,)"),
    ("low_dim_linear", "bias_b", Tensor.float, f"bias_b: {ONE_DTYPE}"),
    ("low_dim_linear", "residual", shaped(5, 8),
     "residual: shape (5, 8); allowed is (2, 5, 8)"),
    ("low_dim_linear", "residual", on_meta, f"residual: {ONE_DEVICE}"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "argument", "change", "message"), BAD, ids=[f"{b[0]}-{b[3][:24]}" for b in BAD]
)
def test_errors(name, argument, change, message):
    """What is wrong, what came and what is allowed."""
    arguments = good()[name]
    function = getattr(ops, name)
    function(**arguments)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        function(**arguments | {argument: change(arguments[argument])})
    assert str(error.value) == message
