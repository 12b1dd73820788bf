"""What makes a comparison unequal, or less than it seems: the warnings of the page."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from eval.compare.arms import Arms, Subject, counts, planned_tokens, subjects, tokenizers_differ
from eval.compare.runs import settings
from eval.compare.sweep import Trial, optimum

# What the page says it looked at, where it found nothing to warn of.
CHECKS = (
    "data and tokenizer (by sha256)",
    "tokens",
    "batch",
    "sequence length",
    "shape of the schedule",
    "optimizer",
    "precision",
    "execution",
    "evaluation",
    "hardware",
    "ranks",
    "versions",
    "commit",
    "seeds",
    "unfinished and diverged runs",
    "sweeps of the learning rate",
)
# Settings outside of `model` that have a check of their own, or belong to an arm's method.
_ELSEWHERE = {
    "data.path", "training.max_steps", "training.schedule", "training.warmup_steps",
    "training.decay_steps", "training.learning_rate", "training.min_learning_rate",
    "training.factor_decay", "training.lr_multiplier_A", "training.lr_multiplier_B",
}  # fmt: skip
_KINDS = {
    "training.global_batch_size": "batch",
    "training.seq_len": "sequence_length",
    "training.precision": "precision",
    "training.micro_batch_size": "execution",
    "training.validation_tokens": "evaluation",
    "data.final_split": "evaluation",
    "model.document_start_id": "evaluation",
    "model.vocab_size": "evaluation",
    "model.dropout": "optimizer",
}
_KIND_OF_BLOCK = {
    "training": "optimizer",
    "distillation": "optimizer",
    "execution": "execution",
    "deepspeed": "execution",
}


class PageWarning(NamedTuple):
    """One reason to doubt: its kind, for tests and programs, and a sentence."""

    kind: str
    text: str


def find_warnings(
    arms: Arms, sweeps: Mapping[str, Sequence[Trial]], source: str
) -> list[PageWarning]:
    """All of them, the gravest first. `source` is where the compared scores are from: "final" or
    "validation".
    """
    every = subjects(arms)
    return [
        *_data(every),
        *_run_states(every),
        *_score_source(every, source),
        *_seeds(arms),
        *_settings(every),
        *_learning_rates(arms, sweeps),
        *_surroundings(every),
    ]


def _differing(
    every: Sequence[Subject], kind: str, what: str, of: Callable[[Subject], Any]
) -> Iterator[PageWarning]:
    """A warning where `of` is not the same for all, with who has which value."""
    found: dict[str, list[Subject]] = {}
    for subject in every:
        found.setdefault(str(of(subject)), []).append(subject)
    if len(found) > 1:
        parts = "; ".join(f"{value} ({_who(some, every)})" for value, some in found.items())
        yield PageWarning(kind, f"{what} is not the same: {parts}.")


def _who(some: Sequence[Subject], every: Sequence[Subject]) -> str:
    """Arms, and of arms that are not whole the runs."""
    parts = []
    for arm in dict.fromkeys(subject.arm for subject in some):
        names = [subject.name for subject in some if subject.arm == arm]
        whole = len(names) == sum(subject.arm == arm for subject in every)
        parts.append(arm if whole else ", ".join(names))
    return ", ".join(parts)


def _data(every: Sequence[Subject]) -> Iterator[PageWarning]:
    known = [subject for subject in every if subject.run.data_sha256 is not None]
    yield from _differing(
        known,
        "tokenizer",
        "The tokenizer (sha256)",
        lambda one: (one.run.tokenizer_sha256 or "unknown")[:12],
    )
    yield from _differing(
        known, "data", "The training data (sha256)", lambda one: str(one.run.data_sha256)[:12]
    )
    if tokenizers_differ({"": [subject.run for subject in every]}):
        yield PageWarning(
            "bits_only",
            "A token is not the same text in every arm, so losses per token are left out: bits per "
            "byte are compared, and curves are drawn against FLOPs and seconds alone.",
        )
    unknown = [subject for subject in every if subject.run.data_sha256 is None]
    if unknown:
        folders = sorted({str(settings(one.run)["data.path"]) for one in every})
        yield PageWarning(
            "data_unknown",
            f"Without a checkpoint the data and the tokenizer of {_who(unknown, every)} are known "
            f"by the name of their folder alone ({', '.join(folders)}): they may differ.",
        )
    scored = [subject for subject in every if subject.run.final is not None]
    if not tokenizers_differ({"": [subject.run for subject in every]}):
        yield from _differing(
            scored,
            "evaluation",
            "The scored split",
            lambda one: _scored(one.run.final or {}),
        )


def _scored(final: Mapping[str, Any]) -> str:
    return f"{final.get('split')}, {final.get('tokens')} tokens"


def _run_states(every: Sequence[Subject]) -> Iterator[PageWarning]:
    for subject in every:
        run, steps = subject.run, subject.run.config.training.max_steps
        if run.diverged:
            yield PageWarning(
                "diverged",
                f"{subject.name} diverged (step {run.steps[-1]:,} of {steps:,}). It is in no mean "
                f"of {subject.arm}, which flatters that arm.",
            )
        elif not run.completed:
            yield PageWarning(
                "unfinished",
                f"{subject.name} is unfinished ({run.status['state']}, step {run.steps[-1]:,} of "
                f"{steps:,}). It is in no mean of {subject.arm}.",
            )
    for arm in dict.fromkeys(subject.arm for subject in every):
        if not any(subject.arm == arm and counts(subject.run) for subject in every):
            yield PageWarning("no_score", f"{arm} has no run that counts, and so no score.")


def _score_source(every: Sequence[Subject], source: str) -> Iterator[PageWarning]:
    lacking = [one for one in every if counts(one.run) and one.run.final is None]
    if source == "validation":
        whose = f" of {_who(lacking, every)}" if lacking else " in bits per byte"
        yield PageWarning(
            "final_absent",
            f"The final score{whose} is absent, so the last validation of every run is compared "
            "instead. It is of validation_tokens tokens of the validation split, on which choices "
            "may have been made.",
        )
        unscored = [o for o in every if counts(o.run) and o.run.last_validation_loss is None]
        if unscored:
            yield PageWarning(
                "no_score", f"{_who(unscored, every)} has neither a final score nor a validation."
            )


def _seeds(arms: Arms) -> Iterator[PageWarning]:
    seeds = {arm: {run.seed for run in runs if counts(run)} for arm, runs in arms.items()}
    few = [arm for arm, found in seeds.items() if len(found) == 1]
    if few:
        yield PageWarning(
            "one_seed",
            f"One seed only: {', '.join(few)}. Nothing says how much of a difference is chance.",
        )
    if len({frozenset(found) for found in seeds.values()}) > 1:
        parts = (f"{arm}: {', '.join(map(str, sorted(n))) or 'none'}" for arm, n in seeds.items())
        yield PageWarning(
            "seeds",
            f"The arms do not have the same seeds ({'; '.join(parts)}). Means are over all of an "
            "arm, differences over those that the baseline has too.",
        )


def _settings(every: Sequence[Subject]) -> Iterator[PageWarning]:
    yield from _differing(every, "tokens", "The number of training tokens", _planned_tokens)
    yield from _differing(every, "schedule", "The shape of the learning rate's schedule", _schedule)
    found = {id(subject.run): settings(subject.run) for subject in every}
    for key in dict.fromkeys(key for one in found.values() for key in one):
        block = key.partition(".")[0]
        kind = _KINDS.get(key) or _KIND_OF_BLOCK.get(block)
        if kind is not None and key not in _ELSEWHERE:
            values = {name: one[key] for name, one in found.items()}
            yield from _differing(every, kind, key, _looked_up(values))


def _looked_up(values: Mapping[int, Any]) -> Callable[[Subject], Any]:
    """A value by the identity of a run."""
    return lambda subject: values[id(subject.run)]


def _planned_tokens(subject: Subject) -> str:
    return f"{planned_tokens(subject.run):,}"


def _schedule(subject: Subject) -> str:
    training = subject.run.config.training
    share = training.min_learning_rate / training.learning_rate
    shape = f"{training.schedule}, {training.warmup_steps} steps of warm-up, ends at {share:.4g}"
    decay = f", decays over {training.decay_steps} steps" if training.schedule == "wsd" else ""
    return f"{shape} of the peak{decay}"


def _learning_rates(arms: Arms, sweeps: Mapping[str, Sequence[Trial]]) -> Iterator[PageWarning]:
    untuned = [arm for arm in arms if not sweeps.get(arm)]
    if untuned:
        yield PageWarning(
            "lr_not_tuned",
            f"No sweep of the learning rate is given for {', '.join(untuned)}: another rate may "
            "change the order of the arms.",
        )
    for arm in [arm for arm in arms if arm not in untuned]:
        best = optimum(sweeps[arm])
        used = arms[arm][0].config.training.learning_rate
        if not best.interior:
            yield PageWarning(
                "lr_not_interior",
                f"The best learning rate of {arm}, {best.trial.learning_rate:g}, is not inside of "
                f"its sweep ({best.reason}): a better one may lie beyond.",
            )
        if not math.isclose(used, best.trial.learning_rate):
            yield PageWarning(
                "lr_not_best",
                f"{arm} was trained with the learning rate {used:g}; the best of its sweep is "
                f"{best.trial.learning_rate:g}.",
            )


def _surroundings(every: Sequence[Subject]) -> Iterator[PageWarning]:
    """Hardware, ranks, versions and code."""

    def environment(key: str) -> Callable[[Subject], Any]:
        return lambda subject: subject.run.environment.get(key)

    yield from _differing(every, "hardware", "The device", environment("device"))
    yield from _differing(every, "hardware", "The number of cores", environment("cpu_count"))
    yield from _differing(every, "hardware", "The number of threads", environment("threads"))
    yield from _differing(every, "world_size", "The number of ranks", environment("world_size"))
    versions = {id(one.run): one.run.environment.get("packages") or {} for one in every}
    for package in sorted({name for found in versions.values() for name in found}):
        installed = {run: found.get(package) for run, found in versions.items()}
        what = f"The version of {package}"
        yield from _differing(every, "packages", what, _looked_up(installed))
    for key in ("python", "cuda"):
        yield from _differing(every, "packages", f"The version of {key}", environment(key))
    commit = environment("git_commit")
    yield from _differing(every, "commit", "The commit", lambda one: str(commit(one))[:12])
    unknown = [one for one in every if commit(one) is None]
    if unknown:
        yield PageWarning("commit", f"The commit of {_who(unknown, every)} is unknown.")
    dirty = [one for one in every if one.run.environment.get("git_dirty")]
    if dirty:
        yield PageWarning(
            "dirty",
            f"{_who(dirty, every)}: the working tree had changes, so the commit does not say which "
            "code ran.",
        )
