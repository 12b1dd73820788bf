"""Feature distillation: the outputs of the blocks learn to be those of a teacher's.

After PELA (Guo et al. 2024, "PELA: Learning Parameter-Efficient Models with Low-Rank
Approximation", CVPR), which trains a low-rank model on from the SVD of a dense one, with the
features of the frozen dense model as targets. docs/conversion.md says what is ours.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model import Transformer
from training.config import RunConfig

# Least mean square of a feature, so that a feature of zeros stays one.
TINY = 1e-12


def normalised(x: Tensor) -> Tensor:
    """Each feature (..., d) over its root mean square, in float32 (float64 stays)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * x.square().mean(dim=-1, keepdim=True).clamp_min(TINY).rsqrt()


def distance(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """The mean over layers, tokens and dimensions of (f/rms(f) - t/rms(t))², a scalar.

    features, targets: (B, T, d) of each layer. For one token it is 2 (1 - cos(f, t)): 0 where the
    directions agree, 4 where they are opposite, 2 where they are orthogonal.
    """
    layers = [
        (normalised(f) - normalised(t)).square().mean()
        for f, t in zip(features, targets, strict=True)
    ]
    return torch.stack(layers).mean()


def autocasts(run: RunConfig) -> bool:
    """Whether the run computes in bf16 by autocast over fp32 weights (training/engine.py)."""
    return run.training.precision == "bf16" and run.deepspeed.zero_stage == 0


class Distillation:
    """Compares the block outputs of a model with the teacher's, a micro-batch at a time.

    `comparing` goes around the model's forward pass, `added_to` then adds weight · distance to its
    loss. All micro-batches have as many tokens, so their mean over accumulation and ranks, which
    the engine takes, is the mean over the tokens of the step.
    """

    def __init__(
        self, run: RunConfig, teacher: Transformer, model: Transformer, accumulation: int
    ) -> None:
        self.weight, self.autocast = run.distillation.weight, autocasts(run)
        self.teacher = teacher
        self.kept: list[Tensor] | None = None  # where block outputs go; None: nowhere
        self.distance: Tensor | None = None
        self.last: deque[Tensor] = deque(maxlen=accumulation)
        for block in (*model.layers, *teacher.layers):
            block.register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        """Hook of a block. What the backward pass recomputes is not kept again."""
        if self.kept is not None:
            self.kept.append(output)

    @contextmanager
    def _keeping(self) -> Iterator[list[Tensor]]:
        kept: list[Tensor] = []
        self.kept = kept
        try:
            yield kept
        finally:
            self.kept = None

    @contextmanager
    def comparing(self, inputs: Tensor) -> Iterator[None]:
        """Goes around the model's forward pass of token ids (B, T)."""
        cast = torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.autocast)
        with torch.no_grad(), cast, self._keeping() as targets:
            self.teacher(inputs)
        with self._keeping() as features:
            yield
        self.distance = distance(features, targets)

    def added_to(self, loss: Tensor) -> Tensor:
        """loss + weight · distance of the pass that was compared last."""
        assert self.distance is not None
        found, self.distance = self.distance, None
        self.last.append(found.detach())
        return loss + self.weight * found

    def last_step(self) -> Tensor:
        """The mean distance of this rank's micro-batches of the last step, on the device."""
        return torch.stack(list(self.last)).mean()
