"""SoRA's proximal step on gates, its L1 term, and schedules of sparsity (Ding et al. 2023)."""

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from model.delta.methods.sora import SoraLayer

Schedule = Literal["linear", "log_linear", "exp_linear"]


def soft_threshold(g: Tensor, xi: float) -> Tensor:
    """T_ξ(g) = sign(g) · max(|g| - ξ, 0), the proximal operator of ξ·|·|: the minimiser over z of
    (z - g)²/2 + ξ|z| (Ding et al. 2023, equation 8).
    """
    return g.sign() * (g.abs() - xi).clamp(min=0)


def reference_threshold(g: Tensor, xi: float) -> Tensor:
    """What the authors' code does in place of T_ξ: three masks in turn, each on the result of the
    one before, so that what lies within (ξ, 2ξ) becomes 0 too, and ±ξ itself stays.
    """
    g = torch.where(g > xi, g - xi, g)
    g = torch.where(g < -xi, g + xi, g)
    return torch.where((g < xi) & (g > -xi), torch.zeros_like(g), g)


def gates(module: nn.Module) -> Iterator[tuple[str, SoraLayer]]:
    """The SoRA layers of a delta, or of anything that holds some, with their paths."""
    for name, layer in module.named_modules():
        if isinstance(layer, SoraLayer):
            yield name, layer


def gate_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The gates, for a parameter group without weight decay: the step shrinks them."""
    return [layer.gate for _, layer in gates(module)]


@torch.no_grad()
def proximal_step(
    parameters: Iterable[nn.Parameter], threshold: float, reference_compat: bool = False
) -> None:
    """Call it after each step of the optimizer: g ← T_ξ(g) with ξ = `threshold`.

    The paper's ξ is η_t · λ, the gates' learning rate of this step times the sparsity weight.
    reference_compat: what the authors' code does, for which ξ does not depend on the rate. Where
    several processes hold equal gates, each makes the same step. ValueError where ξ is negative.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold: {threshold}; it must be at least 0")
    operator = reference_threshold if reference_compat else soft_threshold
    for gate in parameters:
        gate.copy_(operator(gate, threshold))


def l1_term(module: nn.Module, of: int | None = None) -> Tensor:
    """The mean of |g| over all gates: what the authors' code adds to the loss, times a coefficient,
    beside the thresholding. A scalar.

    of: how many gates there were before some that closed were dropped, so that dropping changes
    nothing; None: those that are there.
    """
    found: list[Tensor] = [*gate_parameters(module)]
    if not found:
        return torch.zeros(())
    every = torch.cat(found)
    return every.abs().sum() / (len(every) if of is None else of)


def schedule(first: float, last: float, stages: int, kind: Schedule = "linear") -> list[float]:
    """Sparsity weights of the stages of the sparsifying schedule (Ding et al. 2023, algorithm 1).

    linear: equal steps. log_linear: the logarithm of equal steps between the exponentials.
    exp_linear: equal factors, so both ends must be over 0. ValueError where they cannot be had.
    """
    if stages < 1 or first < 0 or last < first:
        raise ValueError(
            f"schedule: {first} to {last} in {stages} stages; allowed are 0 <= first <= last and "
            "at least 1 stage"
        )
    if kind == "linear":
        return [float(one) for one in np.linspace(first, last, stages)]
    if kind == "log_linear":
        return [float(one) for one in np.log(np.linspace(np.exp(first), np.exp(last), stages))]
    if first == 0:
        raise ValueError("schedule: exp_linear from 0; it must be over 0")
    return [float(one) for one in np.geomspace(first, last, stages)]
