"""The comparison page: what it reads, what it computes, what it warns of, what it refuses."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import statistics as oracle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lxml import html
from scipy import stats

from data.errors import InputError, run_cli
from eval.compare import curves, fairness, plots
from eval.compare.__main__ import main, read_arms
from eval.compare.names import arm_names
from eval.compare.page import render, write_page
from eval.compare.results import compare
from eval.compare.runs import Run, group, read_run, settings
from eval.compare.statistics import holm, paired, sample
from eval.compare.sweep import Trial, optimum
from tests.conftest import ROOT

# The learning rate of the real runs is 1e-2, so this is a sweep that chose it.
SWEEP = [Trial(5e-3, 6.1), Trial(1e-2, 6.0), Trial(1e-2, 6.2), Trial(2e-2, None)]
ODD = "_r4 <b>$x$ & \u201cy\u201d"  # an arm's name with what HTML and matplotlib would read
Arms = dict[str, list[Run]]


def moved(losses: dict[str, Any], arm: str, seed: int) -> dict[str, Any]:
    """Losses of another seed: an offset that is not the same in both arms."""
    offset = 0.01 * seed + (0.05 * seed * seed if arm == "lpa" else 0)
    keys = ("loss", "validation_loss", "loss_nats_per_token")
    return losses | {key: losses[key] + offset for key in keys if key in losses}


def changed_config(run: Run, changes: dict[str, Any]) -> Any:
    config = run.config
    for key, value in changes.items():
        block, _, leaf = key.partition(".")
        part = dataclasses.replace(getattr(config, block), **{leaf: value})
        config = dataclasses.replace(config, **{block: part})
    return config


def variant(run: Run, arm: str, seed: int, **changes: Any) -> Run:
    """The run as it might have been. changes: `config` with dotted keys, and `environment`,
    `status`, `final`, `checkpoint` with keys of these files (None: without the file).
    """
    twin = {"model.r": None} if arm == "vanilla" else {}
    clean = {"git_dirty": False, "git_commit": "0123456789abcdef"}
    final, checkpoint = changes.get("final", {}), changes.get("checkpoint", {})
    return dataclasses.replace(
        run,
        path=run.path.parent / f"{arm}-s{seed}",
        config=changed_config(run, {"training.seed": seed} | twin | changes.get("config", {})),
        environment=run.environment | clean | changes.get("environment", {}),
        metrics=[moved(record, arm, seed) for record in run.metrics],
        status=run.status | changes.get("status", {}),
        final=None if final is None else moved(run.final, arm, seed) | final,
        checkpoint=None if checkpoint is None else run.checkpoint | checkpoint,
    )


@pytest.fixture(scope="module")
def real(trained: Path) -> Run:
    return read_run(trained)


MakeArms = Callable[..., Arms]


@pytest.fixture
def make_arms(real: Run) -> MakeArms:
    """Both arms; `changes` belong to the last run of lpa, `all_lpa` to each of them."""

    def make(seeds: tuple[int, ...] = (1, 2, 3), **changes: Any) -> Arms:
        every = changes.pop("all_lpa", {})
        last = changes
        lpa = [
            variant(real, "lpa", seed, **(last if seed == seeds[-1] else {}) | every)
            for seed in seeds
        ]
        return {"lpa": lpa, "vanilla": [variant(real, "vanilla", seed) for seed in seeds]}

    return make


class Copies:
    """Run directories made from a real one, with other seeds and whatever a test changes."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source

    def run(self, arm: str, seed: int, checkpoint: bool = True, **config: Any) -> Path:
        """A run of one seed; `config` are fields of its block `training`."""
        path = self.folder / f"{arm}-s{seed}"
        ignored = shutil.ignore_patterns("*.safetensors", "tensorboard", ".*")
        shutil.copytree(self.source, path, ignore=ignored)
        loaded = yaml.safe_load((path / "config.yaml").read_text())
        loaded["training"] |= {"seed": seed} | config
        loaded["model"] |= {"r": None} if arm == "vanilla" else {}
        (path / "config.yaml").write_text(yaml.safe_dump(loaded))
        if not checkpoint:
            shutil.rmtree(path / "checkpoints")
        return path

    @staticmethod
    def write_metrics(path: Path, records: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        (path / "metrics.jsonl").write_text(text)


@pytest.fixture
def copies(tmp_path: Path, trained: Path) -> Copies:
    return Copies(tmp_path, trained)


def compared(arms: Arms, **keywords: Any) -> dict[str, Any]:
    chosen = {"baseline": None, "title": "t", "sweeps": dict.fromkeys(arms, SWEEP), "notes": ()}
    return compare(arms, **chosen | keywords)


def kinds(comparison: dict[str, Any]) -> set[str]:
    return {warning["kind"] for warning in comparison["warnings"]}


# Reading


def test_run_says_what_its_files_say(trained: Path):
    run = read_run(trained)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert run.steps == [1, 2, 3, 4, 5, 6]
    assert run.tokens == [8 * 32 * step for step in run.steps]
    assert run.losses == [line["loss"] for line in lines]
    assert [point.step for point in run.validation_points] == [3, 6]
    assert run.last_validation_loss == lines[-1]["validation_loss"]
    seconds = np.cumsum([line["seconds_per_step"] for line in lines])
    np.testing.assert_allclose(run.training_seconds, seconds)
    # Four layers' worth of matrices by hand: d 32, r 8, ffn 48, vocabulary 400, T 32, 2 layers.
    projections = 2 * (4 * (32 * 8 + 8 * 32) + 3 * 32 * 48)
    forward = 2 * (2 * projections / 2 + 4 * 32 * 33 / 2) + 2 * 400 * 32
    assert run.training_flops == [3 * forward * tokens for tokens in run.tokens]
    assert run.completed
    assert not run.diverged
    newest = json.loads((trained / "checkpoints/step-00000006/checkpoint.json").read_text())
    assert run.data_sha256 == newest["data_sha256"]
    assert run.tokenizer_sha256 == newest["tokenizer_sha256"]


def test_seconds_count_the_steps_between_logged_ones(copies: Copies):
    path = copies.run("lpa", 1)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    copies.write_metrics(path, [lines[0], lines[3], lines[5]])  # steps 1, 4, 6
    found = read_run(path).training_seconds
    a, b, c = (lines[i]["seconds_per_step"] for i in (0, 3, 5))
    np.testing.assert_allclose(found, [a, a + 3 * b, a + 3 * b + 2 * c])


def test_torn_last_line_is_left_out(copies: Copies):
    path = copies.run("lpa", 1)
    whole = read_run(path)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tok')
    assert read_run(path).metrics == whole.metrics


FULL_DISK = {"state": "failed", "message": "no space left on device"}


@pytest.mark.parametrize(
    ("change", "diverged"),
    [
        ({}, False),
        ({"losses": [6.0, 5.9, 5.8, None, 5.7, 5.6]}, False),  # one step was left out
        ({"losses": [6.0, 5.9, 5.8, 5.8, 5.7, None]}, True),
        ({"losses": [5.0, 5.5, 5.8, 5.9, 5.9, 5.95]}, False),  # worse, under ln 400 = 5.99
        ({"losses": [6.5, 6.4, 6.4, 6.3, 6.3, 6.2]}, False),  # over it, but better
        ({"losses": [6.2, 6.5, 7.8, 8.0, 8.1, 8.0]}, True),
        ({"losses": [6.2, 9e6, 6.0, 6.0, 6.0, 5.99147]}, True),  # uniform: ln 400 is 5.99146
        ({"losses": [6.2, 6.5, 7.8, 8.0, 8.1, 8.0], "status": {"state": "running"}}, False),
        ({"losses": [6.2, 6.5, 7.8, 8.0, 8.1, 8.0], "status": FULL_DISK}, False),
        ({"validation": None}, True),
        ({"validation": 9.0}, True),
        ({"final": math.nan}, True),
        ({"status": {"state": "failed", "message": "their loss or gradient was not finite"}}, True),
        ({"status": {"state": "failed", "message": "no space left on device"}}, False),
    ],
)
def test_diverged(trained: Path, change: dict[str, Any], diverged: bool):
    run = read_run(trained)
    metrics = [dict(record) for record in run.metrics]
    final = run.final | {"loss_nats_per_token": change["final"]} if "final" in change else None
    if "losses" in change:
        metrics = [
            {k: v for k, v in record.items() if k != "validation_loss"} | {"loss": loss}
            for record, loss in zip(metrics, change["losses"], strict=True)
        ]
    if "validation" in change:
        metrics[-1]["validation_loss"] = change["validation"]
    status = run.status | change.get("status", {})
    changed = dataclasses.replace(run, metrics=metrics, final=final, status=status)
    assert changed.diverged is diverged


def test_runs_that_differ_in_seed_and_reports_alone_are_one_arm(real: Run):
    reports = {"training.log_every": 3, "training.checkpoint_every": 6, "data.verify": False}
    reports |= {"training.keep_checkpoints": None, "training.untimed_steps": 1}
    runs = [
        variant(real, "lpa", 1),
        variant(real, "vanilla", 1),
        variant(real, "lpa", 2, config=reports),
        variant(real, "lpa", 3, checkpoint=None),  # its data are known by their folder alone
        variant(real, "lpa", 4, config={"training.weight_decay": 0.2}),
        variant(real, "lpa", 7, checkpoint={"data_sha256": "other"}),
    ]
    assert {name: [run.seed for run in arm] for name, arm in group(runs).items()} == {
        "lpa": [1, 2, 3],
        "vanilla": [1],
        "lpa (2)": [4],
        "lpa (3)": [7],
    }


@pytest.mark.parametrize(
    ("arms", "names"),
    [
        ([["a/lpa-s1", "a/lpa-s2"], ["a/transformer-s1"]], ["lpa", "transformer"]),
        ([["a/wiki_lpa_seed1"], ["a/wiki_vanilla_seed1"]], ["lpa", "vanilla"]),
        ([["a/lpa/seed1", "a/lpa/seed2"], ["a/vanilla/seed1"]], ["lpa", "vanilla"]),
        ([["a/lpa/seed1", "a/lpa/seed2"]], ["lpa"]),
        ([["a/lpa/1", "a/lpa/2"], ["a/vanilla/1"]], ["lpa", "vanilla"]),
        ([["a/lpa-lr4e-3-s1"], ["a/lpa-lr2e-3-s1"]], ["lr4e-3", "lr2e-3"]),
        ([["a/lpa"], ["a/lpa-long"]], ["lpa", "lpa-long"]),
        ([["a/r12-s1"], ["a/r24-s1"]], ["r12", "r24"]),
        ([["a/lpa-s1"], ["b/lpa-s1"]], ["a", "b"]),
        ([["a/x-s1"], ["a/x_s1"]], ["x", "x (2)"]),
    ],
)
def test_names_of_arms(arms: list[list[str]], names: list[str]):
    seeds = [
        [(Path(path), int(path[-1]) if path[-1].isdigit() else 0) for path in arm] for arm in arms
    ]
    assert arm_names(seeds) == names


# Sweeps and statistics


@given(
    st.dictionaries(
        st.sampled_from([1e-3, 2e-3, 4e-3, 8e-3]),
        st.lists(st.none() | st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=3),
        min_size=1,
    )
)
def test_optimum_is_the_least_mean_between_worse_ones(losses: dict[float, list[float | None]]):
    trials = [Trial(rate, loss) for rate, found in losses.items() for loss in found]
    means = {
        rate: math.inf if None in found else sum(found) / len(found)
        for rate, found in losses.items()
    }
    if min(means.values()) == math.inf:
        with pytest.raises(InputError, match="every learning rate diverged"):
            optimum(trials)
        return
    best = optimum(trials)
    rates = sorted(means)
    least = min(means.values())
    assert best.trial.learning_rate == min(rate for rate in rates if means[rate] == least)
    assert best.trial.loss == least
    place = rates.index(best.trial.learning_rate)
    worse = [0 <= p < len(rates) and means[rates[p]] > least for p in (place - 1, place + 1)]
    assert best.interior is all(worse)
    assert best.reason


def test_optimum_says_why():
    assert optimum(interior()).reason == "0.005 is worse by 0.2000; 0.02 diverged"
    assert optimum(SWEEP[1:]).reason == "no lower learning rate was tried; 0.02 diverged"
    assert optimum(SWEEP).reason == "no lower learning rate was tried; 0.01 has the same loss"
    edge = optimum([Trial(1e-3, 5.0), Trial(2e-3, 5.25)])
    assert not edge.interior
    assert edge.reason == "no lower learning rate was tried; 0.002 is worse by 0.2500"
    with pytest.raises(InputError, match="there is no trial"):
        optimum([])


def test_paired_differences_by_hand():
    """Differences 1, 2, 3: mean 2, sd 1, t = 2 / (1/√3), and t of 97.5 % with 2 degrees 4.3027."""
    found = paired({1: 3.0, 2: 5.0, 3: 8.0, 9: 1.0}, {3: 5.0, 2: 3.0, 1: 2.0, 4: 7.0})
    assert found.seeds == (1, 2, 3)
    assert found.difference == pytest.approx(2.0)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    # Student's distribution with 2 degrees of freedom has a closed form: F(t) = 1/2 + t / 2√(2+t²).
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_paired_differences_against_scipy():
    random = np.random.RandomState(0)
    a, b = random.normal(5, 1, 6), random.normal(5.2, 1, 6)
    found = paired(dict(enumerate(a)), dict(enumerate(b)))
    low, high = stats.t.interval(0.95, 5, np.mean(a - b), stats.sem(a - b))
    test = stats.ttest_1samp(a - b, 0)
    np.testing.assert_allclose((found.low, found.high, found.p), (low, high, test.pvalue))


def test_paired_differences_claim_nothing_without_a_spread():
    assert paired({1: 2.0}, {2: 1.0}).difference is None
    for arm, baseline in (({1: 2.0}, {1: 1.0}), ({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0})):
        found = paired(arm, baseline)
        assert found.difference == 1.0
        assert (found.low, found.high, found.p) == (None, None, None)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8))
def test_sample_is_that_of_the_standard_library(values: list[float]):
    found = sample(values)
    assert found.n == len(values)
    assert found.mean == pytest.approx(oracle.mean(values), abs=1e-12)
    assert found.sd == pytest.approx(oracle.stdev(values), abs=1e-9)


def test_sample_of_one_and_of_none():
    assert sample([]) is None
    assert sample([3.0]).sd is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_the_closed_test_of_bonferroni(values: list[float]):
    """A hypothesis falls where every intersection that it is part of falls (Marcus et al. 1976)."""
    p = {str(i): value for i, value in enumerate(values)}
    subsets = [s for n in range(1, len(p) + 1) for s in itertools.combinations(p, n)]
    expected = {
        name: max(min(1, len(s) * min(p[m] for m in s)) for s in subsets if name in s) for name in p
    }
    assert holm(p) == pytest.approx(expected)


# Curves


def test_curve_is_the_mean_least_and_largest_of_the_seeds(make_arms: MakeArms):
    runs = make_arms()["lpa"]
    found = curves.curves("lpa", runs, bits=False)
    losses = np.array([run.losses for run in runs])
    for key, of in (("mean", np.mean), ("min", np.min), ("max", np.max)):
        np.testing.assert_allclose(found["training"][f"loss_nats_per_token_{key}"], of(losses, 0))
    assert found["training"]["tokens"] == runs[0].tokens
    assert found["training"]["training_flops"] == runs[0].training_flops
    seconds = np.mean([run.training_seconds for run in runs], axis=0)
    np.testing.assert_allclose(found["training"]["training_seconds"], seconds)
    validation = found["validation"]
    assert validation["tokens"] == [point.tokens for point in runs[0].validation_points]
    last = [run.last_validation_loss for run in runs]
    assert validation["loss_nats_per_token_max"][-1] == max(last)


def long_run(run: Run, losses: list[float | None]) -> Run:
    metrics = [
        {"step": i, "tokens": 100 * i, "loss": loss, "seconds_per_step": 0.5}
        for i, loss in enumerate(losses, 1)
    ]
    return dataclasses.replace(run, metrics=metrics)


def test_training_loss_is_smoothed_by_means_of_equal_groups(trained: Path):
    losses = [float(i % 7) for i in range(1, 2 * curves.POINTS + 1)]
    found = curves.curves("lpa", [long_run(read_run(trained), losses)], bits=False)["training"]
    pairs = list(zip(losses[::2], losses[1::2], strict=True))
    assert found["loss_nats_per_token_mean"] == [sum(pair) / 2 for pair in pairs]
    assert found["tokens"][:2] == [150, 350]
    assert found["training_seconds"][0] == 0.75


def test_step_without_a_finite_loss_is_in_no_mean(trained: Path):
    losses: list[float | None] = [4.0] * (2 * curves.POINTS)
    losses[0] = losses[2] = losses[3] = None
    found = curves.curves("lpa", [long_run(read_run(trained), losses)], bits=False)["training"]
    assert found["loss_nats_per_token_mean"][:3] == [4.0, None, 4.0]


# What is compared


def test_equal_comparison_has_no_warning(make_arms: MakeArms):
    found = compared(make_arms(), sweeps=dict.fromkeys(("lpa", "vanilla"), interior()))
    assert found["warnings"] == []
    assert found["baseline"] == "vanilla"
    assert found["measure"] == {"source": "final", "split": "test", "unit": "nats_per_token"}


def interior() -> list[Trial]:
    return [Trial(5e-3, 6.3), *SWEEP[1:]]


NOT_FINITE = {"state": "failed", "message": "their loss or gradient was not finite"}
WARNINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "batch": ("batch", {"all_lpa": {"config": {"training.global_batch_size": 16}}}),
    "tokens": ("tokens", {"all_lpa": {"config": {"training.max_steps": 7}}}),
    "sequence": ("sequence_length", {"all_lpa": {"config": {"training.seq_len": 16}}}),
    "warm-up": ("schedule", {"all_lpa": {"config": {"training.warmup_steps": 3}}}),
    "end": ("schedule", {"all_lpa": {"config": {"training.min_learning_rate": 1e-3}}}),
    "precision": ("precision", {"all_lpa": {"config": {"training.precision": "bf16"}}}),
    "decay": ("optimizer", {"all_lpa": {"config": {"training.weight_decay": 0.0}}}),
    "no_decay": ("optimizer", {"all_lpa": {"config": {"training.no_decay": []}}}),
    "compile": ("execution", {"all_lpa": {"config": {"execution.compile": "on"}}}),
    "zero": ("execution", {"all_lpa": {"config": {"deepspeed.zero_stage": 2}}}),
    "validation": ("evaluation", {"all_lpa": {"config": {"training.validation_tokens": 99}}}),
    "documents": ("evaluation", {"all_lpa": {"config": {"model.document_start_id": 1}}}),
    "scored": ("evaluation", {"final": {"tokens": 17}}),
    "data": ("data", {"all_lpa": {"checkpoint": {"data_sha256": "f" * 64}}}),
    "no data": ("data_unknown", {"checkpoint": None}),
    "device": ("hardware", {"environment": {"device": "NVIDIA H100"}}),
    "threads": ("hardware", {"environment": {"threads": 7}}),
    "ranks": ("world_size", {"environment": {"world_size": 2}}),
    "torch": ("packages", {"environment": {"packages": {"torch": "1.0"}}}),
    "python": ("packages", {"environment": {"python": "3.12.0"}}),
    "commit": ("commit", {"environment": {"git_commit": "fedcba9876543210"}}),
    "no commit": ("commit", {"environment": {"git_commit": None}}),
    "dirty": ("dirty", {"environment": {"git_dirty": True}}),
    "unfinished": ("unfinished", {"status": {"state": "running"}}),
    "preempted": ("unfinished", {"status": {"state": "preempted"}}),
    "diverged": ("diverged", {"status": NOT_FINITE}),
    "no final": ("final_absent", {"final": None}),
    "one seed": ("one_seed", {"seeds": (4,)}),
}
# What a change brings with it.
FOLLOWS = {
    "batch": {"tokens"},
    "sequence": {"tokens"},
    "unfinished": {"seeds"},
    "preempted": {"seeds"},
    "diverged": {"seeds"},
}


@pytest.mark.parametrize("name", WARNINGS)
def test_inequality_is_warned_of(make_arms: MakeArms, name: str):
    kind, changes = WARNINGS[name]
    found = compared(
        make_arms(**{"seeds": (1, 2)} | changes),
        sweeps=dict.fromkeys(("lpa", "vanilla"), interior()),
    )
    expected = {kind} | FOLLOWS.get(name, set())
    # With two seeds of which one does not count, one is left.
    expected |= {"one_seed"} if "seeds" in expected else set()
    assert kinds(found) == expected
    texts = [warning["text"] for warning in found["warnings"] if warning["kind"] == kind]
    assert any("lpa" in text for text in texts)


def test_learning_rates_are_warned_of(make_arms: MakeArms):
    arms = make_arms()
    assert kinds(compared(arms, sweeps={})) == {"lr_not_tuned"}
    assert kinds(compared(arms, sweeps={"lpa": interior()})) == {"lr_not_tuned"}
    both = {"lpa": SWEEP, "vanilla": interior()}  # the neighbour below is as good
    assert kinds(compared(arms, sweeps=both)) == {"lr_not_interior", "lr_not_best"}
    higher = [Trial(rate * 2, loss) for rate, loss in ((5e-3, 6.2), (1e-2, 6.1), (2e-2, 6.3))]
    both = {"lpa": higher, "vanilla": interior()}
    assert kinds(compared(arms, sweeps=both)) == {"lr_not_best"}


def test_another_learning_rate_is_no_fault_where_a_sweep_chose_it(make_arms: MakeArms):
    change = {"training.learning_rate": 2e-2, "training.lr_multiplier_B": 2.0}
    arms = make_arms(all_lpa={"config": change})
    higher = [Trial(rate * 2, loss) for rate, loss in ((5e-3, 6.2), (1e-2, 6.1), (2e-2, 6.3))]
    assert kinds(compared(arms, sweeps={"lpa": higher, "vanilla": interior()})) == set()


def test_seeds_that_not_every_arm_has_are_warned_of(make_arms: MakeArms, real: Run):
    arms = make_arms()
    arms["lpa"].append(variant(real, "lpa", 4))
    found = compared(arms)
    assert "seeds" in kinds(found)
    assert found["arms"][0]["difference_seeds"] == [1, 2, 3]


def test_every_setting_outside_of_the_model_has_a_check(trained: Path):
    for key in settings(read_run(trained)):
        block = key.partition(".")[0]
        known = block == "model" or key in fairness._ELSEWHERE
        assert known or fairness._KINDS.get(key) or block in fairness._KIND_OF_BLOCK, key


def test_data_are_named_by_their_folder_alone(make_arms: MakeArms, tmp_path: Path):
    elsewhere = {"config": {"data.path": str(tmp_path / "corpus")}}
    found = compared(make_arms((1,), all_lpa=elsewhere))
    row = found["setting_differences"][-1]
    assert (row["key"], row["values"]["lpa"]) == ("data.path", "corpus")
    assert str(tmp_path) not in json.dumps(found)


def test_run_that_does_not_count_is_in_no_mean(make_arms: MakeArms):
    arms = make_arms(status={"state": "running"})
    row = compared(arms)["arms"][0]
    assert (row["runs"], row["runs_counted"], row["seeds_counted"]) == (3, 2, [1, 2])
    losses = [run.final["loss_nats_per_token"] for run in arms["lpa"][:2]]
    assert row["loss_nats_per_token_mean"] == pytest.approx(oracle.mean(losses))


def test_arm_of_which_no_run_counts_has_no_score(make_arms: MakeArms):
    arms = make_arms(all_lpa={"status": {"state": "running"}})
    found = compared(arms)
    assert {"no_score", "unfinished"} <= kinds(found)
    assert found["arms"][0]["loss_nats_per_token_mean"] is None
    assert found["curves"]["lpa"]["training"] is not None


def test_without_a_final_score_validations_of_all_are_compared(make_arms: MakeArms):
    arms = make_arms(final=None)
    found = compared(arms)
    assert found["measure"]["source"] == "validation"
    for row in found["arms"]:
        losses = [run.last_validation_loss for run in arms[row["name"]]]
        assert row["loss_nats_per_token_mean"] == pytest.approx(oracle.mean(losses))


def test_different_tokenizers_leave_bits_per_byte(make_arms: MakeArms):
    arms = make_arms(all_lpa={"checkpoint": {"tokenizer_sha256": "f" * 64}})
    found = compared(arms)
    assert {"tokenizer", "bits_only"} <= kinds(found)
    assert found["measure"]["unit"] == "bits_per_byte"
    for row in found["arms"]:
        assert row["loss_nats_per_token_mean"] is row["perplexity"] is None
        bits = [run.final["bits_per_byte"] for run in arms[row["name"]]]
        assert row["bits_per_byte_mean"] == pytest.approx(oracle.mean(bits))
    lpa, vanilla = (row["bits_per_byte_mean"] for row in found["arms"])
    assert found["arms"][0]["difference_bits_per_byte"] == pytest.approx(lpa - vanilla)
    assert all(curve["training"] is None for curve in found["curves"].values())
    names = [plot.name for plot in plots.plots(found)]
    assert names == ["loss_by_training_flops", "loss_by_training_seconds", "sweep"]


def test_different_tokenizers_without_bits_are_refused(make_arms: MakeArms):
    change = {"checkpoint": {"tokenizer_sha256": "f" * 64}, "final": {"bits_per_byte": None}}
    arms = make_arms(all_lpa=change)
    assert compared(arms)["measure"]["source"] == "validation"
    for run in arms["lpa"]:
        for record in run.metrics:
            record.pop("validation_bits_per_byte", None)
    with pytest.raises(InputError, match="can be compared with nothing"):
        compared(arms)


def test_numbers_are_those_of_the_runs(make_arms: MakeArms):
    arms = make_arms()
    found = compared(arms)
    lpa, vanilla = found["arms"]
    final = {n: [run.final["loss_nats_per_token"] for run in arms[n]] for n in arms}
    for row in (lpa, vanilla):
        runs = arms[row["name"]]
        model = runs[0].config.model
        assert row["loss_nats_per_token_mean"] == pytest.approx(oracle.mean(final[row["name"]]))
        assert row["loss_nats_per_token_sd"] == pytest.approx(oracle.stdev(final[row["name"]]))
        assert row["perplexity"] == pytest.approx(math.exp(row["loss_nats_per_token_mean"]))
        assert row["parameters"] == model.num_parameters()
        assert row["tokens"] == 6 * 8 * 32
        assert row["training_seconds_median"] == oracle.median(r.training_seconds[-1] for r in runs)
        assert row["tokens_per_second_median"] == runs[0].throughput["tokens_per_second"]
        peaks = [record["peak_memory_bytes"] for run in runs for record in run.metrics]
        assert row["peak_memory_bytes_max"] == max(peaks)
        # 2 · layers · heads · head_dim · 4 bytes
        assert row["kv_cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert lpa["latent_cache_bytes_per_token"] == (8 + 8) * 2 * 4
    assert vanilla["latent_cache_bytes_per_token"] is None
    test = stats.ttest_rel(final["lpa"], final["vanilla"])
    low, high = test.confidence_interval(0.95)
    assert lpa["difference_nats_per_token"] == pytest.approx(
        oracle.mean(final["lpa"]) - oracle.mean(final["vanilla"])
    )
    assert lpa["difference_low_nats_per_token"] == pytest.approx(low)
    assert lpa["difference_high_nats_per_token"] == pytest.approx(high)
    assert lpa["difference_p"] == pytest.approx(test.pvalue)
    assert lpa["difference_p_holm"] is None  # one comparison
    assert vanilla["difference_nats_per_token"] is None
    assert found["setting_differences"] == [
        {"key": f"model.r.{k}", "values": {"lpa": 8, "vanilla": None}, "differs": ["lpa"]}
        for k in "qkvo"
    ]


# The page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, real: Run) -> dict[str, Any]:
    """A page of three arms, one of them with a run that is not counted."""
    folder = tmp_path_factory.mktemp("page")
    arms = {n: [variant(real, n, seed) for seed in (1, 2, 3)] for n in ("lpa", "vanilla")}
    narrow = {"config": {"model.r": 4, "training.learning_rate": 5e-3}}
    states = ("completed", "completed", "running")
    arms[ODD] = [
        variant(real, "narrow/r4", seed, **narrow, status={"state": state})
        for seed, state in enumerate(states, 1)
    ]
    page = write_page(
        folder / "page",
        arms,
        title="LPA & <vanilla>",
        sweeps={"lpa": SWEEP, "vanilla": interior()},
        notes=["a <script>note</script>"],
    )
    text = page.read_text(encoding="utf-8")
    comparison = json.loads((page.parent / "comparison.json").read_text(encoding="utf-8"))
    return {"arms": arms, "page": page, "text": text, "json": comparison}


def table(text: str, name: str) -> list[list[Any]]:
    return [row.xpath("./td|./th") for row in html.fromstring(text).xpath(f"//*[@id='{name}']//tr")]


def numbers(cells: list[Any]) -> list[float]:
    return [float(data.get("value")) for cell in cells for data in cell.iter("data")]


def test_results_on_the_page_are_those_of_the_json(made: dict[str, Any]):
    _, _, *rows = table(made["text"], "results")
    assert len(rows) == len(made["json"]["arms"]) == 3
    keys = (
        "runs_counted", "learning_rate", "parameters", "parameters_non_embedding",
        "flops_per_token_forward", "tokens", "loss_nats_per_token_mean", "loss_nats_per_token_sd",
        "perplexity", "bits_per_byte_mean", "difference_nats_per_token",
        "difference_low_nats_per_token", "difference_high_nats_per_token", "difference_p",
        "difference_p_holm", "training_seconds_median", "tokens_per_second_median",
        "peak_memory_bytes_max", "kv_cache_bytes_per_token", "latent_cache_bytes_per_token",
    )  # fmt: skip
    for cells, arm in zip(rows, made["json"]["arms"], strict=True):
        expected = [arm[key] for key in keys if arm[key] is not None]
        if arm["runs"] != arm["runs_counted"]:
            expected.insert(1, arm["runs"])
        assert numbers(cells) == expected
        assert cells[0].text_content().startswith(arm["name"])


def test_the_markdown_table_has_the_numbers_of_the_json(made: dict[str, Any]):
    lines = (made["page"].parent / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# LPA & <vanilla>"
    assert "- a <script>note</script>" in lines
    warned = [line for line in lines if line.startswith("- Warning: ")]
    assert warned == [f"- Warning: {one['text']}" for one in made["json"]["warnings"]]
    head, _, *rows = [line.strip("|").split(" | ") for line in lines if line.startswith("|")]
    assert len(rows) == len(made["json"]["arms"]) == 3
    for row, arm in zip(rows, made["json"]["arms"], strict=True):
        cells = {name.strip(): cell.strip() for name, cell in zip(head, row, strict=True)}
        assert cells["arm"] == arm["name"]
        assert cells["parameters"] == f"{arm['parameters']:,}"
        mean, sd = arm["loss_nats_per_token_mean"], arm["loss_nats_per_token_sd"]
        assert cells["loss, nats/token"] == f"{mean:.4f} ± {sd:.4f}"
        if arm["name"] == made["json"]["baseline"]:
            assert cells["difference"] == cells["p (Holm)"] == "–"
        else:
            low = arm["difference_low_nats_per_token"]
            interval = "" if low is None else f" ({low:+.4f} to "
            shown = f"{arm['difference_nats_per_token']:+.4f}{interval}"
            assert cells["difference"].startswith(shown)
            p = arm["difference_p"]
            assert cells["p (Holm)"].startswith("n/a" if p is None else f"{p:.2g}")


def test_what_is_shown_is_the_number_rounded(made: dict[str, Any]):
    shown = html.fromstring(made["text"]).xpath("//*[@id='results' or @id='runs']//data")
    assert len(shown) > 50
    for data in shown:
        text = data.text_content().replace(",", "").replace("\N{MINUS SIGN}", "-")
        value = float(data.get("value"))
        digits = len(text.partition(".")[2])
        candidates = (value, value / 2**20)
        precise = any(abs(float(text) - c) <= 0.5 * 10**-digits * 1.0001 for c in candidates)
        assert precise or float(text) == pytest.approx(value, rel=0.05), (text, value)


def test_every_row_of_the_results_has_a_cell_for_each_heading(made: dict[str, Any]):
    groups, head, *rows = table(made["text"], "results")
    assert sum(int(cell.get("colspan", 1)) for cell in groups) == len(head)
    assert {len(row) for row in rows} == {len(head)}
    for name in ("settings", "runs"):
        head, *rows = table(made["text"], name)
        assert {len(row) for row in rows} == {len(head)}


def test_warnings_notes_and_title_are_on_the_page_as_text(made: dict[str, Any]):
    page = html.fromstring(made["text"])
    texts = [item.text_content() for item in page.xpath("//*[@id='warnings']//li")]
    assert texts == [warning["text"] for warning in made["json"]["warnings"]]
    assert {"unfinished", "lr_not_tuned", "seeds"} <= kinds(made["json"])
    assert page.xpath("//h1")[0].text_content() == "LPA & <vanilla>"
    assert [n.text_content() for n in page.xpath("//*[@id='notes']/li")] == made["json"]["notes"]
    assert not page.xpath("//script")


def test_settings_and_runs_are_on_the_page(made: dict[str, Any]):
    _, *rows = table(made["text"], "settings")
    for cells, row in zip(rows, made["json"]["setting_differences"], strict=True):
        assert cells[0].text_content() == row["key"]
        for cell, name in zip(cells[1:], row["values"], strict=True):
            marked = cell.text_content().startswith("≠ ")
            assert marked is (name in row["differs"])
    _, *rows = table(made["text"], "runs")
    names = [cells[0].text_content() for cells in rows]
    assert names[:2] == ["lpa-s1", "lpa-s2"]
    assert names[-1] == "narrow/r4-s3"
    for cells, run in zip(rows, made["json"]["runs"], strict=True):
        losses = (run["final_loss_nats_per_token"], run["validation_loss_nats_per_token"])
        assert set(losses) <= set(numbers(cells))


def test_sweep_is_on_the_page(made: dict[str, Any]):
    _, *rows = table(made["text"], "sweeps")
    assert len(rows) == 6
    found = [cell.text_content() for row in rows for cell in row[-1:]]
    assert [bool(text) for text in found] == [True, False, False, False, True, False]
    assert "not inside" in found[0]
    assert "diverged" in rows[2][-2].text_content()


def test_page_needs_no_other_file(made: dict[str, Any]):
    page = html.fromstring(made["text"])
    used = page.xpath("//@src|//@srcset|//@href")
    assert len(used) == 8  # four plots, light and dark
    assert all(source.startswith("data:image/svg+xml;base64,") for source in used)
    assert all(image.get("alt") for image in page.iter("img"))
    assert "url(" not in html.tostring(page.xpath("//style")[0]).decode()
    files = sorted(path.name for path in made["page"].parent.iterdir())
    written = ["comparison.json", "comparison.md", "index.html"]
    assert files == sorted([*written, *(f"{n}.png" for n in plots.FILES)])
    for name in plots.FILES:
        assert (made["page"].parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_page_names_no_path_of_this_machine(made: dict[str, Any], prepared: Path, real: Run):
    for text in (made["text"], json.dumps(made["json"])):
        for path in (made["page"].parent, prepared, real.path, ROOT):
            assert str(path) not in text
            assert str(path.parent) + "/" not in text


def test_arms_have_colours_of_their_own_in_all_plots(made: dict[str, Any]):
    names = list(made["arms"])
    looks = [plots._look(made["json"], name) for name in names]
    assert len({look["color"] for look in looks}) == 3
    assert len({look["linestyle"] for look in looks}) == 3
    many = {"arms": [{"name": str(i)} for i in range(24)]}
    assert len({tuple(plots._look(many, str(i)).values()) for i in range(24)}) == 24


def test_command_writes_the_same_bytes_as_another_process(
    made: dict[str, Any], copies: Copies, tmp_path: Path
):
    paths = [copies.run(arm, seed) for arm in ("lpa", "vanilla") for seed in (1, 2)]
    command = [sys.executable, "-m", "eval.compare", "--baseline", "lpa", "--title", "Ω"]
    command += ["--output", str(tmp_path / "a"), *map(str, paths)]
    environment = os.environ | {"PYTHONHASHSEED": "17"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'a/index.html'}: 4 runs of 2 arms (lpa, vanilla)\n"
    shutil.copytree(made["page"].parent, tmp_path / "b")  # a page with a sweep was here before
    arms = group([read_run(path) for path in paths])
    write_page(tmp_path / "b", arms, baseline="lpa", title="Ω")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 6
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_page_that_cannot_be_written_leaves_the_old_one(made: dict[str, Any], tmp_path: Path):
    output = tmp_path / "page"
    shutil.copytree(made["page"].parent, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    (output / f"index.html.{os.getpid()}.partial").mkdir()
    with pytest.raises(IsADirectoryError):
        write_page(output, {"lpa": made["arms"]["lpa"]}, title="another")
    (output / f"index.html.{os.getpid()}.partial").rmdir()
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_page_of_one_arm_compares_with_nothing(real: Run):
    comparison = compared({"lpa": [variant(real, "lpa", 1)]})
    text = render(comparison, [])
    assert "Against" not in text
    _, head, row = table(text, "results")
    assert len(row) == len(head)


# The command line


def test_names_of_the_command_line_make_arms(copies: Copies, make_arms: MakeArms):
    paths = [copies.run("lpa", 1), copies.run("lpa", 2), copies.run("vanilla", 1)]
    odd = copies.folder / "lr=1"
    paths[2].rename(odd)
    found = read_arms([f"A={paths[0]}", f"A={paths[1]}", str(odd)])
    assert {name: [run.path for run in runs] for name, runs in found.items()} == {
        "A": paths[:2],
        "lr=1": [odd],
    }


def broken(name: str, content: str | None) -> Callable[[Copies], list[str]]:
    """One run, a file of which has other content or is not there."""

    def arguments(copies: Copies) -> list[str]:
        path = copies.run("lpa", 1)
        if content is None:
            (path / name).unlink()
        else:
            (path / name).write_text(content)
        return [str(path)]

    return arguments


def without_common_steps(copies: Copies) -> list[str]:
    paths = [copies.run("lpa", seed, checkpoint=False) for seed in (1, 2)]
    for path, keep in zip(paths, (slice(0, 6, 2), slice(1, 6, 2)), strict=True):
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        copies.write_metrics(path, lines[keep])
    return [str(path) for path in paths]


def without_common_tokens(copies: Copies) -> list[str]:
    first, second = copies.run("lpa", 1), copies.run("vanilla", 1)
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    copies.write_metrics(second, [r | {"tokens": r["tokens"] + 10**6} for r in lines])
    return [str(first), str(second)]


def both(*more: str) -> Callable[[Copies], list[str]]:
    return lambda copies: [str(copies.run(arm, 1)) for arm in ("lpa", "vanilla")] + [*more]


def twice(prefix: str = "") -> Callable[[Copies], list[str]]:
    def arguments(copies: Copies) -> list[str]:
        path = copies.run("lpa", 1)
        return [str(path), f"{prefix}{path.parent}/./{path.name}"]

    return arguments


def one_name(arm: str, seed: int) -> Callable[[Copies], list[str]]:
    def arguments(copies: Copies) -> list[str]:
        first = copies.run("lpa", 1)
        if (arm, seed) == ("lpa", 1):
            return [f"A={first}", f"A={shutil.copytree(first, first.with_name('again'))}"]
        return [f"A={first}", f"A={copies.run(arm, seed)}"]

    return arguments


BAD: dict[str, tuple[Callable[[Copies], list[str]], str]] = {
    "no folder": (lambda _: ["nowhere"], r"nowhere: no such folder"),
    "no run": (lambda c: [str(c.folder)], r"not a run directory of train.py: it has no config"),
    "no metrics": (broken("metrics.jsonl", None), r"it has no metrics.jsonl"),
    "empty metrics": (broken("metrics.jsonl", ""), r"metrics.jsonl: has no logged step"),
    "torn metrics": (broken("metrics.jsonl", '{"st'), r"metrics.jsonl: has no logged step"),
    "broken line": (broken("metrics.jsonl", "{\n{}\n"), r"metrics.jsonl, line 1: not valid JSON"),
    "list": (broken("metrics.jsonl", "[]\n"), r"line 1: a JSON object is expected, found list"),
    "no step": (broken("metrics.jsonl", "{}\n"), r"line 1: step is None; a number is expected"),
    "no loss": (
        broken("metrics.jsonl", '{"step": 1, "tokens": 2, "seconds_per_step": 1}\n'),
        r"line 1: loss is None; a number or null is expected",
    ),
    "falling steps": (
        broken(
            "metrics.jsonl",
            '{"step": 2, "tokens": 2, "seconds_per_step": 1, "loss": 1}\n' * 2,
        ),
        r"line 2: step 2 comes after step 2; steps must rise",
    ),
    "broken status": (broken("status.json", "{"), r"status.json: not valid JSON"),
    "no state": (broken("status.json", "{}"), r"status.json: has no state"),
    "broken final": (broken("final.json", "[]"), r"final.json: a JSON object is expected"),
    "no score": (broken("final.json", "{}"), r"final.json: loss_nats_per_token is None; a number"),
    "no speed": (broken("throughput.json", "{}"), r"tokens_per_second is None; a number"),
    "empty config": (broken("config.yaml", ""), r"config.yaml: a mapping of keys is expected"),
    "foreign config": (broken("config.yaml", "a: 1\n"), r"config.yaml: unknown key a"),
    "no common steps": (without_common_steps, r"no logged step in common \(lpa-s1: 1 to 5"),
    "no common tokens": (without_common_tokens, r"no number of tokens in common"),
    "given twice": (twice(), r"lpa-s1: given twice, in lpa$"),
    "named twice": (twice("A="), r"lpa-s1: given twice, in A and in lpa$"),
    "no name": (lambda _: ["=a"], r"=a: the name before = is missing"),
    "seed twice": (one_name("lpa", 1), r"both have training.seed 1; a seed counts once"),
    "two arms": (one_name("vanilla", 2), r"one arm, but model.r.q is 8 and None"),
    "baseline": (both("--baseline", "x"), r"--baseline: there is no arm 'x'; the arms are lpa, v"),
    "option": (both("--basline", "x"), r"unrecognized arguments: --basline x"),
    "nothing": (lambda _: [], r"the following arguments are required: RUN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    copies: Copies, name: str, capsys: pytest.CaptureFixture[str]
):
    arguments, message = BAD[name]
    argv = [*arguments(copies), "--output", str(copies.folder / "out")]
    refused(argv, message, capsys)
    assert not (copies.folder / "out").exists()


def refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run_cli(lambda: main(argv))
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]


def test_output_that_is_a_file_is_refused(copies: Copies, capsys: pytest.CaptureFixture[str]):
    path, output = copies.run("lpa", 1), copies.folder / "file"
    output.write_text("kept")
    refused([str(path), "--output", str(output)], r"--output .*file: is a file", capsys)
    assert output.read_text() == "kept"
    with pytest.raises(InputError, match="is a file"):
        write_page(output, {"lpa": [read_run(path)]}, title="t")


def test_metrics_that_are_not_text_are_refused(copies: Copies):
    path = copies.run("lpa", 1)
    (path / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_run(path)


def test_arms_and_sweeps_that_do_not_fit_are_refused(make_arms: MakeArms):
    arms = make_arms((1,))
    for given_arms, sweeps, message in (
        ({}, {}, "no run to compare"),
        ({"a": []}, {}, "an arm without runs"),
        (arms, {"b": SWEEP}, "sweeps: there is no arm 'b'"),
        (arms, {"lpa": [Trial(1e-3, None)]}, "every learning rate diverged"),
        ({"a": arms["lpa"], "b": arms["lpa"]}, {}, "given twice, in a and in b"),
    ):
        with pytest.raises(InputError, match=message):
            compare(given_arms, baseline=None, title="t", sweeps=sweeps, notes=())


def test_unnamed_arm_with_the_name_of_a_named_one_is_refused(copies: Copies):
    paths = [copies.run("lpa", 1), copies.run("vanilla", 1), copies.run("lpa", 2)]
    with pytest.raises(InputError, match="lpa: runs without a name make up an arm"):
        read_arms([f"lpa={paths[1]}", str(paths[0]), str(paths[2])])
