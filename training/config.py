"""RunConfig: what a run's YAML says (blocks model, data, training, deepspeed, execution,
distillation) and its validation.

Precedence: the defaults below, then the YAML of --config, then options such as --training.seed 1.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from data.errors import InputError
from model.config import ModelConfig, Ranks
from model.execution import Execution, unfusible

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"


@dataclass
class DataConfig:
    """Where the tokens come from.

    Attributes:
        path: A folder that data.prepare wrote.
        verify: Compare the sha256 sums of all shards with the manifest before training.
        final_split: The split evaluated when training is over; null: none.
    """

    path: str = "prepared/embedded"
    verify: bool = True
    final_split: str | None = "test"


@dataclass
class TrainingConfig:
    """How the model is trained.

    Attributes:
        run_dir: The folder of the run; see docs/training.md for what it holds.
        seed: Seeds the initial weights, the data order and dropout.
        max_steps: Optimizer steps of the whole run.
        global_batch_size: Sequences in one optimizer step, over all ranks and accumulation steps.
        micro_batch_size: Sequences in one forward pass of one rank; null: the whole share of a
            rank. Accumulation is global_batch_size / (micro_batch_size · ranks).
        seq_len: Tokens of a training sequence.
        learning_rate: Peak of the schedule.
        min_learning_rate: Where the schedule ends.
        schedule: Shape after the warm-up: "cosine", "linear" (both decay from its end to
            max_steps), "wsd" (constant, then linear over decay_steps) or "constant".
        warmup_steps: Steps of linear warm-up from 0.
        decay_steps: Last steps of "wsd" over which the rate decays.
        weight_decay: AdamW's decoupled decay of all parameters but those of no_decay.
        no_decay: Parameters that do not decay, of "norms" (all parameters of norms), "biases" and
            "embeddings" (of tokens and positions; a tied head is the embedding of the tokens).
        factor_decay: What decays of a low-dimensional projection: "separate" (A and B, each as any
            matrix) or "product" (the squared Frobenius norm of B·A; training/product_decay.py).
        lr_multiplier_A: Times the learning rate, for the factors A.
        lr_multiplier_B: Times the learning rate, for the factors B.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        eps: AdamW's denominator offset.
        gradient_clipping: Largest global norm of the gradient; 0: no clipping.
        max_skipped_steps: Stop after so many steps in a row whose loss or gradient is not finite
            (each is left out); null: never.
        precision: "fp32" or "bf16" (bf16 compute, fp32 master weights and accumulation).
        log_every: Steps between two lines of metrics.jsonl.
        untimed_steps: First steps of a process (compilation, caches) that no speed counts.
        gc_every: Steps between two collections of Python's garbage, on all ranks at once; null:
            whenever Python sees fit.
        validate_every: Steps between two validations; 0: none.
        validation_tokens: Tokens of the validation split to use, from its start; null: all.
        eval_micro_batch_size: Sequences in a forward pass of a validation; null: as in training.
        checkpoint_every: Steps between two checkpoints; 0: none but the one at the end.
        keep_checkpoints: How many of the newest checkpoints to keep; null: all.
        keep_every: Keep each checkpoint of a step that this divides, too; null: none.
        async_checkpoint: Write checkpoints in the background, while the training goes on.
        resume: "auto" (the newest whole checkpoint of run_dir, if there is one), "never" (refuse a
            run_dir that has one) or the path of a checkpoint.
        init_from: A run directory or a checkpoint whose weights, and nothing else of it, a run
            begins from; null: new weights.
    """

    run_dir: str
    max_steps: int
    global_batch_size: int
    seq_len: int
    learning_rate: float
    seed: int = 0
    micro_batch_size: int | None = None
    min_learning_rate: float = 0.0
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    weight_decay: float = 0.1
    no_decay: list[Literal["norms", "biases", "embeddings"]] = field(
        default_factory=lambda: ["norms", "biases"]
    )
    factor_decay: Literal["separate", "product"] = "separate"
    lr_multiplier_A: float = 1.0
    lr_multiplier_B: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1.0e-8
    gradient_clipping: float = 1.0
    max_skipped_steps: int | None = 10
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: int = 10
    untimed_steps: int = 5
    gc_every: int | None = 100
    validate_every: int = 0
    validation_tokens: int | None = None
    eval_micro_batch_size: int | None = None
    checkpoint_every: int = 0
    keep_checkpoints: int | None = 2
    keep_every: int | None = None
    async_checkpoint: bool = True
    resume: str = "auto"
    init_from: str | None = None

    def __post_init__(self) -> None:
        at_least_1 = ["max_steps", "global_batch_size", "micro_batch_size", "seq_len", "log_every"]
        at_least_1 += ["validation_tokens", "eval_micro_batch_size", "keep_checkpoints"]
        at_least_1 += ["keep_every", "max_skipped_steps", "gc_every"]
        not_negative = ["seed", "warmup_steps", "decay_steps", "weight_decay", "min_learning_rate"]
        not_negative += ["gradient_clipping", "validate_every", "checkpoint_every", "untimed_steps"]
        positive = ["learning_rate", "eps", "lr_multiplier_A", "lr_multiplier_B"]
        for name in at_least_1:
            self._require(name, lambda v: v >= 1, "at least 1")
        for name in not_negative:
            self._require(name, lambda v: v >= 0, "at least 0")
        for name in positive:
            self._require(name, lambda v: v > 0, "greater than 0")
        for name in ("beta1", "beta2"):
            self._require(name, lambda v: 0 <= v < 1, "at least 0 and under 1")
        self._require(
            "min_learning_rate",
            lambda v: v <= self.learning_rate,
            f"at most learning_rate {self.learning_rate}",
        )
        if self.init_from is not None and self.resume not in ("auto", "never"):
            raise ValueError(
                f"training.init_from: {self.init_from}, but training.resume {self.resume} brings "
                "weights of its own; leave one of them out"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the model computes in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def _require(self, name: str, test: Any, allowed: str) -> None:
        value = getattr(self, name)
        if value is not None and not (test(value) and math.isfinite(value)):
            raise ValueError(f"training.{name}: {value}; it must be {allowed}")

    def warnings(self) -> list[str]:
        """Settings that have no effect or a surprising one."""
        found = []
        if self.warmup_steps >= self.max_steps:
            found.append(
                f"training.warmup_steps {self.warmup_steps} is not under max_steps "
                f"{self.max_steps}: the learning rate only rises"
            )
        if self.schedule == "wsd" and self.decay_steps == 0:
            found.append("training.decay_steps 0: the rate of schedule wsd never decays")
        if self.schedule != "wsd" and self.decay_steps:
            found.append(f"training.decay_steps has no effect with schedule {self.schedule}")
        if self.schedule == "constant" and self.min_learning_rate:
            found.append("training.min_learning_rate has no effect with schedule constant")
        return found

    def accumulation(self, world_size: int) -> int:
        """Micro-steps of one optimizer step. InputError where the batch does not divide."""
        micro = self.micro_batch_size or max(1, self.global_batch_size // world_size)
        if self.global_batch_size % (micro * world_size):
            raise InputError(
                f"training.global_batch_size: {self.global_batch_size} sequences do not divide "
                f"into {world_size} ranks × micro_batch_size {micro}; allowed are multiples of "
                f"{micro * world_size}"
            )
        return self.global_batch_size // (micro * world_size)


@dataclass
class DeepSpeedConfig:
    """What is handed on to DeepSpeed; the rest of its configuration follows from `training`.

    Attributes:
        zero_stage: What is sharded over the ranks: 0 nothing, 1 optimizer states, 2 and gradients,
            3 and parameters.
        overlap_comm: Overlap gradient reduction with the backward pass (stages 1 to 3).
        offload_optimizer: Where optimizer states live: "none" (on the device) or "cpu".
        reduce_bucket_size: Elements reduced at once.
        allgather_bucket_size: Elements gathered at once (stages 1 and 2).
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    overlap_comm: bool = False
    offload_optimizer: Literal["none", "cpu"] = "none"
    reduce_bucket_size: int = 500_000_000
    allgather_bucket_size: int = 500_000_000

    def __post_init__(self) -> None:
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                "deepspeed.offload_optimizer: stage 0 has nothing to offload; use zero_stage 1 to 3"
            )


@dataclass
class DistillationConfig:
    """What a model learns from a teacher beside the text (training/distillation.py).

    Attributes:
        teacher: A run directory (its newest checkpoint) or a checkpoint's folder, whose block
            outputs are the targets; null: no distillation.
        weight: Times the distance of the block outputs, which is added to the loss.
    """

    teacher: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"distillation.weight: {self.weight}; it must be at least 0")

    def warnings(self) -> list[str]:
        """Settings that have no effect."""
        if self.teacher is None and self.weight != DistillationConfig.weight:
            return [f"distillation.weight {self.weight} has no effect: there is no teacher"]
        return []


@dataclass
class RunConfig:
    """A training run.

    Attributes:
        model: The shape of the model.
        training: How it is trained.
        data: Where the tokens come from.
        deepspeed: What DeepSpeed shards and where.
        execution: Kernels, compilation and what is recomputed: how, not what.
        distillation: A teacher whose features the model learns, too.
    """

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig = field(default_factory=DataConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    execution: Execution = field(default_factory=Execution)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        if self.execution.kernels == "triton" and unfusible(self.model):
            raise ValueError(
                f"execution.kernels: triton, but {unfusible(self.model)}; use auto or reference"
            )
        if self.training.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"training.seq_len: {self.training.seq_len} is over model.max_seq_len "
                f"{self.model.max_seq_len}"
            )

    def warnings(self) -> list[str]:
        """Settings that have no effect or a surprising one."""
        found = self.model.warnings() + self.training.warnings() + self.execution.warnings()
        return found + self.distillation.warnings() + self._factor_warnings()

    def _factor_warnings(self) -> list[str]:
        training, found = self.training, []
        if self.model.ranks == Ranks():
            for name in ("factor_decay", "lr_multiplier_A", "lr_multiplier_B"):
                if getattr(training, name) != getattr(TrainingConfig, name):
                    found.append(
                        f"training.{name} {getattr(training, name)} has no effect: no projection "
                        "is low-dimensional (model.r)"
                    )
            return found
        if training.factor_decay == "product" and training.weight_decay == 0:
            found.append("training.factor_decay product has no effect: weight_decay is 0")
        between = {
            "latent_norm": self.model.latent_norm,
            "latent_activation": self.model.latent_activation != "none",
        }
        for name, there in between.items():
            if training.factor_decay == "product" and there:
                found.append(
                    f"training.factor_decay product: with model.{name} the product B·A, which "
                    "decays, is not the matrix that a projection applies"
                )
        return found

    def to_yaml(self) -> str:
        """The resolved configuration, defaults included; --config reads it back to an equal one."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
