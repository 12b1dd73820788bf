"""How far a run is: all that its checkpoint holds beside tensors."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """JSON values alone.

    Attributes:
        step: Optimizer steps done.
        stage: The stage that is being trained (0 unless there is a sparsifying schedule).
        stage_start: Its first step.
        best: Of the stage, the best value of the task's first metric on val; null: none yet.
        best_step: Where that was.
        best_scores: All metrics on val there.
        without_better: Validations since.
        validations: Every one: its step, stage and metrics.
        stages: What came of the stages that are over.
        delta: The delta's configuration, which pruning changes.
        seconds: Of training, without validations and saves.
        cpu_seconds: The same as CPU time of this rank's process, all threads.
        tokens: Real tokens that were trained on, padding left out.
        skipped: Steps that were left out because they were not finite.
    """

    step: int = 0
    stage: int = 0
    stage_start: int = 0
    best: float | None = None
    best_step: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)
    without_better: int = 0
    validations: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    delta: dict[str, Any] | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For checkpoint.json."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """What checkpoint.json says."""
        known = {one.name for one in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in state.items() if key in known})

    def score(self, scores: dict[str, float], metric: str) -> bool:
        """Takes note of a validation; whether it is the stage's best."""
        value = scores[metric]
        if self.best is not None and not value > self.best:
            self.without_better += 1
            return False
        self.best, self.best_step, self.best_scores = value, self.step, scores
        self.without_better = 0
        return True

    def next_stage(self, row: dict[str, Any]) -> None:
        """A stage is over."""
        self.stages.append(row)
        self.stage += 1
        self.stage_start = self.step
        self.best, self.best_scores, self.without_better = None, {}, 0
