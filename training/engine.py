"""The DeepSpeed engine of a run, with its configuration derived from the run's YAML."""

import io
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model import Transformer, init_weights, initial_value
from model.transformer import Block
from training import distributed, full_state
from training.clock import StepClock
from training.config import DeepSpeedConfig, RunConfig, TrainingConfig
from training.distillation import Distillation
from training.execution import apply_execution
from training.optimizer import build_optimizer, set_learning_rate
from training.product_decay import ProductDecay
from training.schedule import learning_rate


class Settings(Protocol):
    """What the engine reads of a run's configuration."""

    training: TrainingConfig
    deepspeed: DeepSpeedConfig


def deepspeed_config(run: Settings, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Every key that changes what happens is written out, because
    defaults have moved between its releases; nothing in it can disagree with the YAML.
    """
    training, ds = run.training, run.deepspeed
    accumulation = training.accumulation(world_size)
    bf16 = training.precision == "bf16"
    return {
        "train_micro_batch_size_per_gpu": training.global_batch_size // accumulation // world_size,
        "gradient_accumulation_steps": accumulation,
        # At stage 0 DeepSpeed computes the norm once more, and waits for the GPU: train_step clips.
        "gradient_clipping": training.gradient_clipping if ds.zero_stage else 0.0,
        "zero_optimization": {
            "stage": ds.zero_stage,
            "overlap_comm": ds.overlap_comm,
            "contiguous_gradients": True,
            "reduce_bucket_size": ds.reduce_bucket_size,
            "allgather_bucket_size": ds.allgather_bucket_size,
            "offload_optimizer": {"device": ds.offload_optimizer},
        },
        # DeepSpeed's own bf16 at stage 0 takes an optimizer step of its own at start, so Adam's
        # bias correction is off by one; autocast over fp32 weights has no such step.
        "bf16": {"enabled": bf16 and ds.zero_stage > 0, "check_grad_overflow": True},
        "torch_autocast": {"enabled": bf16 and ds.zero_stage == 0, "dtype": "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # else gradients of bf16 are summed over ranks in bf16
        "zero_force_ds_cpu_optimizer": False,  # offloaded states are torch's AdamW's too
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
        # On by default, and it waits for the GPU in every forward pass and step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }


class StepEngine:
    """DeepSpeed around any module: optimizer steps that are left out where they are not finite.

    What is trained and how a batch becomes a loss, subclasses say: they call `initialize`, and
    define `rate` and `loss`.
    """

    model: nn.Module

    def __init__(self, run: Settings, device: torch.device) -> None:
        distributed.prepare_deepspeed()
        import deepspeed

        self.run, self.device = run, device
        self.world_size = distributed.world_size()
        self.config = deepspeed_config(run, self.world_size)
        self.accumulation: int = self.config["gradient_accumulation_steps"]
        self.sharded = run.deepspeed.zero_stage == 3
        self.product_decay: ProductDecay | None = None
        self.skipped_before = 0  # in the checkpoint that the run went on from
        self.skipped_on_device = torch.zeros((), device=device)
        self.in_a_row_on_host = 0
        self.in_a_row_on_device = torch.zeros((), device=device)
        self.in_a_row_copy = torch.zeros((), pin_memory=device.type == "cuda")
        deepspeed.init_distributed(dist_backend=None)

    def initialize(self, model: nn.Module, adamw: torch.optim.Optimizer) -> None:
        """Hands module and optimizer to DeepSpeed."""
        import deepspeed

        with redirect_stdout(io.StringIO()):  # BF16_Optimizer prints memory statistics, always
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=adamw, config=self.config
            )
        self.model = self.deepspeed.module

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, 0-based."""
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        """The loss of what `next_batch` gives, a scalar."""
        raise NotImplementedError

    def objective(self, loss: Tensor) -> Tensor:
        """What is minimised: the loss that `loss` gave, and what a subclass adds to it."""
        return loss

    @staticmethod
    def gather(parameter: Tensor) -> Any:
        """Makes a parameter that ZeRO stage 3 shards whole; rank 0's values are those kept."""
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    def train_step(
        self, step: int, next_batch: Callable[[], Any], clock: StepClock
    ) -> tuple[Tensor, Any]:
        """One optimizer step. `next_batch` gives a micro-batch, as `loss` takes it.

        Returns this rank's loss of each micro-batch (accumulation,), on the device (reading it
        waits for the device), and the global norm of the gradient before clipping. Where a loss on
        any rank or the norm is not finite, the step is left out on every rank.
        """
        rate = self.rate(step)
        set_learning_rate(self.optimizer, rate)
        if self.product_decay is not None:
            self.product_decay.arm(rate)
        losses = []
        norm: Any = None
        self.deepspeed.train()
        for _ in range(self.accumulation):
            batch = next_batch()
            with clock.phase("forward"):
                loss = self.loss(batch)
                objective = self.objective(loss)
            losses.append(loss.detach())
            with clock.phase("backward"):
                # divides by the accumulation itself
                self.deepspeed.backward(_with_its_gradient_not_finite(objective))
            with clock.phase("optimizer"):
                if (
                    self.run.deepspeed.zero_stage == 0
                    and self.deepspeed.is_gradient_accumulation_boundary()
                ):
                    norm = self._clip()
                    self._skip_unless_finite(norm)
                self.deepspeed.step()
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
            left_out = not self.deepspeed.was_step_applied()
            self.in_a_row_on_host = (self.in_a_row_on_host + 1) * left_out
        return torch.stack(losses), norm

    def _clip(self) -> Tensor:
        """Clips the gradients at stage 0, on the device; their norm before. They are averaged over
        the ranks by now.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
        limit = self.run.training.gradient_clipping
        if limit:
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def _skip_unless_finite(self, norm: Tensor) -> None:
        """At stage 0 makes AdamW leave out this step where the norm is not finite; ZeRO does so
        itself. Decided on the device: torch's fused AdamW reads `found_inf` from its attributes.
        """
        found_inf = (~torch.isfinite(norm)).float()
        base = getattr(self.optimizer, "optimizer", self.optimizer)
        base.grad_scale, base.found_inf = None, found_inf
        self.skipped_on_device += found_inf
        self.in_a_row_on_device.add_(1).mul_(found_inf)
        self.in_a_row_copy.copy_(self.in_a_row_on_device, non_blocking=True)

    def skipped_steps(self) -> int:
        """Steps left out so far because a gradient was not finite; waits for the device."""
        here = int(self.deepspeed.skipped_steps) + int(self.skipped_on_device.item())
        return self.skipped_before + here

    def skipped_in_a_row(self) -> int:
        """Steps left out in a row up to now. On a GPU at stage 0 it may be that of a step before,
        and differ between ranks: it waits for no device.
        """
        return max(self.in_a_row_on_host, int(self.in_a_row_copy))


class Engine(StepEngine):
    """One rank's part of the training: weights, optimizer and the steps on them."""

    run: RunConfig
    model: Transformer
    distillation: Distillation | None = None

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        super().__init__(run, device)
        import deepspeed

        shard = nullcontext()
        if self.sharded:
            shard = deepspeed.zero.Init(config_dict_or_path=self.config)
        with shard:
            model = Transformer(run.model)
        init_weights(model, run.training.seed, self.gather if self.sharded else _whole)
        if self.sharded:
            # A block's parameters are gathered together, by hooks on the block alone: the fused
            # attention reads those of modules that it does not call.
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        adamw = build_optimizer(model, run.training)
        self.initialize(model, adamw)
        if run.training.factor_decay == "product":
            self.product_decay = ProductDecay(self, adamw)
        if self.config["bf16"]["enabled"]:
            self._set_master_weights()
        dtype = run.training.torch_dtype
        self.plan = apply_execution(self.model, run.execution, device, dtype, training=True)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, 0-based."""
        return learning_rate(self.run.training, step)

    def loss(self, batch: Tensor) -> Tensor:
        """The mean cross-entropy of a micro-batch of token ids (b, seq_len + 1)."""
        inputs = batch[:, :-1]
        with self.distillation.comparing(inputs) if self.distillation else nullcontext():
            loss: Tensor = self.deepspeed(inputs, batch[:, 1:])
        return loss

    def objective(self, loss: Tensor) -> Tensor:
        """The cross-entropy, and with a teacher the weighted distance to its features."""
        return self.distillation.added_to(loss) if self.distillation else loss

    def learn_from(self, teacher: Transformer) -> None:
        """From now on block outputs learn to be the teacher's."""
        self.distillation = Distillation(self.run, teacher, self.model, self.accumulation)

    def _set_master_weights(self) -> None:
        """Gives the fp32 master weights their initial values: DeepSpeed makes them from the model
        after it was cast to bf16, so each stage would begin from weights rounded to 8 bits.
        """
        for name, parameter in self.model.named_parameters():
            shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
            value = initial_value(self.model, name, shape, self.run.training.seed)
            full_state.set_fp32(self, parameter, "weight", value.to(self.device))

    @torch.no_grad()
    def token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of each target (B, T) -> (B, T); collective at ZeRO stage 3."""
        self.deepspeed.eval()
        losses: Tensor = self.deepspeed(inputs, targets, reduction="none")
        return losses


def _with_its_gradient_not_finite(loss: Tensor) -> Tensor:
    """The loss; where it is not finite, one whose gradient is not finite either, so that the check
    of the gradient, which all ranks make together, finds it too. (The gradient of an infinite
    cross-entropy is finite where the logit of the target is -inf.)
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def _whole(_: Tensor) -> Any:
    return nullcontext()
