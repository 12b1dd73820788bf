"""EnsembleConfig: what python -m eval.finetune.ensemble is told."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from eval.finetune.config import TuneConfig
from model.delta.ensemble import HIGHER_IS_BETTER

SCORES = tuple(HIGHER_IS_BETTER)
WEIGHTS = ("equal", *SCORES)
EXACT = "exact_"
FRESH, BEST = "fresh", "best"
STARTS = (FRESH, *WEIGHTS, *(EXACT + one for one in WEIGHTS), BEST)
DEFAULT_STARTS = (FRESH, *WEIGHTS, "exact_equal", "exact_loss", BEST)
HEAD, TUNED = "head", "tuned"  # the two runs of a start


@dataclass
class EnsembleConfig:
    """Begins each task's tuning from the deltas of the other tasks.

    Attributes:
        sources: Run directories of eval.finetune, of one backbone and one LoRA.
        output: A JSON file for the result; the table goes beside it, as .md.
        run_dir: Where the new runs go: START/head/ and START/tuned/ in it; null: the folder that is
            called as `output` is, without .json.
        tasks: Tasks to hold out, each in turn; empty: all that the sources have.
        seeds: Each start is trained once with each.
        source_seed: The seed of the runs that are the sources; null: the first one of each task.
        starts: What to begin from: fresh, equal, the scores (loss, kl, el2n, cosine, grand), all of
            these but fresh after exact_, and best.
        temperature: Of the softmax over scores.
        train_examples: Examples of the new task to score and train on.
        eval_examples: Examples of val and test to score the result on at most; null: all.
        head_steps: Optimizer steps of the head alone.
        steps: Optimizer steps of the delta and the head, after those.
        batch_size: Examples in one step.
        learning_rate: Peak of both schedules; null: that of the source's run.
        flops_per_second: What this machine reaches, from which --list predicts seconds.
        seconds_a_run: What a run takes beside its FLOPs, for --list.
    """

    sources: list[str]
    output: str
    run_dir: str | None = None
    tasks: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    source_seed: int | None = None
    starts: list[str] = field(default_factory=lambda: list(DEFAULT_STARTS))
    temperature: float = 0.1
    train_examples: int = 128
    eval_examples: int | None = None
    head_steps: int = 20
    steps: int = 20
    batch_size: int = 16
    learning_rate: float | None = None
    flops_per_second: float = 1.4e10
    seconds_a_run: float = 0.5

    def __post_init__(self) -> None:
        if Path(self.output).suffix != ".json":
            raise ValueError(f"output: {self.output}; allowed is a name that ends with .json")
        for name in ("sources", "seeds", "starts"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name}: {given}; allowed is at least one, each once")
        for one in self.starts:
            if one not in STARTS:
                raise ValueError(f"starts: {one!r}; allowed are {', '.join(STARTS)}")
        for name in ("train_examples", "head_steps", "steps", "batch_size", "eval_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}; it must be at least 1")
        for name in ("temperature", "flops_per_second", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value}; it must be over 0")

    @property
    def root(self) -> Path:
        """Where the new runs go."""
        return Path(self.run_dir) if self.run_dir else Path(self.output).with_suffix("")

    def run(
        self, base: TuneConfig, task: str, seed: int, arm: str, phase: str, start: Path | None
    ) -> TuneConfig:
        """A run of a held-out task, which `base` is the configuration of. phase: HEAD (the delta
        is frozen) or TUNED. start: the delta's folder; None: a new one.
        """
        steps = self.head_steps if phase == HEAD else self.steps
        known = base.tuning_of(task)
        tuning = dataclasses.replace(
            known,
            learning_rate=self.learning_rate or known.learning_rate,
            batch_size=self.batch_size,
            micro_batch_size=None,
            max_steps=steps,
            epochs=float(steps * self.batch_size),  # over any number of examples: steps decide
            evals_per_epoch=0,
            patience=None,
            train_examples=self.train_examples,
            eval_examples=self.eval_examples,
            log_every=steps,
            checkpoint_every=0,
        )
        return dataclasses.replace(
            base,
            run_dir=str(self.root / arm / phase),
            tasks=[task],
            seeds=[seed],
            tuning=tuning,
            overrides={},
            start=None if start is None else str(start),
            freeze_delta=phase == HEAD,
        )
