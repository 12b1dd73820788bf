"""Random inputs, and a provider's function bound to them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.bench.operations import NO_GRADIENT, Form, Operation, Problem, Tensors

SETS = 3  # input sets at least
SETS_BYTES = 100e6  # and on CUDA, as many as have this together
CAPTURE_WARM_UP = 3

Named = dict[str, Tensor]


@dataclass(frozen=True)
class InputSet:
    """Arguments of an operation and gradients of its results, under the names of the eager form."""

    inputs: Named
    d_outputs: Named

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.inputs.values(), *self.d_outputs.values()))

    @property
    def any(self) -> Tensor:
        """One of the floating tensors, for its dtype and device."""
        return next(iter(self.d_outputs.values()))

    def to(self, dtype: torch.dtype) -> "InputSet":
        """In another dtype, but for the rotary tables."""
        inputs = {n: t if n in NO_GRADIENT else t.to(dtype) for n, t in self.inputs.items()}
        return InputSet(inputs, {n: t.to(dtype) for n, t in self.d_outputs.items()})


def random_set(
    operation: Operation, problem: Problem, dtype: torch.dtype, generator: torch.Generator
) -> InputSet:
    """Standard normal, on the generator's device; matrices (n, k) divided by sqrt(k), the norm's
    weight 1 ± 0.1. Never zeros: the power a GPU draws, and with it the clock, depends on the data.
    """
    device = generator.device
    positions = torch.arange(problem.seq_len, device=device)
    cos, sin = reference.rotary_table(positions, problem.head_dim, 1e4)
    tables = {"cos": cos, "sin": sin}

    def draw(name: str) -> Tensor:
        shape = problem.shape(name)
        values = torch.randn(shape, device=device, dtype=torch.float32, generator=generator)
        if name == "norm":
            values = 1 + 0.1 * values
        elif len(shape) == 2:
            values /= math.sqrt(shape[1])
        return values.to(dtype)

    inputs = {n: tables[n] if n in tables else draw(n) for n in operation.inputs}
    return InputSet(inputs, {n: draw(n) for n in operation.outputs})


def set_count(device: torch.device, nbytes: int) -> int:
    """Input sets of nbytes each that together exceed twice the L2 cache, and 100 MB, on CUDA."""
    if device.type != "cuda":
        return SETS
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(SETS, math.ceil(max(SETS_BYTES, 2 * cache) / nbytes))


class Run:
    """A function of one form, on one input set. Every input but the rotary tables is a leaf."""

    def __init__(self, function: Form, form: str, operation: Operation, given: InputSet) -> None:
        self.function = function
        self.operation = operation
        joined = operation.join(given.inputs, form)
        self.leaves = {n: t.detach().requires_grad_() for n, t in joined.items() if _trained(n)}
        self.arguments = tuple({**joined, **self.leaves}.values())
        self.d_outputs = operation.join(given.d_outputs, form)
        self._leaves = list(self.leaves.values())
        self._d_outputs: Sequence[Tensor] = list(self.d_outputs.values())

    def forward(self) -> Tensors:
        return self.function(*self.arguments)

    def backward(self, outputs: Tensors) -> Tensors:
        return torch.autograd.grad(outputs, self._leaves, self._d_outputs)

    def results(self) -> Named:
        """Outputs, and gradients of the inputs as d_NAME, under the names of the eager form."""
        outputs = self.forward()
        gradients = self.backward(outputs)
        split = self.operation.split
        y = split({n: t.detach() for n, t in zip(self.d_outputs, outputs, strict=True)})
        dx = split(dict(zip(self.leaves, gradients, strict=True)))
        return {**y, **{f"d_{n}": t for n, t in dx.items()}}


def _trained(name: str) -> bool:
    return name not in NO_GRADIENT


class GraphedRun:
    """A run captured in two CUDA graphs, forward and backward, and replayed.

    All runs of a case share the memory pool: what a pair of graphs makes is dead once it has run,
    and no two pairs run at once.
    """

    def __init__(self, run: Run, pool: Any) -> None:
        self.run = run  # holds the graphs' inputs
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(CAPTURE_WARM_UP):
                run.backward(run.forward())
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[0], pool=pool):
            outputs = run.forward()
        with torch.cuda.graph(self.graphs[1], pool=pool):
            gradients = run.backward(outputs)
        del outputs, gradients

    def forward(self) -> Tensors:
        self.graphs[0].replay()
        return ()

    def backward(self, outputs: Tensors) -> Tensors:
        self.graphs[1].replay()
        return outputs
