"""Chains of layers: frozen, with a delta of ours, with peft's LoRA."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data.errors import InputError
from model.delta import DeltaConfig, Deltas, LoraConfig, SoraConfig
from model.projection import LowDim
from model.shape import Shape

Kind = Literal["linear", "factorised"]
SEED = 0
OF_WIDTH = 6  # rank of a factorised layer: d / 6, as 128 of 768
LAUNCH_BOUND = 1e6  # FLOPs of a layer's forward pass under which the calls are its time
# Float32 sums of d terms in another order differ by about √d · 6e-8, through a few layers; a wrong
# scale, factor or gate by the size of the delta itself.
TOLERANCE = 1e-4


class DifferentOutputError(Exception):
    """Two sides that do not compute the same: there is nothing to compare."""


@dataclass(frozen=True)
class Case:
    """A chain of `layers` layers d -> d without bias, a delta of rank r on each, and its input.

    Attributes:
        kind: "linear" (nn.Linear) or "factorised" (model.projection.LowDim of rank d / 6).
        d: Width.
        rows: Rows of the input.
        batched: Whether it is (2, rows / 2, d), as hidden states are, and not (rows, d).
        layers: Layers of the chain.
        r: Rank of the deltas.
    """

    kind: Kind
    d: int
    rows: int
    batched: bool
    layers: int
    r: int

    def name(self) -> str:
        """For tables."""
        shape = f"2×{self.rows // 2}" if self.batched else f"{self.rows}"
        return f"{self.kind}, d {self.d}, {shape} rows"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input."""
        return (2, self.rows // 2, self.d) if self.batched else (self.rows, self.d)

    @property
    def flops(self) -> int:
        """Of the forward pass of one frozen layer: two a multiply-add."""
        inner = 2 * self.d // OF_WIDTH if self.kind == "factorised" else self.d
        return 2 * self.rows * self.d * inner

    @property
    def launch_bound(self) -> bool:
        """Whether calls and not arithmetic are its time."""
        return self.flops < LAUNCH_BOUND


def cases(sizes: Sequence[int], rows: Sequence[int], layers: int, r: int) -> Iterator[Case]:
    """Every size with every number of rows, flat and batched, dense and factorised. InputError
    where a rank does not fit, or rows cannot be halved.
    """
    for d in sizes:
        if not 1 <= r <= d:
            raise InputError(f"--rank {r}: with --sizes {d}; allowed is 1 to {d}")
        if d < OF_WIDTH:
            raise InputError(f"--sizes {d}: allowed is at least {OF_WIDTH}")
        for count in rows:
            if count < 2 or count % 2:
                raise InputError(f"--rows {count}: allowed are even numbers of at least 2")
            for kind in ("linear", "factorised"):
                for batched in (False, True):
                    yield Case(kind, d, count, batched, layers, r)


@dataclass
class Side:
    """One of the compared: a module, what of it is trained, and its own input and gradient."""

    module: nn.Module
    trained: list[nn.Parameter]
    x: Tensor
    gradient: Tensor

    def forward(self) -> None:
        """A forward pass of inference: no graph is made."""
        with torch.no_grad():
            self.module(self.x)

    def forward_backward(self) -> None:
        """A pass of training: gradients of the delta's parameters and of the input."""
        self.x.grad = None
        for parameter in self.trained:
            parameter.grad = None
        self.module(self.x).backward(self.gradient)


def chain(case: Case) -> nn.Sequential:
    """The frozen layers, the same for all sides of a case."""
    generator = torch.Generator().manual_seed(SEED)
    layers = []
    for _ in range(case.layers):
        if case.kind == "linear":
            layer: nn.Module = nn.Linear(case.d, case.d, bias=False)
        else:
            layer = LowDim(Shape(case.d, case.d, case.d // OF_WIDTH, bias="none"))
        with torch.no_grad():
            for weight in layer.parameters():  # outputs have the scale of inputs
                weight.normal_(0, weight.size(1) ** -0.5, generator=generator)
        layers.append(layer)
    return nn.Sequential(*layers).requires_grad_(False)


def factors(case: Case) -> list[tuple[Tensor, Tensor]]:
    """A (r, d) and B (d, r) of each layer's delta, the same for all sides; none of them is zero."""
    generator = torch.Generator().manual_seed(SEED + 1)
    std = case.d**-0.5
    return [
        (
            torch.randn(case.r, case.d, generator=generator) * std,
            torch.randn(case.d, case.r, generator=generator) * std,
        )
        for _ in range(case.layers)
    ]


def ours(case: Case, make: type[LoraConfig]) -> tuple[nn.Module, list[nn.Parameter]]:
    """The chain with a LoRA or SoRA of ours, its gates open."""
    module = chain(case)
    options: dict[str, Any] = {"targets": [str(i) for i in range(case.layers)], "r": case.r}
    if make is SoraConfig:
        options["gate_init"] = "ones"
    config: DeltaConfig = make(**options)
    deltas = Deltas(module)
    delta = deltas.add("bench", config)
    with torch.no_grad():
        for (_, layer), (a, b) in zip(delta.named_layers(), factors(case), strict=True):
            layer.get_parameter("A").copy_(a)
            layer.get_parameter("B").copy_(b)
    return module, list(deltas.parameters())


def pefts(case: Case) -> tuple[nn.Module, list[nn.Parameter]]:
    """The chain with peft's LoRA, called without the model that peft puts around it."""
    import peft

    names = [str(i) for i in range(case.layers)]
    options = peft.LoraConfig(r=case.r, lora_alpha=16, target_modules=names)
    wrapped: Any = peft.get_peft_model(chain(case), options)
    module: nn.Module = wrapped.base_model.model
    with torch.no_grad():
        for name, (a, b) in zip(names, factors(case), strict=True):
            layer: Any = module.get_submodule(name)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    return module, [p for p in wrapped.parameters() if p.requires_grad]


def sides(case: Case, with_peft: bool) -> dict[str, Side]:
    """Frozen, LoRA, SoRA, and for nn.Linear peft's LoRA."""
    made: dict[str, Callable[[], tuple[nn.Module, list[nn.Parameter]]]] = {
        "frozen": lambda: (chain(case), []),
        "lora": lambda: ours(case, LoraConfig),
        "sora": lambda: ours(case, SoraConfig),
    }
    if with_peft and case.kind == "linear":
        made["peft lora"] = lambda: pefts(case)
    generator = torch.Generator().manual_seed(SEED + 2)
    x, gradient = (torch.randn(case.shape, generator=generator) for _ in range(2))
    return {
        name: Side(*make(), x.clone().requires_grad_(), gradient.clone())
        for name, make in made.items()
    }


def check(case: Case, found: dict[str, Side]) -> dict[str, Any]:
    """The largest difference of outputs and input gradients of the tuned sides from those of our
    LoRA, relative in the norm. DifferentOutputError where it is over TOLERANCE, or where a tuned
    side computes what the frozen one does.
    """
    wanted, worst = _outcome(found["lora"]), 0.0
    for name, side in found.items():
        outcome = _outcome(side)
        differences = [
            float((a - b).norm() / b.norm()) for a, b in zip(outcome, wanted, strict=True)
        ]
        if name == "frozen":
            if min(differences) < TOLERANCE:
                raise DifferentOutputError(f"{case.name()}: the delta changes nothing")
            continue
        if not max(differences) <= TOLERANCE:  # nan too
            raise DifferentOutputError(
                f"{case.name()}: {name} differs from lora by {max(differences):.2g} in output or "
                f"gradient; allowed is {TOLERANCE:g}"
            )
        worst = max(worst, *differences)
    return {"case": case.name(), "largest_relative_difference": worst, "allowed": TOLERANCE}


def _outcome(side: Side) -> tuple[Tensor, Tensor]:
    """Output, and gradient of the input."""
    output = side.module(side.x)
    (gradient,) = torch.autograd.grad(output, side.x, side.gradient)
    return output.detach(), gradient
