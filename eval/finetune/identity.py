"""What a run must have been begun with to be gone on with, or for its result to stand."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import TextTokenizer
from eval.finetune.attach import start_mark
from eval.finetune.backbones import Backbone, load_backbone
from eval.finetune.config import TuneConfig
from eval.finetune.reading import Example, Splits
from eval.finetune.tasks import Task
from eval.finetune.texts import Encoded, Encoder
from eval.models import HUGGING_FACE
from model.delta.files import fingerprint
from training import checkpoint

# Of `tuning`, what a run that goes on may have otherwise.
MAY_CHANGE = ("log_every", "checkpoint_every", "eval_batch_size", "micro_batch_size")

# Of a configuration of transformers, what says where it is from.
_OF_NO_EFFECT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")

Rows = Mapping[str, Sequence[Encoded]]


@dataclasses.dataclass(frozen=True)
class Mark:
    """What tells a backbone from others: sums of its weights and of its configuration."""

    weights: str
    config: str


def mark_of(backbone: Backbone, with_head: bool) -> Mark:
    """A backbone's, without its output head where the task has another."""
    module: Any = backbone.module
    config = dataclasses.asdict(module.config) if backbone.ours else module.config.to_dict()
    fields = {key: value for key, value in config.items() if key not in _OF_NO_EFFECT}
    text = json.dumps(fields, sort_keys=True, default=str)
    weights = fingerprint(module, [] if with_head else [backbone.head_name])
    return Mark(weights, hashlib.sha256(text.encode()).hexdigest())


def encoded(encoder: Encoder, task: Task, splits: Splits) -> dict[str, list[Encoded]]:
    """train, val and test as ids, as the splits are ordered."""
    encode = encoder.encode_answer if task.kind == "lm" else encoder.encode
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {split: [encode(one) for one in part] for split, part in parts.items()}


def identity_of(
    config: TuneConfig, task: Task, seed: int, mark: Mark, splits: Splits, rows: Rows
) -> dict[str, Any]:
    """JSON values that must be the same. rows: the splits as the backbone's tokenizer has them."""
    tuning = dataclasses.asdict(config.tuning_of(task.name))
    found = {
        "task": dataclasses.asdict(task),
        "seed": seed,
        "delta": config.delta,
        "start": start_mark(config.start),
        "freeze_delta": config.freeze_delta or None,  # none is what older runs have
        "tuning": {key: value for key, value in tuning.items() if key not in MAY_CHANGE},
        "texts": dataclasses.asdict(config.texts),
        "sparsity": dataclasses.asdict(config.sparsity),
        "backbone_fingerprint": mark.weights,
        "backbone_config_sha256": mark.config,
        "data_sha256": {
            split: _digest(getattr(splits, split), part) for split, part in rows.items()
        },
    }
    same: dict[str, Any] = json.loads(json.dumps(found))  # tuples as JSON has them
    return same


def _digest(examples: Sequence[Example], rows: Sequence[Encoded]) -> str:
    """Of texts too: an answer is generated behind more of its prompt than it is trained on."""
    digest = hashlib.sha256()
    for example, row in zip(examples, rows, strict=True):
        digest.update(json.dumps([example.texts, row.ids, row.label, row.answer]).encode())
    return digest.hexdigest()


def identity_now(config: TuneConfig, task: Task, splits: Splits, seed: int) -> dict[str, Any]:
    """The identity that a run would have if it began now; the backbone is read once a process."""
    known = _known(config.backbone, task.kind == "lm", _stamp(config.backbone))
    encoder = Encoder(known.tokenizer, config.texts, known.max_seq_len, config.soft_tokens())
    return identity_of(config, task, seed, known.mark, splits, encoded(encoder, task, splits))


@dataclasses.dataclass(frozen=True)
class _Known:
    mark: Mark
    tokenizer: TextTokenizer
    max_seq_len: int


@lru_cache(maxsize=8)
def _known(name: str, with_head: bool, _: tuple[Any, ...]) -> _Known:
    backbone = load_backbone(name, torch.device("cpu"))
    return _Known(mark_of(backbone, with_head), backbone.tokenizer, backbone.max_seq_len)


def _stamp(name: str) -> tuple[Any, ...]:
    """Changes where the files of a backbone do."""
    if name.startswith(HUGGING_FACE):
        folder = Path(name.removeprefix(HUGGING_FACE))
    else:
        folder = checkpoint.resolve(Path(name))
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    times = [(path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    return str(folder.resolve()), *times
