"""Blocks of a TuneConfig: how texts become ids, how parameters are trained, SoRA's gates."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from model.delta.prox import schedule
from training.config import TrainingConfig


def _require(block: str, config: Any, name: str, valid: bool, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{block}.{name}: {getattr(config, name)!r}; allowed is {allowed}")


@dataclass
class TextConfig:
    """How an example becomes token ids: BOS, the text or texts, and what stands between and behind.

    Attributes:
        max_length: Most tokens of an example; longer texts lose their ends (the longer of a pair
            first), a prompt its beginning.
        separator: Text between the two of a pair, tokenised by itself.
        end: Text behind an example, tokenised by itself; a head reads the hidden state of its last
            token, and generation ends with it. Empty: nothing.
    """

    max_length: int = 128
    separator: str = "\n"
    end: str = "\n"

    def __post_init__(self) -> None:
        _require("texts", self, "max_length", self.max_length >= 8, "at least 8")


@dataclass
class TuningConfig:
    """How the trained parameters are trained.

    Attributes:
        learning_rate: Peak of the schedule: linear warm-up, then linear decay to 0.
        head_lr_multiplier: Times the learning rate, for the classification head.
        batch_size: Examples in one optimizer step, over all ranks.
        micro_batch_size: Examples in one forward pass of one rank; null: a rank's whole share.
        epochs: Passes over the training split (a fraction is allowed).
        max_steps: Ends the schedule earlier; null: epochs alone say.
        warmup_ratio: Part of the steps that the warm-up takes.
        weight_decay: AdamW's, of matrices; vectors (biases, norms, gates) have none.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        eps: AdamW's denominator offset.
        gradient_clipping: Largest global norm of the gradient; 0: no clipping.
        precision: "fp32" or "bf16" (autocast over fp32 weights; head and loss stay in fp32).
        evals_per_epoch: Validations in a pass over the training split; there is one at the end too,
            and with 0 there alone.
        patience: Validations without a better metric after which training ends; null: never.
        eval_batch_size: Examples in a forward pass of a validation.
        train_examples: Use so many examples of the training split, the same for all seeds; null:
            all.
        eval_examples: Score so many examples of val, test and the training split at most; null:
            all.
        group_by_length: Batches of examples of like length, for less padding.
        log_every: Steps between two lines of metrics.jsonl.
        checkpoint_every: Steps between two checkpoints; 0: none but at a signal.
        max_skipped_steps: Stop after so many steps in a row that were not finite; null: never.
    """

    learning_rate: float = 1e-3
    head_lr_multiplier: float = 1.0
    batch_size: int = 32
    micro_batch_size: int | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    warmup_ratio: float = 0.06
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    gradient_clipping: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    evals_per_epoch: int = 1
    patience: int | None = None
    eval_batch_size: int = 64
    train_examples: int | None = None
    eval_examples: int | None = None
    group_by_length: bool = False
    log_every: int = 20
    checkpoint_every: int = 0
    max_skipped_steps: int | None = 10

    def __post_init__(self) -> None:
        for name in (
            "batch_size", "micro_batch_size", "max_steps", "patience",
            "train_examples", "eval_examples", "eval_batch_size", "log_every", "max_skipped_steps",
        ):  # fmt: skip
            value = getattr(self, name)
            _require("tuning", self, name, value is None or value >= 1, "at least 1")
        for name in ("learning_rate", "head_lr_multiplier", "epochs", "eps"):
            value = getattr(self, name)
            _require("tuning", self, name, 0 < value < math.inf, "greater than 0")
        for name in ("weight_decay", "gradient_clipping", "checkpoint_every", "evals_per_epoch"):
            _require("tuning", self, name, 0 <= getattr(self, name) < math.inf, "at least 0")
        for name in ("warmup_ratio", "beta1", "beta2"):
            _require("tuning", self, name, 0 <= getattr(self, name) < 1, "0 to under 1")

    def steps(self, examples: int, epochs: float | None = None) -> int:
        """Optimizer steps of so many passes (null: epochs) over a split of so many examples."""
        found = max(1, math.ceil((epochs or self.epochs) * examples / self.batch_size))
        return found if self.max_steps is None else min(found, self.max_steps)

    def schedule(self, steps: int, seed: int, max_length: int) -> TrainingConfig:
        """What training.schedule and training.engine read, of a stage of so many steps."""
        return TrainingConfig(
            run_dir="",
            max_steps=steps,
            global_batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            seq_len=max_length,
            learning_rate=self.learning_rate,
            seed=seed,
            schedule="linear",
            warmup_steps=round(self.warmup_ratio * steps),
            weight_decay=self.weight_decay,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            gradient_clipping=self.gradient_clipping,
            max_skipped_steps=self.max_skipped_steps,
            precision=self.precision,
        )


@dataclass
class SparsityConfig:
    """SoRA's gates: what closes them, and when closed ranks are dropped.

    Attributes:
        strength: λ of the first stage: after each step a gate loses η_t·λ, η_t its learning rate.
        last_strength: λ of the last stage of the sparsifying schedule.
        stages: Stages of the schedule; 1: `strength` alone.
        kind: How λ grows from stage to stage: "linear", "log_linear" or "exp_linear".
        stage_epochs: Passes over the training split in each stage but the first.
        l1: Coefficient of the mean of |g| in the loss, as the authors' code has beside the step.
        prune_every: Steps between two drops of closed ranks during training (ZeRO stage 0 alone);
            0: at the end alone.
        reference_compat: What the authors' code does: λ is the threshold itself, whatever the
            learning rate, and what lies under twice the threshold closes.
        memorisation_examples: Training examples on which memorisation is measured by stage.
    """

    strength: float = 0.0
    last_strength: float | None = None
    stages: int = 1
    kind: Literal["linear", "log_linear", "exp_linear"] = "linear"
    stage_epochs: float = 15.0
    l1: float = 0.0
    prune_every: int = 0
    reference_compat: bool = False
    memorisation_examples: int = 1000

    def __post_init__(self) -> None:
        for name in ("strength", "l1", "prune_every"):
            _require("sparsity", self, name, 0 <= getattr(self, name) < math.inf, "at least 0")
        last = self.last_strength
        _require("sparsity", self, "last_strength", last is None or last < math.inf, "finite")
        for name in ("stages", "memorisation_examples"):
            _require("sparsity", self, name, getattr(self, name) >= 1, "at least 1")
        valid = 0 < self.stage_epochs < math.inf
        _require("sparsity", self, "stage_epochs", valid, "greater than 0")
        given = (self.last_strength is not None) == (self.stages > 1)
        allowed = "given with sparsity.stages over 1, and null with 1"
        _require("sparsity", self, "last_strength", given, allowed)
        self.strengths()

    def strengths(self) -> list[float]:
        """λ of each stage."""
        last = self.strength if self.last_strength is None else self.last_strength
        try:
            return schedule(self.strength, last, self.stages, self.kind)
        except ValueError as error:
            raise ValueError(f"sparsity: {error}") from None
