"""Everything that a run of one task and one seed works with, built and resumed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from eval.finetune import state
from eval.finetune.attach import attach, parameter_counts
from eval.finetune.backbones import load_backbone
from eval.finetune.blocks import TuningConfig
from eval.finetune.config import TuneConfig
from eval.finetune.engine import TuneEngine
from eval.finetune.heads import TaskModel
from eval.finetune.identity import encoded, identity_of, mark_of
from eval.finetune.progress import Progress
from eval.finetune.reading import Example, Splits, permutation, read_splits
from eval.finetune.tasks import Task, find_task
from eval.finetune.texts import Encoded, Encoder, TrainingOrder
from model.delta.methods.lora import LoraLayer
from training import distributed, hardware, run_dir
from training.clock import StepClock
from training.config import TrainingConfig
from training.metrics import Metrics


@dataclass
class Job:
    """One task, one seed. rows: train, val and test as ids, as the splits are ordered."""

    config: TuneConfig
    tuning: TuningConfig
    task: Task
    seed: int
    folder: Path
    splits: Splits
    rows: dict[str, list[Encoded]]
    encoder: Encoder
    engine: TuneEngine
    metrics: Metrics
    clock: StepClock
    progress: Progress
    identity: dict[str, Any]
    fingerprint: str
    counts: dict[str, int]
    first_ranks: dict[str, int]

    @property
    def strengths(self) -> list[float]:
        """λ by stage; a single 0 where there are no gates."""
        return self.config.sparsity.strengths()

    def order(self) -> TrainingOrder:
        """Of the training examples."""
        group = self.tuning.batch_size if self.tuning.group_by_length else None
        return TrainingOrder(self.rows["train"], self.seed, group)

    def schedule(self, stage: int) -> TrainingConfig:
        """Of a stage, with its number of steps."""
        return stage_schedule(self.config, self.tuning, len(self.splits.train), stage, self.seed)


def stage_schedule(
    config: TuneConfig, tuning: TuningConfig, examples: int, stage: int, seed: int
) -> TrainingConfig:
    """The learning rate and the steps of a stage: each has a schedule of its own."""
    epochs = config.sparsity.stage_epochs if stage else None
    steps = tuning.steps(examples, epochs)
    return tuning.schedule(steps, seed, config.texts.max_length)


def limited(splits: Splits, tuning: TuningConfig) -> Splits:
    """The examples that `tuning` leaves, the same for all seeds."""

    def some(examples: list[Example], most: int | None) -> list[Example]:
        if most is None or most >= len(examples):
            return examples
        return [examples[i] for i in permutation(len(examples))[:most]]

    return Splits(
        some(splits.train, tuning.train_examples),
        some(splits.val, tuning.eval_examples),
        some(splits.test, tuning.eval_examples),
    )


def standardised(splits: Splits) -> Splits:
    """Numbers less the mean of the training split, by its deviation: the head has no bias, and
    correlations do not change.
    """
    values = torch.tensor([float(one.label) for one in splits.train], dtype=torch.float64)
    mean, deviation = float(values.mean()), float(values.std(correction=0)) or 1.0

    def changed(examples: list[Example]) -> list[Example]:
        return [Example(one.texts, (float(one.label) - mean) / deviation) for one in examples]

    return Splits(changed(splits.train), changed(splits.val), changed(splits.test))


def read_task(config: TuneConfig, name: str) -> tuple[Task, Splits]:
    """A task and its examples. InputError where either is wrong."""
    try:
        task = find_task(name, config.define)
    except ValueError as error:
        raise InputError(str(error)) from None
    splits = limited(read_splits(task, config.data), config.tuning_of(name))
    return task, standardised(splits) if task.kind == "regression" else splits


def setup(config: TuneConfig, name: str, seed: int, device: torch.device) -> Job:
    """Builds a run, or takes it up from its newest checkpoint. Every rank calls it."""
    folder, first = config.folder(name, seed), distributed.rank() == 0
    task, splits = read_task(config, name)
    tuning = config.tuning_of(name)
    if task.kind == "lm" and config.deepspeed.zero_stage == 3:
        raise InputError(f"deepspeed.zero_stage: 3, but {name} generates text; allowed are 0 to 2")
    backbone = load_backbone(config.backbone, device)
    taken = config.soft_tokens()
    encoder = Encoder(backbone.tokenizer, config.texts, backbone.max_seq_len, taken)
    if task.kind == "lm":
        encoder.prompt_room(task.max_new_tokens)
    rows = encoded(encoder, task, splits)
    mark = mark_of(backbone, with_head=task.kind == "lm")
    model = TaskModel(backbone, task, seed)
    identity = identity_of(config, task, seed, mark, splits, rows)
    found = state.newest(folder, identity) if first else None
    found = distributed.from_rank_0(found)
    progress = Progress.of(found[1]) if found is not None else Progress()
    steps = stage_schedule(config, tuning, len(splits.train), 0, seed).max_steps
    attach(model, config.delta, seed, steps, config.start, config.freeze_delta)
    ranks, counts = _ranks(model), parameter_counts(model)
    if progress.delta is not None and progress.delta != config.delta:
        if model.deltas is not None:
            model.deltas.detach()  # its hooks would go on acting beside those of the pruned one
        model.deltas = None
        attach(model, progress.delta, seed, steps, pruned=True)
    schedule = stage_schedule(config, tuning, len(splits.train), progress.stage, seed)
    schedule.accumulation(distributed.world_size())  # refuses a batch that does not divide
    l1, gates = config.sparsity.l1, sum(ranks.values())
    engine = TuneEngine(model, tuning, schedule, config.deepspeed, device, l1, gates)
    engine.begin_stage(schedule, progress.stage_start)
    if found is not None:
        state.load(engine, *found)
        engine.skipped_before = progress.skipped
    if first:
        (folder / "config.yaml").write_text(config.to_yaml())
        run_dir.write_json(folder / "environment.json", run_dir.environment(device))
    log = run_dir.logger(folder if first else None)
    stages = range(config.sparsity.stages)
    every = [stage_schedule(config, tuning, len(splits.train), at, seed) for at in stages]
    total = sum(one.max_steps for one in every)
    metrics = Metrics(folder if first else None, log, progress.step, total)
    job = Job(
        config, tuning, task, seed, folder, splits, rows, encoder, engine, metrics,
        StepClock(device, 0), progress, identity, mark.weights, counts, ranks,
    )  # fmt: skip
    say_what_runs(job, found[0] if found is not None else None)
    return job


def _ranks(model: TaskModel) -> dict[str, int]:
    """First rank of each target of a LoRA or SoRA."""
    if model.delta is None:
        return {}
    named = model.delta.named_layers()
    return {name: one.rank for name, one in named if isinstance(one, LoraLayer)}


def say_what_runs(job: Job, resumed: Path | None) -> None:
    """The first lines of the log."""
    say, counts = job.metrics.say, job.counts
    sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in job.rows.items())
    say(
        f"{job.task.name}, seed {job.seed}: {job.config.delta['method']} trains "
        f"{counts['total']:,} parameters ({counts['delta']:,} delta, {counts['head']:,} head, "
        f"{counts['backbone']:,} backbone); {sizes}; {hardware.device_name(job.engine.device)}, "
        f"ZeRO stage {job.config.deepspeed.zero_stage}, {distributed.world_size()} ranks"
    )
    longest = job.encoder.max_length
    cut = sum(len(row.ids) == longest for row in job.rows["train"])
    if cut:
        say(f"{cut:,} training examples have texts.max_length {longest} tokens, most of them cut")
    say(f"resumed from {resumed}" if resumed else "starting from the pre-trained weights")
