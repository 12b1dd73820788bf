"""The checkpoint that is exported, and what its run directory says of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from data.errors import InputError
from data.tokenizer import Tokenizer
from model import ModelConfig, Transformer
from training import checkpoint


@dataclass
class Source:
    """A checkpoint.

    Attributes:
        folder: Where it is.
        config: Its model.json.
        state: Its checkpoint.json.
        tokenizer: That of its data.
    """

    folder: Path
    config: ModelConfig
    state: dict[str, Any]
    tokenizer: Tokenizer

    def model(self) -> Transformer:
        """The model in float32 on the CPU. InputError where its files are not those written."""
        return checkpoint.load_model(self.folder, torch.device("cpu"), torch.float32)

    @property
    def padded_ids(self) -> list[int]:
        """Ids of the model that its tokenizer does not have."""
        return list(range(self.tokenizer.vocab_size, self.config.vocab_size))


def open_source(name: str) -> Source:
    """A run directory's newest checkpoint, or a checkpoint's folder, before its weights are read.
    InputError where it is incomplete or damaged.
    """
    folder = checkpoint.resolve(Path(name))
    state = checkpoint.read_state(folder)
    try:
        config = ModelConfig.from_json(folder / "model.json")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a readable checkpoint ({error})") from None
    tokenizer = checkpoint.load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}"
        )
    return Source(folder, config, state, tokenizer)


def run_facts(source: Source) -> dict[str, Any]:
    """What the run directory around a checkpoint says: data (the prepared folder's name),
    git_commit, git_dirty, and final: the scores of final.json, if they are this checkpoint's. What
    is not known is left out.
    """
    run = source.folder.resolve().parent.parent
    if source.folder.resolve().parent.name != "checkpoints" or not (run / "config.yaml").is_file():
        return {}
    config, environment = _read(run / "config.yaml"), _read(run / "environment.json")
    facts: dict[str, Any] = {}
    path = (config.get("data") or {}).get("path")
    if isinstance(path, str):
        facts["data"] = Path(path).name
    if environment.get("git_commit"):
        facts["git_commit"] = environment["git_commit"]
        facts["git_dirty"] = bool(environment.get("git_dirty"))
    status = _read(run / "status.json")
    if (status.get("state"), status.get("step")) == ("completed", source.state.get("step")):
        facts["final"] = _read(run / "final.json")
    return {name: value for name, value in facts.items() if value not in (None, {})}


def _read(path: Path) -> dict[str, Any]:
    """A JSON or YAML file; empty where there is none that can be read."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
