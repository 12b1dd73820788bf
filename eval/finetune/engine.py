"""The engine of pre-training, around a TaskModel: the same steps at every ZeRO stage."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import InputError
from eval.finetune import peft_bridge
from eval.finetune.attach import groups
from eval.finetune.blocks import TuningConfig
from eval.finetune.config import PEFT
from eval.finetune.heads import TaskModel, run
from eval.finetune.texts import Batch
from model.delta.prox import gate_parameters, l1_term, reference_threshold, soft_threshold
from training import full_state
from training.clock import StepClock
from training.config import DeepSpeedConfig, TrainingConfig
from training.engine import StepEngine
from training.schedule import learning_rate


@dataclass
class EngineSettings:
    """What training.engine reads."""

    training: TrainingConfig
    deepspeed: DeepSpeedConfig


class TuneEngine(StepEngine):
    """Steps on the trained parameters of a TaskModel, with a learning-rate schedule by stage.

    bf16 is autocast over float32 weights at every ZeRO stage: DeepSpeed's own would cast head and
    deltas, too.
    """

    model: TaskModel

    def __init__(
        self,
        model: TaskModel,
        tuning: TuningConfig,
        stage: TrainingConfig,
        deepspeed: DeepSpeedConfig,
        device: torch.device,
        l1: float = 0.0,
        gates_at_first: int = 0,
    ) -> None:
        super().__init__(EngineSettings(stage, deepspeed), device)
        self.config["bf16"]["enabled"] = False
        self.config["torch_autocast"]["enabled"] = tuning.precision == "bf16"
        self.stage, self.stage_start = stage, 0
        self.l1, self.gates_at_first = l1, gates_at_first
        adamw = torch.optim.AdamW(
            groups(model, tuning.weight_decay, tuning.head_lr_multiplier),
            lr=tuning.learning_rate,
            betas=(tuning.beta1, tuning.beta2),
            eps=tuning.eps,
            fused=True,
        )
        self.step_at_work = 0
        if peft_bridge.allocates_ranks(model.backbone):
            if deepspeed.zero_stage:
                raise InputError(
                    f"deepspeed.zero_stage: {deepspeed.zero_stage}, but {PEFT} allocates ranks by "
                    "whole gradients; allowed is 0"
                )
            # DeepSpeed clears the gradients right after AdamW's step.
            adamw.register_step_post_hook(self._allocate_ranks)
        self.initialize(model, adamw)

    def train_step(
        self, step: int, next_batch: Callable[[], Any], clock: StepClock
    ) -> tuple[Tensor, Any]:
        """As StepEngine's."""
        self.step_at_work = step
        return super().train_step(step, next_batch, clock)

    def _allocate_ranks(self, *_: Any) -> None:
        if self.step_was_applied():
            peft_bridge.allocate(self.model.backbone, self.step_at_work)

    def begin_stage(self, stage: TrainingConfig, first_step: int) -> None:
        """The schedule begins anew at this step: warm-up, peak, decay."""
        self.stage, self.stage_start = stage, first_step

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step` of the whole run, 0-based."""
        return learning_rate(self.stage, step - self.stage_start)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of classes, squared error of numbers, or cross-entropy of the answers'
        tokens, each of the same weight in an optimizer step.
        """
        found = run(self.deepspeed, batch)
        if batch.targets is not None:
            loss = found.sum() / batch.target_tokens
        elif batch.labels is not None and batch.labels.is_floating_point():
            loss = F.mse_loss(found[:, 0], batch.labels)
        else:
            assert batch.labels is not None
            loss = F.cross_entropy(found, batch.labels)
        if self.l1:
            loss = loss + self.l1 * l1_term(self.model, self.gates_at_first).to(loss.device)
        return loss

    def step_was_applied(self) -> bool:
        """Whether the last step was finite, and so was not left out; waits for the device."""
        if self.run.deepspeed.zero_stage == 0:
            return not bool(self.in_a_row_on_device)
        return bool(self.deepspeed.was_step_applied())

    @torch.no_grad()
    def proximal_step(self, threshold: float, reference_compat: bool) -> None:
        """SoRA's step on the gates, wherever ZeRO keeps their fp32 values; collective there."""
        operator = reference_threshold if reference_compat else soft_threshold
        for gate in gate_parameters(self.model):
            value = full_state.read_whole(self, gate, "weight")
            full_state.write_whole(self, gate, "weight", operator(value, threshold))

    @torch.no_grad()
    def outputs(self, batch: Batch) -> Tensor:
        """What the model returns, in evaluation mode."""
        self.deepspeed.eval()
        return run(self.deepspeed, batch)
