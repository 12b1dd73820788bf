"""Decay of the product: W = B·A decays, in place of B and A each by itself.

The penalty is (λ/2)·‖B A‖_F² with λ = weight_decay, what weight decay is of the dense W. Its
gradients are λ BᵀB A and λ B A Aᵀ (Frobenius decay: Khodak et al. 2021, "Initialization and
Regularization of Factorized Neural Layers"). Here they do not pass through Adam's moments: the
decay is decoupled, as AdamW's is of a matrix (Loshchilov and Hutter 2019),

    A <- A − η_A λ BᵀB A        B <- B − η_B λ B A Aᵀ

from the values before the step, with each factor's own learning rate η.
"""

from typing import Any

import torch
from torch import Tensor

from model.projection import LowDim
from training import full_state


def product_gradients(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ½‖B A‖_F² with respect to A (r, d_in) and B (d_out, r), in their shapes."""
    return (b.T @ b) @ a, b @ (a @ a.T)


class ProductDecay:
    """Decays the product of every low-dimensional projection of an engine, on the fp32 weights
    that AdamW steps on.

    It acts when AdamW is first called in a step. At ZeRO stages 1 to 3 that is after DeepSpeed has
    found the gradient finite, before any weight has changed, and on all ranks; DeepSpeed calls
    AdamW once a group, so the later calls of a step must find nothing to do. At stage 0 AdamW is
    always called, and leaves out a step by its `found_inf`, on the device; so does the decay.
    """

    def __init__(self, engine: Any, adamw: torch.optim.AdamW) -> None:
        self.engine = engine
        self.layers = [m for m in engine.model.modules() if isinstance(m, LowDim)]
        self.replicated = engine.run.deepspeed.zero_stage == 0
        self.rate: float | None = None
        adamw.register_step_pre_hook(self._before_adamw)

    def arm(self, rate: float) -> None:
        """Has the next step decay; rate: the schedule's, before the factors' multipliers."""
        self.rate = rate

    @torch.no_grad()
    def _before_adamw(self, adamw: Any, *_: Any) -> None:
        if self.rate is None:
            return
        config = self.engine.run.training
        step = self.rate * config.weight_decay
        self.rate = None
        for layer in self.layers:
            A, B = self._whole(layer.A), self._whole(layer.B)
            gradient_A, gradient_B = product_gradients(A, B)
            decayed_A = A - step * config.lr_multiplier_A * gradient_A
            decayed_B = B - step * config.lr_multiplier_B * gradient_B
            for parameter, old, new in ((layer.A, A, decayed_A), (layer.B, B, decayed_B)):
                if self.replicated:
                    parameter.copy_(torch.where(adamw.found_inf.bool(), old, new))
                else:
                    full_state.set_fp32(self.engine, parameter, "weight", new)

    def _whole(self, parameter: Tensor) -> Tensor:
        """The whole fp32 weight on this rank's device; collective at stages 1 to 3."""
        if self.replicated:
            return parameter
        from deepspeed.utils import safe_get_full_fp32_param

        whole: Tensor = safe_get_full_fp32_param(parameter)
        return whole
