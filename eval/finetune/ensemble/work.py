"""One held-out task with one seed: heads on the sources, scores, starts, and their tuning.

RUN/source-OTHER/head/TASK/seed-N   a head on the delta of another task, which stays as it is
RUN/START/head/TASK/seed-N          a head on a start, which stays as it is
RUN/START/tuned/TASK/seed-N         delta and head, from there on
RUN/starts/TASK/seed-N              scores.json, and the deltas to begin from
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.finetune import state
from eval.finetune.backbones import load_backbone
from eval.finetune.config import TuneConfig
from eval.finetune.ensemble.config import BEST, EXACT, FRESH, HEAD, SCORES, TUNED, EnsembleConfig
from eval.finetune.ensemble.scores import TARGET, Probes, scores_of
from eval.finetune.ensemble.sources import Source
from eval.finetune.ensemble.starts import all_weights, start
from eval.finetune.results import RESULT
from eval.finetune.run import run_one
from eval.finetune.setup import read_task
from eval.finetune.texts import Batch, Encoder, collate
from model.delta.ensemble import HIGHER_IS_BETTER
from model.delta.files import fingerprint, load_delta, save_delta
from training.run_dir import write_json
from training.signals import StopSignal


@dataclass
class Work:
    """What is done for one held-out task and one seed. sources: of the other tasks."""

    config: EnsembleConfig
    held_out: Source
    sources: dict[str, Source]
    seed: int

    @property
    def task(self) -> str:
        """The new task."""
        return self.held_out.task

    @property
    def folder(self) -> Path:
        """Of scores and starts."""
        return self.config.root / "starts" / self.task / f"seed-{self.seed}"

    def run(self, arm: str, phase: str) -> TuneConfig:
        """A run of an arm, which is a start or source-TASK."""
        if phase == TUNED:
            begin: Path | None = self.trained(f"source-{self.best()}" if arm == BEST else arm, HEAD)
        elif arm.startswith("source-"):
            begin = self.sources[arm.removeprefix("source-")].delta
        else:
            begin = None if arm == FRESH else self.folder / arm
        return self.config.run(self.held_out.config, self.task, self.seed, arm, phase, begin)

    def trained(self, arm: str, phase: str) -> Path:
        """The delta, with its head, that a run leaves."""
        return self.result_folder(arm, phase) / "best" / "delta"

    def result_folder(self, arm: str, phase: str) -> Path:
        """Of a run."""
        return self.config.root / arm / phase / self.task / f"seed-{self.seed}"

    def scores(self) -> dict[str, Any]:
        """What scores.json says: scores and weights of the sources."""
        found: dict[str, Any] = json.loads((self.folder / "scores.json").read_text())
        return found

    def best(self) -> str:
        """The source with the lowest loss."""
        return str(self.scores()["best"])

    def planned(self) -> list[tuple[str, str]]:
        """Arms and phases in the order in which they run. kl needs the fresh LoRA, tuned."""
        found = [(FRESH, HEAD), (FRESH, TUNED)]
        if set(self.config.starts) == {FRESH}:
            return found
        found += [(f"source-{name}", HEAD) for name in self.sources]
        for arm in self.config.starts:
            if arm != FRESH:
                found += [(arm, HEAD)] if arm != BEST else []
                found += [(arm, TUNED)]
        return found

    def left(self) -> int:
        """Runs that have no result yet."""
        return sum(not (self.result_folder(*one) / RESULT).exists() for one in self.planned())


def do(work: Work, device: torch.device, stop: StopSignal) -> bool:
    """All runs of a task and seed that are left; False after a signal."""
    scored = False
    for arm, phase in work.planned():
        if not scored and arm != FRESH and not arm.startswith("source-"):
            make_starts(work, device)
            scored = True
        if not run_one(work.run(arm, phase), work.task, work.seed, device, stop):
            return False
    return True


def make_starts(work: Work, device: torch.device) -> None:
    """Scores the sources and writes the starts, unless they are there. InputError where they are
    of other sources, or of other settings.
    """
    identity = {
        "sources": {name: one.mark for name, one in work.sources.items()},
        "temperature": work.config.temperature,
        "train_examples": work.config.train_examples,
        "batch_size": work.config.batch_size,
    }
    path = work.folder / "scores.json"
    if path.exists():
        state.require_same(path, work.scores()["identity"], identity)
    else:
        work.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, scored(work, device) | {"identity": identity})
    wanted = [one for one in work.config.starts if one not in (FRESH, BEST)]
    wanted = [one for one in wanted if not (work.folder / one).exists()]
    if wanted:
        write_starts(work, wanted, device)


def scored(work: Work, device: torch.device) -> dict[str, Any]:
    """Scores and weights of the sources on the training examples."""
    config = work.run(FRESH, TUNED)
    task, splits = read_task(config, work.task)
    backbone = load_backbone(config.backbone, device)
    encoder = Encoder(backbone.tokenizer, config.texts, backbone.max_seq_len)
    folders = {name: work.trained(f"source-{name}", HEAD) for name in work.sources}
    probes = Probes(backbone, task, folders | {TARGET: work.trained(FRESH, TUNED)})
    rows = [encoder.encode(one) for one in splits.train]
    size = work.config.batch_size
    batches: list[Batch] = [
        collate(rows[first : first + size], device) for first in range(0, len(rows), size)
    ]
    scores = scores_of(probes, list(work.sources), batches, SCORES)
    by_loss = scores["loss"]
    return {
        "task": work.task,
        "examples": len(rows),
        "scores": scores,
        "higher_is_better": HIGHER_IS_BETTER,
        "weights": all_weights(scores, list(work.sources), work.config.temperature),
        "best": min(by_loss, key=by_loss.__getitem__),
    }


def write_starts(work: Work, wanted: list[str], device: torch.device) -> None:
    """Deltas to begin from, each as a folder, of the weights in scores.json."""
    backbone = load_backbone(work.held_out.config.backbone, device)
    backbone.without_head()
    weights = work.scores()["weights"]
    parts = {
        name: load_delta(source.delta, backbone.module).delta
        for name, source in work.sources.items()
    }
    mark = fingerprint(backbone.module, [backbone.head_name])
    for kind in wanted:
        by = weights[kind.removeprefix(EXACT)]
        save_delta(
            start(kind, parts, by),
            work.folder / kind,
            mark,
            trained=[backbone.head_name],
            about={"start": kind, "weights": by},  # of no task: its runs take a head of their own
        )
