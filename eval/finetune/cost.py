"""FLOPs of a run, predicted from its tokens and the backbone's forward pass."""

from dataclasses import dataclass
from pathlib import Path

from data.errors import InputError
from eval.finetune.config import TuneConfig
from eval.finetune.setup import read_task, stage_schedule
from eval.finetune.texts import Encoder
from eval.models import HUGGING_FACE
from model import ModelConfig
from training import checkpoint

# Passes of the forward pass's cost: forward alone, with gradients of activations, of weights too.
PASSES = {"head": 1, "full": 3}
OF_DELTAS = 2


@dataclass(frozen=True)
class Cost:
    """Of one run: optimizer steps, tokens trained and scored (padding left out), FLOPs."""

    steps: int
    tokens: int
    scored: int
    flops: float


@dataclass(frozen=True)
class Lengths:
    """Ids of each example of a task, and the shape of the backbone that reads them."""

    model: ModelConfig
    train: list[int]
    val: list[int]
    test: list[int]


def lengths_of(config: TuneConfig, name: str) -> Lengths:
    """Reads a task. InputError for backbones that are not ours, whose FLOPs are not known."""
    if config.backbone.startswith(HUGGING_FACE):
        raise InputError(f"backbone: {config.backbone}; FLOPs are predicted for ours alone")
    folder = checkpoint.resolve(Path(config.backbone))
    tokenizer = checkpoint.load_tokenizer(folder)
    model = ModelConfig.from_json(folder / "model.json")
    task, splits = read_task(config, name)
    encoder = Encoder(tokenizer, config.texts, model.max_seq_len, config.soft_tokens())
    encode = encoder.encode_answer if task.kind == "lm" else encoder.encode
    sizes = [
        [len(encode(one).ids) for one in part] for part in (splits.train, splits.val, splits.test)
    ]
    return Lengths(model, *sizes)


def cost_of(config: TuneConfig, task: str, lengths: Lengths) -> Cost:
    """Training: 1, 2 or 3 forward passes a token (head; delta, whose own products are left out;
    all). Validations and test: 1. The backbone's output head is not computed, and not counted.
    """
    tuning = config.tuning_of(task)
    train = lengths.train
    steps = tokens = scored = 0
    for stage in range(config.sparsity.stages):
        these = stage_schedule(config, tuning, len(train), stage, 0).max_steps
        steps += these
        passes_over = these * tuning.batch_size / len(train)
        tokens += round(passes_over * sum(train))
        scored += max(1, round(passes_over * tuning.evals_per_epoch)) * sum(lengths.val)
    scored += sum(lengths.test)
    forward = flops_a_token(lengths)
    method = "head" if config.freeze_delta else config.delta["method"]
    passes = PASSES.get(method, OF_DELTAS)
    return Cost(steps, tokens, scored, forward * (passes * tokens + scored))


def flops_a_token(lengths: Lengths) -> float:
    """Of a forward pass over texts of the mean length, without the output head."""
    model, train = lengths.model, lengths.train
    mean = max(1, round(sum(train) / len(train)))
    return float(model.flops_per_token(mean) - 2 * model.hidden_size * model.vocab_size)
