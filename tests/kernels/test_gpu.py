"""Every kernel and operator at every size that has kernels, on a GPU: `pytest -m gpu`.

Numbers against float64, by the rule of oracle.py; rows that no tile divides, and 65536 of them;
that each Triton kernel ran; that nothing is read or written outside of the tensors; that the same
inputs give the same bits.
"""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.triton import configs
from tests.kernels.oracle import (
    LAUNCHES,
    Call,
    Case,
    Guards,
    Shape,
    assert_accurate,
    assert_case,
    case,
    count_launches,
    guard_outputs,
    run,
    wide,
)

DEVICE = "cuda"
RAGGED = (8, 125)  # B, T: 1000 rows are no multiple of a tile
MANY = (64, 1024)
REPEATS = 50
TRAINING = torch.bfloat16  # of the tests with one dtype
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPERATORS = ("norm_down", "up_rotary", "norm_qkv", "low_dim_linear")


def missing() -> str:
    """Why the kernels cannot run here, "" where they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    architecture = dispatch.architecture(torch.device(DEVICE))
    known = architecture in configs.ARCHITECTURES
    return "" if known else f"no configuration for this device, sm_{architecture}"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return count_launches(monkeypatch)


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guards]:
    guards = guard_outputs(monkeypatch)
    yield guards
    guards.check()


def shape_of(size: configs.Size, batch: int, length: int) -> Shape:
    """A layer of that size with one head of keys and values for every four of queries."""
    heads = size.d // size.head_dim
    return Shape(batch, length, size.d, (size.r,) * 3, heads, heads // 4, size.head_dim)


def calls_of(size: configs.Size, batch: int, length: int, extremes: bool = False) -> list[Call]:
    """Every kernel with every flag, as the operators call them at that size."""
    shape = shape_of(size, batch, length)
    m, d, r, head_dim = batch * length, size.d, size.r, size.head_dim
    calls = []

    def add(kernel: str, n: int, k: int = 0, **flags: bool) -> None:
        turned = head_dim if flags.get("rotated") or kernel == "unrotate" else 0
        calls.append(Call(kernel, m, n, k, turned, length, extremes=extremes, **flags))

    add("project", 3 * r, d, scaled=True)  # norm_down
    for n in dict.fromkeys(shape.widths):  # queries; keys and values
        add("project", n, r, rotated=True)  # up_rotary
        add("project", n, d, scaled=True, rotated=True)  # norm_qkv, q and k
        add("project", n, d, scaled=True)  # and v
    for residual in (False, True):
        add("norm_backward_matmul", d, 3 * r, residual=residual)
        add("norm_backward", d, residual=residual)
    for scaled in (False, True):
        add("unrotate", d, scaled=scaled)
    add("row_rstd", d)
    add("scale_and_dot", 3 * r)
    return calls


def assert_usable(call: Call, dtype: torch.dtype) -> None:
    n = call.head_dim if call.kernel == "unrotate" else call.n
    device = torch.device(DEVICE)
    answer, reason = dispatch.usable(call.kernel, device, dtype, n, call.k, call.head_dim)
    assert answer, f"{call}: {reason}"


SIZES = pytest.mark.parametrize("size", configs.SIZES.values(), ids=configs.SIZES)
NAMES = pytest.mark.parametrize("name", OPERATORS)


# --- single kernels -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("extremes", [False, True], ids=["ordinary", "extremes"])
@SIZES
def test_kernels(size, extremes, dtype, launches, guards):
    """Ragged rows between rows of NaN, results in buffers of NaN."""
    calls = calls_of(size, *RAGGED, extremes)
    for call in calls:
        assert_usable(call, dtype)
        arguments = call.arguments(dtype, DEVICE)
        inside = [guards.input(t) if isinstance(t, Tensor) else t for t in arguments]
        result = getattr(dispatch, call.kernel)(*inside)
        call.assert_accurate(arguments, result)
    assert launches == Counter(call.kernel for call in calls)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@SIZES
def test_columns_of_wider_matrices(size, dtype, launches, guards):
    """The latents of q among those of q, k and v; a gradient written among three."""
    shape = shape_of(size, *RAGGED)
    m, length = RAGGED[0] * RAGGED[1], RAGGED[1]
    call = Call("project", m, size.d, size.r, size.head_dim, length, rotated=True)
    x, *rest = call.arguments(dtype, DEVICE)
    call.assert_accurate([x, *rest], dispatch.project(guards.input(x, size.r), *rest))
    call = Call("unrotate", m, shape.widths[1], 0, size.head_dim, length, scaled=True)
    x, *rest = call.arguments(dtype, DEVICE)
    out = guards.output(m, call.n, dtype=dtype, device=torch.device(DEVICE), columns=size.head_dim)
    dispatch.unrotate(guards.input(x), *rest, out=out)
    call.assert_accurate([x, *rest], out)
    assert launches == {"project": 1, "unrotate": 1}


@SIZES
def test_kernels_on_many_rows(size, launches, guards):
    """Right, and the same bits every time: a race shows only now and then."""
    calls = calls_of(size, *MANY)
    for call in calls:
        assert_usable(call, TRAINING)
        arguments = call.arguments(TRAINING, DEVICE)
        function = getattr(dispatch, call.kernel)
        first = function(*arguments)
        call.assert_accurate(arguments, first)
        several = isinstance(first, tuple)
        for _ in range(REPEATS):
            guards.check()
            guards.outputs.clear()  # the next ones take their memory
            again = function(*arguments)
            pairs = zip(first, again, strict=True) if several else [(first, again)]
            assert all(a.equal(b) for a, b in pairs), call
    assert launches == Counter([call.kernel for call in calls] * (REPEATS + 1))


# --- operators ----------------------------------------------------------------------------------


def results_of(one: Case, incoming: list[Tensor]) -> list[Tensor]:
    return run(one.ours, list(one.inputs.values()), incoming)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@SIZES
@NAMES
def test_operators(name, size, dtype, launches, guards):
    """Outputs and every gradient."""
    one = case(name, shape_of(size, *RAGGED), dtype, DEVICE)
    incoming = one.incoming()
    results = results_of(one, incoming)
    assert launches == LAUNCHES[name]
    assert_case(one, incoming, results)


@SIZES
@NAMES
def test_operators_on_many_rows(name, size, launches, guards):
    one = case(name, shape_of(size, *MANY), TRAINING, DEVICE)
    incoming = one.incoming()
    results = results_of(one, incoming)
    assert launches == LAUNCHES[name]
    assert_case(one, incoming, results, sequences=8)


@SIZES
@pytest.mark.parametrize("name", ["up_rotary", "norm_qkv"])
def test_gradients_of_attention_kernels(name, size, launches, guards):
    """cuDNN and flash attention return (B, H, T, D) turned for q, k and v."""
    one = case(name, shape_of(size, *RAGGED), TRAINING, DEVICE)
    incoming = one.incoming()
    turned = [
        t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 4 else t for t in incoming
    ]
    assert not any(t.is_contiguous() for t in turned[:3])
    results = results_of(one, turned)
    assert launches == LAUNCHES[name]
    assert_case(one, incoming, results)


@SIZES
@pytest.mark.parametrize("name", ["layer", "dense_layer"])
def test_layers(name, size, launches):
    one = case(name, shape_of(size, *RAGGED), TRAINING, DEVICE)
    incoming = one.incoming()
    results = results_of(one, incoming)
    assert launches == LAUNCHES[name]
    assert_case(one, incoming, results)


@pytest.mark.parametrize("name", ["layer", "dense_layer"])
def test_compiled_layers(name, launches):
    """At most twice the error of the same layer without torch.compile."""
    torch.compiler.reset()
    one = case(name, shape_of(configs.SIZES["130m"], *RAGGED), TRAINING, DEVICE)
    inputs, incoming = list(one.inputs.values()), one.incoming()
    eager = results_of(one, incoming)
    exact = run(one.plain, wide(inputs), wide(incoming))
    launches.clear()
    compiled = run(torch.compile(one.ours, fullgraph=True), inputs, incoming)
    # rstd is plain torch there, for Inductor to fuse.
    assert launches == {k: n for k, n in LAUNCHES[name].items() if k != "row_rstd"}
    names = [*one.outputs, *(f"gradient of {key}" for key in one.inputs)]
    for label, *values in zip(names, compiled, eager, exact, strict=True):
        assert_accurate(label, *values, chained=one.chained)
