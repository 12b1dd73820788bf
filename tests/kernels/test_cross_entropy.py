"""The loss of the head: numbers against F.cross_entropy of F.linear in float64, and memory."""

import functools
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy
from tests.conftest import ROOT

F64 = torch.float64
N, D, V = 50, 16, 97
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def problem(n: int = N, d: int = D, v: int = V, dtype: torch.dtype = F64) -> list[Tensor]:
    """x, weight, bias and targets, every seventh of them ignored."""
    x, weight, bias = (randn(*shape, seed=i) for i, shape in enumerate(((n, d), (v, d), (v,))))
    targets = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(3))
    targets[::7] = -100
    return [x.to(dtype), weight.to(dtype), bias.to(dtype), targets]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    reduction: str,
    incoming: Tensor,
) -> list[Tensor]:
    """Loss and gradients of x, weight and bias, by torch, in float64."""
    inputs = [t.detach().to(F64).requires_grad_() for t in (x, weight, bias) if t is not None]
    loss = F.cross_entropy(F.linear(*inputs), targets, reduction=reduction)
    return [loss, *torch.autograd.grad(loss, inputs, incoming.to(F64))]


def ours(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    reduction: str,
    incoming: Tensor,
    **options: Any,
) -> list[Tensor]:
    inputs = leaves([t for t in (x, weight, bias) if t is not None])
    loss = linear_cross_entropy(
        inputs[0], inputs[1], targets, *inputs[2:], reduction=reduction, **options
    )
    gradients = torch.autograd.grad(loss, inputs, incoming.to(loss.dtype))
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]
    return [loss, *gradients]


def incoming_gradient(reduction: str, n: int = N) -> Tensor:
    """Not 1, and of both signs, so that a gradient that is not multiplied by it shows."""
    return torch.tensor(-0.37) if reduction == "mean" else randn(n, seed=4).float()


def assert_near(results: list[Tensor], expected: list[Tensor], relative: float) -> None:
    """The largest error, relative to the largest entry."""
    for result, exact in zip(results, expected, strict=True):
        error = (result.to(F64) - exact).abs().max() / exact.abs().max()
        assert error <= relative, f"error {error:.2g} of the largest entry"


class Watch(TorchDispatchMode):
    """What ran: operators, entries of the largest tensor, bytes of the tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.largest = self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.append(func.overloadpacket.__name__)
        inputs = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs:  # views of what was there before are not new
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: (ref, n) for k, (ref, n) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return result

    def products(self) -> int:
        return sum(name in ("mm", "addmm", "addmm_") for name in self.operators)


def test_the_definition_by_hand():
    """log Σ exp(logits) - logit of the target."""
    x, weight, bias, _ = problem(4, 3, 5)
    targets = torch.tensor([4, -100, 0, 2])
    expected = []
    for row, target in zip(x.tolist(), targets.tolist(), strict=True):
        logits = [
            math.fsum(w * v for w, v in zip(line, row, strict=True)) + b
            for line, b in zip(weight.tolist(), bias.tolist(), strict=True)
        ]
        total = math.log(math.fsum(map(math.exp, logits)))
        expected.append(0.0 if target == -100 else total - logits[target])
    exact = torch.tensor(expected, dtype=F64)
    for method in ("whole", "chunked"):
        call = functools.partial(linear_cross_entropy, x, weight, targets, bias, method=method)
        assert_close(call(reduction="none"), exact, rtol=1e-14, atol=1e-14)
        assert_close(call(reduction="mean"), exact.sum() / 3, rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 25, N, 1000, None])
def test_float32(reduction, with_bias, chunk_tokens):
    """Sums of 97 terms at most: a few roundings of 6e-8 each."""
    x, weight, bias, targets = problem(dtype=torch.float32)
    case = (
        x,
        weight,
        bias if with_bias else None,
        targets,
        reduction,
        incoming_gradient(reduction),
    )
    results = ours(*case, chunk_tokens=chunk_tokens)
    assert results[0].dtype == torch.float32
    assert_near(results, oracle(*case), 1e-6)
    # The same without a gradient.
    loss = linear_cross_entropy(x, weight, targets, case[2], reduction, chunk_tokens=chunk_tokens)
    assert not loss.requires_grad
    assert_near([loss], oracle(*case)[:1], 1e-6)


def half_precision_errors(device: str, dtype: torch.dtype, reduction: str, **options: Any) -> None:
    """Errors at most twice those of "whole" in the same dtype: it rounds logits, their gradient and
    each product once, "chunked" each chunk's product and the scaled gradient in addition.
    """
    n = 300
    case = [t.to(device) for t in problem(n, 32, 500, dtype)]
    incoming = incoming_gradient(reduction, n).to(device)
    exact = oracle(*case, reduction, incoming)
    whole = ours(*case, reduction, incoming, method="whole")
    results = ours(*case, reduction, incoming, **options)
    assert results[0].dtype == torch.float32
    for result, reference, value in zip(results, whole, exact, strict=True):
        limit = 2 * (reference - value).norm() + 1e-6 * value.norm()
        assert (result - value).norm() <= limit


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("chunk_tokens", [32, 300])
def test_half_precision(device, reduction, dtype, chunk_tokens):
    half_precision_errors(device, dtype, reduction, chunk_tokens=chunk_tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_liger_on_a_gpu(reduction, dtype):
    pytest.importorskip("liger_kernel")
    half_precision_errors("cuda", dtype, reduction, method="liger")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    x, weight, bias, targets = problem(5, 3, 4)
    for inputs in ([x, weight], [x, weight, bias]):
        assert torch.autograd.gradcheck(
            lambda x, weight, bias=None: linear_cross_entropy(
                x, weight, targets, bias, reduction, chunk_tokens=2
            ),
            leaves(inputs),
        )


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_large_logits(scale):
    """exp(logit) alone would overflow; a loss of 0 to 1e5 keeps its relative precision."""
    x, weight, bias, targets = problem(dtype=torch.float32)
    case = (x * scale, weight, bias, targets, "none", incoming_gradient("none"))
    results, exact = ours(*case), oracle(*case)
    assert exact[0].max() > 100
    assert_near(results[:1], exact[:1], 1e-6)
    # softmax is as wrong, relatively, as the logits are absolutely: up to 1e-6 of the largest.
    assert (results[1] - exact[1]).norm() <= 2e-6 * scale * 10 * exact[1].norm()


@pytest.mark.parametrize("method", ["whole", "chunked"])
def test_ignored_targets_are_as_if_absent(method):
    x, weight, bias, targets = problem()
    kept = targets != -100
    incoming = incoming_gradient("mean")
    result = ours(x, weight, bias, targets, "mean", incoming, method=method, chunk_tokens=8)
    expected = oracle(x[kept], weight, bias, targets[kept], "mean", incoming)
    assert result[1][~kept].eq(0).all()
    result[1] = result[1][kept]
    for a, b in zip(result, expected, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-14)
    each = ours(x, weight, bias, targets, "none", incoming_gradient("none"), method=method)
    assert each[0][~kept].eq(0).all()
    assert each[0][kept].gt(0).all()
    assert each[1][~kept].eq(0).all()


@pytest.mark.parametrize("method", ["whole", "chunked"])
@pytest.mark.parametrize("n", [0, 9])
def test_nothing_to_predict(method, n):
    """As torch does: the mean is nan, its gradients are zero."""
    x, weight, bias, targets = problem(n)
    targets[:] = -100
    options = {"method": method, "chunk_tokens": 4}
    loss, *gradients = ours(x, weight, bias, targets, "mean", incoming_gradient("mean"), **options)
    assert loss.isnan()
    assert [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]
    assert all(g.eq(0).all() for g in gradients)
    loss, *gradients = ours(x, weight, bias, targets, "none", torch.ones(n), **options)
    assert loss.equal(torch.zeros(n, dtype=F64))
    assert all(g.eq(0).all() for g in gradients)


@pytest.mark.parametrize("target", [V, -1, -99, -101])
def test_targets_outside_of_the_vocabulary_are_refused(target):
    x, weight, bias, targets = problem()
    targets[3] = target
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(x, weight, targets, bias)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", range(8))
def test_only_the_gradients_that_are_asked_for(reduction, wanted):
    """One matrix product a chunk for the logits, one for each gradient of x and weight; "none"
    makes the logits twice.
    """
    *inputs, targets = problem()
    exact = oracle(*inputs, targets, reduction, incoming := incoming_gradient(reduction))
    x, weight, bias = leaves(inputs)
    for i, tensor in enumerate((x, weight, bias)):
        tensor.requires_grad_(bool(wanted >> i & 1))
    with Watch() as watch:
        loss = linear_cross_entropy(x, weight, targets, bias, reduction, chunk_tokens=25)
        if wanted:
            loss.backward(incoming.to(F64))
    again = reduction == "none" and wanted > 0
    assert watch.products() == 2 * (1 + again + x.requires_grad + weight.requires_grad)
    for tensor, gradient in zip((x, weight, bias), exact[1:], strict=True):
        if tensor.requires_grad:
            assert_close(tensor.grad, gradient, rtol=1e-12, atol=1e-14)
        else:
            assert tensor.grad is None
    with torch.no_grad(), Watch() as watch:
        linear_cross_entropy(x, weight, targets, bias, reduction, chunk_tokens=25)
    assert watch.products() == 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tied_weights(reduction):
    """The embedding's gradient and the head's add up."""
    _, weight, _, targets = problem()
    tokens = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(5))
    gradients = []
    for method in ("whole", "chunked"):
        (leaf,) = leaves([weight])
        x = F.embedding(tokens, leaf).tanh()
        loss = linear_cross_entropy(
            x, leaf, targets, reduction=reduction, method=method, chunk_tokens=8
        )
        loss.sum().backward()
        gradients.append(leaf.grad)
    assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-14)


def test_strided_inputs():
    x, weight, bias, targets = problem()
    expected = oracle(x, weight, bias, targets, "mean", torch.tensor(1.0))
    inputs = leaves([x.T.contiguous(), weight.T.contiguous(), bias])
    spread = torch.stack((targets, targets), dim=1)[:, 0]
    strided = (inputs[0].T, inputs[1].T, spread, inputs[2])
    assert not any(t.is_contiguous() for t in strided[:3])
    loss = linear_cross_entropy(*strided, chunk_tokens=8)
    d_x, d_weight, d_bias = torch.autograd.grad(loss, inputs)
    for a, b in zip((loss, d_x.T, d_weight.T, d_bias), expected, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_pass(reduction):
    x, weight, bias, targets = problem()
    inputs = leaves([x, weight, bias])
    loss = linear_cross_entropy(inputs[0], inputs[1], targets, inputs[2], reduction).sum()
    first = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    second = torch.autograd.grad(3 * loss, inputs)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_chunks_are_added_up_in_float32():
    """Each of 400 chunks adds 1, and bfloat16 does not count past 256."""
    x, weight = torch.ones(1600, 1, dtype=torch.bfloat16), torch.zeros(4, 1, dtype=torch.bfloat16)
    targets = torch.zeros(1600, dtype=torch.int64)
    _, _, d_weight = ours(x, weight, None, targets, "mean", torch.tensor(1.0), chunk_tokens=4)
    assert d_weight.flatten().tolist() == [-0.75, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_incoming_gradient_is_not_rounded(dtype):
    """Its product with the saved gradient is in float32 and rounded once."""
    x, weight, bias, targets = problem(dtype=dtype)
    count = (targets != -100).sum().float()
    _, saved_d_x, *_ = ours(x, weight, bias, targets, "mean", count)  # times count / count
    incoming = torch.tensor(1.2345)
    assert (incoming / count).to(dtype).float() != incoming / count
    _, d_x, *_ = ours(x, weight, bias, targets, "mean", incoming)
    assert d_x.equal((saved_d_x.float() * (incoming / count)).to(dtype))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_checkpoint(reduction):
    *inputs, targets = problem()
    incoming = incoming_gradient(reduction).to(F64)

    def loss_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(x.sin(), weight, targets, bias, reduction, chunk_tokens=8)

    results = []
    for call in (loss_of, functools.partial(checkpoint, loss_of, use_reentrant=False)):
        given = leaves(inputs)
        loss = call(*given)
        results.append([loss, *torch.autograd.grad(loss, given, incoming)])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inside_a_compiled_caller(reduction):
    """The graph breaks at the call; the numbers stay. aot_eager: all of torch.compile but the code
    generation, which takes 20 s.
    """
    *inputs, targets = problem()
    incoming = incoming_gradient(reduction).to(F64)

    def loss_of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        loss = linear_cross_entropy(x.sin(), weight, targets, bias, reduction, chunk_tokens=8)
        return loss.exp()

    results = []
    for call in (loss_of, torch.compile(loss_of, backend="aot_eager")):
        given = leaves(inputs)
        loss = call(*given)
        results.append([loss, *torch.autograd.grad(loss, given, incoming)])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-14)


def compiled(monkeypatch: pytest.MonkeyPatch, compile: Callable[..., Any]) -> list[int]:
    """Sees to it that the elementwise part is compiled anew; returns the rows of each call."""
    calls = []

    def counting(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        assert options == {"fullgraph": True, "dynamic": True}
        inner = compile(function, **options)

        def call(logits: Tensor, *rest: Any) -> Tensor:
            calls.append(logits.size(0))
            return inner(logits, *rest)

        return call

    monkeypatch.setattr(torch, "compile", counting)
    fresh = functools.cache(cross_entropy._compiled_rows.__wrapped__)
    monkeypatch.setattr(cross_entropy, "_compiled_rows", fresh)
    return calls


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_elementwise_part(monkeypatch, backend, reduction):
    calls = compiled(monkeypatch, functools.partial(torch.compile, backend=backend))
    case = (*problem(dtype=torch.float32), reduction, incoming_gradient(reduction))
    assert_near(ours(*case, chunk_tokens=20, compile=True), oracle(*case), 1e-6)
    assert calls == [20, 20, 10] * (1 if reduction == "mean" else 2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction):
    """float32 parameters under autocast are bfloat16 ones whose gradients come back in float32."""
    x, weight, bias, targets = problem(dtype=torch.float32)
    incoming = incoming_gradient(reduction)
    half = [t.bfloat16() for t in (x, weight, bias)]
    for method in ("whole", "chunked"):
        expected = ours(*half, targets, reduction, incoming, method=method, chunk_tokens=8)
        inputs = leaves([half[0], weight, bias])  # x comes from a layer: bfloat16 already
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(
                inputs[0], inputs[1], targets, inputs[2], reduction, method, chunk_tokens=8
            )
        gradients = torch.autograd.grad(loss, inputs, incoming)
        assert [g.dtype for g in gradients] == [t.dtype for t in inputs]
        assert loss.dtype == torch.float32
        for a, b in zip((loss, *gradients), expected, strict=True):
            assert a.float().equal(b.float())


def test_autocast_leaves_float64_alone():
    case = (*problem(), "mean", torch.tensor(1.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(ours(*case), oracle(*case), 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_inside_autocast(reduction):
    """The matrix products of the backward pass keep the precision of the forward pass."""
    *inputs, targets = problem(dtype=torch.float32)
    incoming = incoming_gradient(reduction)
    given = leaves(inputs)
    loss = linear_cross_entropy(given[0], given[1], targets, given[2], reduction)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(loss, given, incoming)
    assert_near([loss, *gradients], oracle(*inputs, targets, reduction, incoming), 1e-6)


@pytest.mark.parametrize("tokens", [1, 50])
def test_float16_is_not_left_by_sums_over_a_chunk(tokens):
    """4096 times 50 for one class is 204800, above 65504; its mean over the targets is 50."""
    x = torch.full((4096, 4), 50.0, dtype=torch.float16)
    weight = torch.tensor([[0.001], [-0.001]], dtype=torch.float16).expand(2, 4)
    targets = torch.zeros(4096, dtype=torch.int64)
    targets[:: 4096 // tokens] = 1
    case = (x, weight, None, targets, "mean", torch.tensor(1.0))
    assert_near(ours(*case)[2:], oracle(*case)[2:], 1e-3)


def test_float16_keeps_small_gradients_for_the_gradient_scaler():
    """1 / 400 / 4096 of a class and a token is ten times the smallest float16; times 65536 it is
    well within.
    """
    x, weight, _, targets = problem(4096, 8, 400, torch.float16)
    case = (x / 64, weight / 256, None, targets, "mean", torch.tensor(65536.0))
    exact = oracle(*case)
    assert exact[1].abs().max() / 65536 < 2**-16  # 2**-24 is the smallest float16: 8 bits at most
    assert_near(ours(*case, chunk_tokens=512), exact, 2e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_of_all_the_logits(reduction):
    n, d, v = 96, 4, 128
    x, weight, bias, targets = problem(n, d, v, torch.float32)
    largest = {}
    for method in ("whole", "chunked"):
        with Watch() as watch:
            ours(
                x, weight, bias, targets, reduction, incoming_gradient(reduction, n),
                method=method, chunk_tokens=8,
            )  # fmt: skip
        largest[method] = watch.largest
    assert largest == {"whole": n * v, "chunked": 8 * v}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_memory_of_one_chunk_at_a_time(reduction, dtype):
    """The peak is one chunk's logits (in bfloat16 those beside their float32) and the gradients."""
    n, d, v, tokens = 128, 2, 4096, 32
    *inputs, targets = problem(n, d, v, dtype)
    given = leaves(inputs)
    incoming = incoming_gradient(reduction, n)
    with Watch() as watch:
        loss = linear_cross_entropy(
            given[0], given[1], targets, given[2], reduction, chunk_tokens=tokens
        )
        torch.autograd.grad(loss, given, incoming)
    logits = tokens * v * (4 if dtype == torch.float32 else 6)
    gradients = 4 * (n * d + v * d + v)
    rows = 64 * n  # what has one entry a token
    assert logits <= watch.peak <= logits + 2 * gradients + rows
    assert 2 * gradients + rows < logits / 3  # a second chunk would not pass, in bfloat16 neither


@pytest.mark.parametrize("vocabulary", [8, 96, 100])
def test_automatic_chunks(monkeypatch, vocabulary):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 96)
    x, weight, _, targets = problem(40, 1, vocabulary)
    with Watch() as watch:
        linear_cross_entropy(x, weight, targets)
    assert watch.largest == {8: 96, 96: 96, 100: 100}[vocabulary]  # one token at least


def test_a_chunk_at_32k_is_2048_tokens():
    assert cross_entropy.CHUNK_LOGITS == 2048 * 32768


def saved(reduction: str, frozen: bool) -> list[Tensor]:
    """What autograd keeps for the backward pass, less the inputs."""
    x, weight, bias, targets = problem(dtype=torch.bfloat16)
    x, weight, bias = leaves([x, weight, bias])
    if frozen:
        weight.requires_grad_(False)
        bias.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(x, weight, targets, bias, reduction, chunk_tokens=8)
    inputs = {t.data_ptr() for t in (x, weight, bias, targets)}
    return [t for t in kept if t.data_ptr() not in inputs]


def test_saved_for_backward():
    assert saved("none", frozen=False) == []
    kept = {t.shape: t.dtype for t in saved("mean", frozen=False)}
    assert kept == {
        torch.Size(()): torch.int64,  # the number of targets
        torch.Size((N, D)): torch.bfloat16,
        torch.Size((V, D)): torch.float32,
        torch.Size((V,)): torch.float32,
    }
    assert {t.shape for t in saved("mean", frozen=True)} == {torch.Size(()), torch.Size((N, D))}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_host_never_waits(reduction, dtype):
    """No operator whose result, or its shape, the host must know."""
    x, weight, bias, targets = problem(dtype=dtype)
    with Watch() as watch:
        ours(x, weight, bias, targets, reduction, incoming_gradient(reduction), chunk_tokens=8)
    waits = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "unique", "index"}
    assert not waits & set(watch.operators)
    with Watch() as watch:
        bool(targets[targets > 3].sum() > 0)
    assert {"_local_scalar_dense", "index"} <= set(watch.operators)


BAD = [
    ({"reduction": "sum"}, "reduction: 'sum', allowed are mean, none"),
    ({"method": "fused"}, "method: 'fused', allowed are whole, chunked, liger"),
    ({"chunk_tokens": 0}, "chunk_tokens: 0, allowed are None and 1 or more"),
    ({"x": torch.ones(2, 3, 4)}, "x: shape (2, 3, 4), allowed is (N, d)"),
    ({"x": torch.ones(6, 4).int()}, "x: torch.int32, allowed are floating dtypes"),
    ({"weight": torch.ones(5)}, "weight: shape (5,), allowed is (V, 4)"),
    ({"weight": torch.ones(4, 5)}, "weight: shape (4, 5), allowed is (V, 4)"),
    ({"weight": torch.ones(5, 4).half()},
     "weight: torch.float16, allowed is that of x, torch.float32"),
    ({"weight": torch.ones(5, 4, device="meta")}, "weight: on meta, allowed is where x is, cpu"),
    ({"bias": torch.ones(1)}, "bias: shape (1,), allowed is (5,)"),
    ({"bias": torch.ones(5).double()}, "bias: torch.float64, allowed is that of x, torch.float32"),
    ({"bias": torch.ones(5, device="meta")}, "bias: on meta, allowed is where x is, cpu"),
    ({"targets": torch.ones(6, 1).long()}, "targets: shape (6, 1), allowed is (6,)"),
    ({"targets": torch.ones(5).long()}, "targets: shape (5,), allowed is (6,)"),
    ({"targets": torch.ones(6)}, "targets: torch.float32, allowed is torch.int64"),
    ({"targets": torch.ones(6).int()}, "targets: torch.int32, allowed is torch.int64"),
    ({"targets": torch.ones(6, device="meta").long()},
     "targets: on meta, allowed is where x is, cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_errors(change, message):
    arguments = {"x": torch.ones(6, 4), "weight": torch.ones(5, 4), "targets": torch.ones(6).long()}
    linear_cross_entropy(**arguments)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        linear_cross_entropy(**arguments | change)
    assert str(error.value) == message


def test_liger_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    x, weight, _, targets = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^method: 'liger' needs `pip install liger-kernel=="):
        linear_cross_entropy(x, weight, targets, method="liger")


def test_liger_refuses_the_cpu(monkeypatch):
    """Also where it is installed: stand-ins for its modules."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    functional = types.SimpleNamespace(liger_fused_linear_cross_entropy=None)
    for name in (
        "liger_kernel",
        "liger_kernel.transformers",
        "liger_kernel.transformers.functional",
    ):
        monkeypatch.setitem(sys.modules, name, functional)
    x, weight, _, targets = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^method: 'liger' with x on cpu, allowed is a CUDA dev"):
        linear_cross_entropy(x, weight, targets, method="liger")


LIGER = """
import torch
from kernels.cross_entropy import linear_cross_entropy
from tests.kernels.test_cross_entropy import incoming_gradient, oracle, ours, problem

def largest_error(results, exact):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, exact))

x, weight, bias, targets = problem(23, 8, 37, torch.float32)
copies = [t.clone() for t in (x, weight, bias, targets)]
for reduction in ("mean", "none"):
    incoming = incoming_gradient(reduction, 23)
    for given in (bias, None):
        case = (x, weight, given, targets, reduction, incoming)
        print(largest_error(ours(*case, method="liger"), oracle(*case)))
    # A strided x that wants no gradient, a weight that does.
    leaf = weight.clone().requires_grad_()
    loss = linear_cross_entropy(x.T.contiguous().T, leaf, targets, None, reduction, "liger")
    (gradient,) = torch.autograd.grad(loss, leaf, incoming)
    case = (x, weight, None, targets, reduction, incoming)
    exact = oracle(*case)
    print(largest_error((loss, gradient), (exact[0], exact[2])))
    with torch.no_grad():
        loss = linear_cross_entropy(x, leaf, targets, None, reduction, "liger")
    print(largest_error([loss], exact[:1]))
assert all(a.equal(b) for a, b in zip(copies, (x, weight, bias, targets)))

for n in (23, 0):  # nothing to predict
    loss, *gradients = ours(
        x[:n], weight, bias, targets[:n] * 0 - 100, "mean", torch.tensor(1.0), method="liger"
    )
    assert loss.isnan() and not any(g.any() for g in gradients), (loss, gradients)
try:
    linear_cross_entropy(x.double(), weight.double(), targets, method="liger")
except ValueError as error:
    print(error)
"""


def test_liger_in_tritons_interpreter():
    """In a process of its own: Triton reads the variable when it is imported."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    path = os.pathsep.join((str(ROOT), *sys.path))
    result = subprocess.run(
        [sys.executable, "-c", LIGER],
        capture_output=True, text=True, timeout=120,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    *errors, refusal = result.stdout.splitlines()
    assert len(errors) == 8
    assert all(float(error) < 1e-6 for error in errors), errors
    assert refusal == "method: 'liger' with torch.float64, allowed are 32 and 16 bits"
