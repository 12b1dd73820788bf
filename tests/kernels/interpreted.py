"""The Triton kernels in Triton's interpreter, on the CPU. test_interpreter.py runs this module in a
process of its own, because the interpreter is chosen when triton is imported.

float32 and float16 only: the interpreter multiplies the bit patterns of bfloat16.
"""

import inspect
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import dispatch, ops, reference
from kernels.triton import configs, launch, matmul, rows
from tests.kernels.oracle import (
    LAUNCHES,
    Call,
    Guards,
    Shape,
    assert_accurate,
    assert_case,
    case,
    count_launches,
    guard_outputs,
    run,
)

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return count_launches(monkeypatch)


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    guards = guard_outputs(monkeypatch)
    yield guards
    guards.check()


# M: 1, less than a block, no multiple of one. T: all positions in one row, M, less than M.
CALLS = [
    Call("project", 1, 32, 16, scaled=True),
    Call("project", 40, 64, 48, scaled=True),
    Call("project", 39, 64, 32, scaled=True, extremes=True),
    Call("project", 7, 64, 32),
    Call("project", 69, 64, 32, head_dim=32, length=23, rotated=True),
    Call("project", 33, 128, 16, head_dim=64, length=1, rotated=True),
    Call("project", 20, 256, 16, head_dim=128, length=20, rotated=True),
    Call("project", 34, 64, 32, head_dim=64, length=17, rotated=True, scaled=True),
    Call("project", 33, 32, 16, head_dim=32, length=11, rotated=True, scaled=True, extremes=True),
    Call("norm_backward_matmul", 1, 32, 48),
    Call("norm_backward_matmul", 40, 64, 48, residual=True),
    Call("norm_backward_matmul", 37, 32, 96),
    Call("norm_backward_matmul", 69, 32, 16, residual=True, extremes=True),
    Call("row_rstd", 1, 64),
    Call("row_rstd", 70, 80),
    Call("row_rstd", 9, 1000, extremes=True),
    Call("scale_and_dot", 1, 96),
    Call("scale_and_dot", 69, 96),
    Call("scale_and_dot", 9, 768, extremes=True),
    Call("norm_backward", 1, 64),
    Call("norm_backward", 69, 80, residual=True),
    Call("norm_backward", 9, 1000, extremes=True),
    Call("norm_backward", 9, 512, residual=True, extremes=True),
    Call("unrotate", 1, 64, head_dim=64),
    Call("unrotate", 69, 64, head_dim=32, length=23),
    Call("unrotate", 34, 256, head_dim=128, length=17, scaled=True),
    Call("unrotate", 33, 64, head_dim=64, length=11, scaled=True, extremes=True),
]  # fmt: skip


def config_of(call: Call) -> list[configs.Config]:
    """The argument that the matrix products have besides those of their definition."""
    if call.kernel not in configs.KERNELS:
        return []
    turned = call.head_dim if call.rotated else 0
    config, why = dispatch.usable(call.kernel, CPU, torch.float32, call.n, call.k, turned)
    assert isinstance(config, configs.Config), why
    return [config]


@DTYPES
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_kernel(call, dtype, launches, guards):
    arguments = call.arguments(dtype)
    inside = [guards.input(t) if isinstance(t, Tensor) else t for t in arguments]
    result = getattr(launch, call.kernel)(*inside, *config_of(call))
    assert launches == {call.kernel: 1}
    call.assert_accurate(arguments, result)


def test_every_kernel_and_launch_is_tested():
    tested = {call.kernel for call in CALLS}
    for module in (matmul, rows):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            assert name.removesuffix("_kernel") in tested
    functions = {n for n, f in inspect.getmembers(launch, inspect.isfunction) if n[0] != "_"}
    assert functions == tested
    for name in tested:  # named and ordered as in the definition
        defined = list(inspect.signature(getattr(reference, name)).parameters)
        launched = list(inspect.signature(getattr(launch, name)).parameters)
        assert launched[: len(defined)] == defined


# Every configuration of the table, on a ragged second tile: (kernel, head_dim), configuration.
TABLE = sorted(
    {
        (kernel, head_dim, config)
        for size in configs.SIZES.values()
        for architecture in configs.ARCHITECTURES
        for exact in (False, True)
        for kernel, n, k, head_dim in [
            ("project", 3 * size.r, size.d, 0),
            ("project", size.d, size.r, size.head_dim),
            ("project", size.head_dim, size.r, size.head_dim),
            ("norm_backward_matmul", size.d, 3 * size.r, 0),
        ]
        if (config := configs.find(kernel, architecture, n, k, head_dim, exact)[0])
    },
    key=str,
)


@pytest.mark.parametrize(("kernel", "head_dim", "config"), TABLE, ids=str)
def test_configuration_of_the_table(kernel, head_dim, config, launches, guards):
    """Tiles as on a GPU: more than one head in each, more than one step of the main loop."""
    m, k = config.block_m + 6, 2 * config.block_k
    call = Call(kernel, m, config.block_n, k, head_dim, m // 2, scaled=True, rotated=head_dim > 0)
    arguments = call.arguments(torch.float16)
    inside = [guards.input(t) if isinstance(t, Tensor) else t for t in arguments]
    result = getattr(launch, kernel)(*inside, config)
    assert launches == {kernel: 1}
    call.assert_accurate(arguments, result)


@DTYPES
def test_project_of_columns_of_a_wider_matrix(dtype, launches, guards):
    """The latents of q, k or v among those of all three."""
    call = Call("project", 39, 64, 32, head_dim=32, length=13, rotated=True)
    x, *rest = call.arguments(dtype)
    inside = guards.input(x, columns=16)
    assert inside.stride(0) == 64
    call.assert_accurate([x, *rest], launch.project(inside, *rest, *config_of(call)))
    assert dispatch.project(inside, *rest).equal(launch.project(x, *rest, *config_of(call)))
    assert launches == {"project": 3}


@DTYPES
@pytest.mark.parametrize("scaled", [False, True])
def test_unrotate_from_and_into_columns_of_wider_matrices(scaled, dtype, guards):
    call = Call("unrotate", 39, 64, head_dim=32, length=13, scaled=scaled)
    x, *rest = call.arguments(dtype)
    out = guards.output(39, 64, dtype=dtype, device=CPU, columns=16)
    result = launch.unrotate(guards.input(x, columns=8), *rest, out=out)
    assert result.data_ptr() == out.data_ptr()
    call.assert_accurate([x, *rest], out)


def inside_guards(guards: Guards, t: Tensor) -> Tensor:
    return guards.input(t.flatten(0, -2) if t.dim() > 1 else t).view(t.shape)


# M: no multiple of a block; less than one; 1.
SHAPES = {
    "D32": Shape(3, 13, 64, (32, 32, 32), heads=3, kv_heads=1, head_dim=32, start=5),
    "D64": Shape(2, 17, 64, (32, 32, 32), heads=2, kv_heads=1, head_dim=64),
    "D128": Shape(1, 7, 128, (32, 64, 32), heads=2, kv_heads=1, head_dim=128, start=100),
    "M1": Shape(1, 1, 32, (32, 32, 32), heads=1, kv_heads=1, head_dim=32, start=9),
}


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ["norm_down", "up_rotary", "norm_qkv", "low_dim_linear"])
def test_operator(name, shape, dtype, launches, guards):
    """Outputs and every gradient, through the Triton kernels."""
    one = case(name, shape, dtype)
    incoming = one.incoming()
    inputs = [inside_guards(guards, t) for t in one.inputs.values()]
    results = run(one.ours, inputs, [inside_guards(guards, t) for t in incoming])
    assert launches == LAUNCHES[name]
    assert_case(one, incoming, results)


@pytest.mark.parametrize("name", ["layer", "dense_layer"])
def test_layer(name, launches):
    one = case(name, SHAPES["D32"], torch.float32)
    incoming = one.incoming()
    results = run(one.ours, list(one.inputs.values()), incoming)
    assert launches == LAUNCHES[name]
    assert_case(one, incoming, results)


@DTYPES
@pytest.mark.parametrize("name", ["norm_down", "norm_qkv"])
def test_rows_of_zeros_and_of_large_numbers(name, dtype, launches):
    """Each kind of row by itself: the errors of the large ones would hide those of the others."""
    one = case(name, SHAPES["D32"], dtype)
    x = one.inputs["x"]
    x[:, 1::3] *= 1e3
    x[:, 2::3] = 0
    inputs, incoming = list(one.inputs.values()), one.incoming()
    results = run(one.ours, inputs, incoming)
    assert launches == LAUNCHES[name]
    plain = run(one.plain, inputs, incoming)
    exact = run(one.plain, [t.double() for t in inputs], [t.double() for t in incoming])
    for values in zip(results, plain, exact, strict=True):
        for kind in range(3) if values[0].dim() > 2 else [slice(None)]:
            part = [v[:, kind::3] if v.dim() > 2 else v for v in values]
            assert_accurate(f"rows {kind}", *part)


@DTYPES
def test_gradients_of_attention_kernels(dtype, launches):
    """(B, H, T, D) turned, for q, k and v."""
    for name in ("up_rotary", "norm_qkv"):
        one = case(name, SHAPES["D32"], dtype)
        incoming = one.incoming()
        turned = [
            t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 4 else t for t in incoming
        ]
        assert_case(one, incoming, run(one.ours, list(one.inputs.values()), turned))
    assert launches["unrotate"] == 4


def test_a_table_with_strides(launches):
    """cos and sin as columns of one tensor: the kernels read them as packed."""
    h, *factors = (torch.randn(*shape) for shape in ((2, 9, 96), (64, 32), (32, 32), (32, 32)))
    cos, sin = (torch.randn(9, 16) for _ in range(2))
    both = torch.stack((cos, sin), dim=1)
    packed = run_up_rotary(h, factors, cos, sin)
    strided = run_up_rotary(h, factors, both[:, 0], both[:, 1])
    assert launches == {"project": 4, "unrotate": 4}
    for one, other in zip(packed, strided, strict=True):
        assert one.equal(other)


def run_up_rotary(h, factors, cos, sin):
    """Outputs and the gradient of h."""
    h = h.clone().requires_grad_()
    outputs = ops.up_rotary(h, factors, cos, sin, 32)
    return [*outputs, *torch.autograd.grad(sum((t * t).sum() for t in outputs), h)]


def test_bfloat16_takes_the_reference(launches):
    """Triton's interpreter computes wrong numbers in it without a word."""
    for kernel in (*configs.KERNELS, "row_rstd", "scale_and_dot", "norm_backward", "unrotate"):
        answer = dispatch.usable(kernel, CPU, torch.bfloat16, 64, 64, 64)
        assert answer == (False, "no kernel for torch.bfloat16")
        assert dispatch.usable(kernel, CPU, torch.float16, 64, 64, 64)[0]
    for name in ("norm_down", "up_rotary", "norm_qkv"):
        one = case(name, SHAPES["D32"], torch.bfloat16)
        incoming = one.incoming()
        assert_case(one, incoming, run(one.ours, list(one.inputs.values()), incoming))
    assert not launches


def test_float64_and_shapes_without_a_configuration_take_the_reference(launches):
    one = case("norm_down", SHAPES["D32"])
    run(one.ours, list(one.inputs.values()), one.incoming())
    odd = case("norm_qkv", Shape(d=60, head_dim=12), torch.float32)
    incoming = odd.incoming()
    results = run(odd.ours, list(odd.inputs.values()), incoming)
    assert_case(odd, incoming, results)
    assert set(launches) <= {"row_rstd", "norm_backward"}  # these have no configuration
