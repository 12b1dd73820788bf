"""The comparison that comes before any timing: a provider that is wrong is not timed."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.bench.inputs import InputSet, Run
from kernels.bench.operations import Operation

Path = dict[str, Any]


class WrongError(Exception):
    """A provider whose results are not those of the definition."""


def row_error(result: Tensor, exact: Tensor) -> float:
    """The largest error of a row (its Euclidean norm) over the root mean square of the rows' norms:
    one wrong row among 65536 shows. Inf where anything is not finite.
    """
    columns = exact.size(-1)
    difference = result.to(exact.dtype) - exact
    errors = torch.linalg.vector_norm(difference.reshape(-1, columns), dim=1)
    norms = torch.linalg.vector_norm(exact.reshape(-1, columns), dim=1)
    worst = float(errors.max() / norms.square().mean().sqrt())
    return worst if math.isfinite(worst) else math.inf


class Gate:
    """Results of eager in float32 (on a CPU, and for float32 inputs, in float64), and how far from
    them eager is in the dtype of the case.

    A provider passes if the error of every output and gradient is at most twice eager's plus one
    rounding: the same roundings in another order (the rule of FlashAttention's tests).
    """

    def __init__(self, operation: Operation, given: InputSet) -> None:
        dtype, device = given.any.dtype, given.any.device
        wide = device.type == "cpu" or dtype == torch.float32
        exact = given.to(torch.float64 if wide else torch.float32)
        self.exact = Run(operation.eager, "eager", operation, exact).results()
        eager = Run(operation.eager, "eager", operation, given).results()
        self.limits = {}
        for name, value in self.exact.items():
            error = row_error(eager[name], value)
            if not math.isfinite(error):
                raise WrongError(f"{name} of eager itself is not finite in {dtype}")
            self.limits[name] = 2 * error + torch.finfo(dtype).eps

    def check(self, run: Run) -> dict[str, Any]:
        """The result nearest to its limit, its error and its limit; WrongError where it is over."""
        results = run.results()
        errors = {name: row_error(results[name], value) for name, value in self.exact.items()}
        name = max(errors, key=lambda n: errors[n] / self.limits[n])
        error, limit = errors[name], self.limits[name]
        if not error <= limit:
            raise WrongError(f"{name} is off by {error:.1e} of its size, allowed are {limit:.1e}")
        return {"tensor": name, "error": error, "limit": limit}


@contextmanager
def recorded_paths() -> Iterator[list[Path]]:
    """What kernels.dispatch.usable answers to the operators that run inside, each answer once."""
    paths: list[Path] = []
    usable = dispatch.usable

    def recording(
        kernel: str, device: torch.device, dtype: torch.dtype, n: int, k: int = 0, head_dim: int = 0
    ) -> Any:
        found, reason = usable(kernel, device, dtype, n, k, head_dim)
        answer = {
            "kernel": kernel,
            "n": n,
            "k": k,
            "head_dim": head_dim,
            "path": "triton" if found else "reference",
            "reason": reason,
        }
        if answer not in paths:
            paths.append(answer)
        return found, reason

    dispatch.usable = recording
    try:
        yield paths
    finally:
        dispatch.usable = usable
