"""LPA against vanilla on the CPU: what share of the saved FLOPs becomes saved time.

    share = (1 - t_lpa / t_vanilla) / (1 - FLOPs_lpa / FLOPs_vanilla)

Both have the same execution settings, those of train.py by default, and compute the same function:
vanilla's attention weights are the products B·A of the LPA model's factors, so that the losses must
agree. Three parts are timed:

  step         forward, backward, clipping and AdamW, with an output head of 4,096 tokens
  blocks       forward and backward of the same blocks under a head of 16 tokens, no optimizer
  projections  forward and backward of q, k, v and o of one block alone, on the same input

FLOPs are ModelConfig.flops_per_token, times 3 for the backward pass. They count matrix products and
attention alone: what both models do beside them takes time without any, which lowers the share of
blocks and step; what thin products lose lowers that of the projections too.
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from model import ModelConfig, Transformer, init_weights
from model.configure import configure
from model.execution import Execution
from model.projection import Dense, LowDim
from model.transformer import Block
from training.bench.measure import (
    WARM_UP,
    Row,
    Step,
    check_losses,
    in_turn,
    measurement,
    merge,
    ratio,
    tokens_per_second,
)
from training.bench.profiling import seconds_by_group
from training.bench.step import INIT_STD, QUICK_INIT_STD, training_step

TOLERANCE = 1e-5
GOAL = 0.9
SEED = 0
HEAD_OF_BLOCKS = 16
PARTS = ("step", "blocks", "projections")


@dataclass
class Case:
    """A LPA model, a batch (B, T) and how often to repeat."""

    model: ModelConfig
    batch: int
    seq_len: int
    rounds: int

    def name(self, part: str) -> str:
        m = self.model
        return f"d={m.hidden_size} r={m.r} L={m.num_layers} {self.batch}×{self.seq_len}, {part}"


def cases(quick: bool) -> list[Case]:
    """What is measured: the ratios d/r of the configurations in configs/, and two layers, which
    give the head of 4,096 tokens about the share that 32,000 have of twelve.
    """
    if quick:
        tiny = ModelConfig(64, 32, 48, 1, 2, max_seq_len=16, r=8, init_std=QUICK_INIT_STD)
        return [Case(tiny, 2, 16, 3)]
    shapes = [(512, 1376, 128, 40), (768, 2048, 128, 25), (1024, 2736, 256, 15)]
    return [
        Case(
            ModelConfig(4096, d, ffn, 2, d // 64, max_seq_len=256, r=r, init_std=INIT_STD),
            batch=4,
            seq_len=256,
            rounds=rounds,
        )
        for d, ffn, r, rounds in shapes
    ]


def twins(config: ModelConfig) -> dict[str, Transformer]:
    """The LPA model and a vanilla one with the same function."""
    low = Transformer(config)
    init_weights(low, SEED)
    dense = Transformer(replace(config, r=None))
    init_weights(dense, SEED)  # all that is in both is equal
    for ours, theirs in zip(low.modules(), dense.modules(), strict=True):
        if isinstance(ours, LowDim) and isinstance(theirs, Dense):
            with torch.no_grad():
                theirs.weight.copy_(ours.B @ ours.A)
    for model in (low, dense):
        configure(model, Execution(), torch.device("cpu"), torch.float32)
    return {"vanilla": dense.train(), "lpa": low.train()}


def whole_step(model: Transformer, *inputs: Tensor) -> Step:
    """A step of training as in the benchmark `step`."""
    return training_step(model, model, *inputs)


def forward_backward(model: Transformer, *inputs: Tensor) -> Step:
    """A forward and a backward pass, gradients to None before them."""

    def step() -> float:
        model.zero_grad(set_to_none=True)
        value: Tensor = model(*inputs)
        value.backward()
        return float(value.detach())

    return step


def projections_pass(model: Transformer, tokens: int) -> Step:
    """Forward and backward through q, k, v and o of the first block; x (tokens, d), random."""
    generator = torch.Generator().manual_seed(SEED)
    attention = cast(Block, model.layers[0]).attention
    layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    shape = (tokens, model.config.hidden_size)
    x, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    x.requires_grad_()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        x.grad = None
        outputs = [layer(x) for layer in layers]
        torch.autograd.backward(outputs, [gradient] * len(outputs))
        return float(outputs[0].detach().square().mean())

    return step


def part_of(case: Case, part: str) -> tuple[dict[str, Step], dict[str, float], dict[str, float]]:
    """Of one part: the sides, a loss of each before any step, and FLOPs per token of each."""
    config = case.model if part == "step" else replace(case.model, vocab_size=HEAD_OF_BLOCKS)
    models = twins(config)
    if part == "projections":
        sides = {k: projections_pass(m, case.batch * case.seq_len) for k, m in models.items()}
        flops = {k: 6.0 * projection_entries(m.config) for k, m in models.items()}
        return sides, {k: side() for k, side in sides.items()}, flops
    generator = torch.Generator().manual_seed(SEED)
    shape = (case.batch, case.seq_len + 1)
    tokens = torch.randint(0, config.vocab_size, shape, generator=generator)
    inputs = tokens[:, :-1], tokens[:, 1:]
    make = whole_step if part == "step" else forward_backward
    return (
        {k: make(m, *inputs) for k, m in models.items()},
        {k: m(*inputs).item() for k, m in models.items()},
        {k: 3 * m.config.flops_per_token(case.seq_len) for k, m in models.items()},
    )


def projection_entries(config: ModelConfig) -> int:
    """Entries of the matrices of q, k, v and o of a block: the factors, not their product."""
    return sum(shape.matmul_parameters() for shape in config.attention_projections().values())


def measure_part(case: Case, part: str) -> Row:
    """Both models in turn."""
    name = case.name(part)
    sides, losses, flops = part_of(case, part)
    # Steps of the optimizer move B·A otherwise than W: only losses before any are alike.
    checked = check_losses(name, {k: [loss] for k, loss in losses.items()}, TOLERANCE)
    in_turn(sides, WARM_UP)
    seconds = in_turn(sides, case.rounds)
    goal = None if part == "projections" else GOAL
    return _report(name, case, seconds, flops, goal) | {
        "losses": [checked | {"case": name}],
        "profiles": [
            {"case": name, "side": side, "seconds": seconds_by_group(step, 2)}
            for side, step in sides.items()
        ],
    }


def _report(
    name: str,
    case: Case,
    seconds: dict[str, list[float]],
    flops: dict[str, float],
    goal: float | None,
) -> Row:
    saved = 1 - flops["lpa"] / flops["vanilla"]
    tokens = case.batch * case.seq_len
    rows = [
        measurement(name, side, values, flops_per_token=flops[side])
        for side, values in seconds.items()
    ]
    both = seconds["lpa"], seconds["vanilla"]
    return {
        "measurements": tokens_per_second(rows, tokens),
        "ratios": [
            ratio(name, "time of LPA / time of vanilla", *both)
            | {"flops_lpa_over_vanilla": 1 - saved},
            ratio(
                name,
                "share of the saved FLOPs that is saved time",
                *both,
                goal=goal,
                of=lambda r: (1 - r) / saved,
            ),
        ],
    }


def measure(quick: bool = False) -> Row:
    """All cases, part by part."""
    parts = [measure_part(case, part) for case in cases(quick) for part in PARTS]
    return merge(parts) | {"seed": SEED}
