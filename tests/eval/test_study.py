"""A study: its files, what it plans, and small ones run to their end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.command_line import parse_options
from data.errors import InputError
from eval.study.config import PlannedRun, StudyConfig, planned
from eval.study.progress import arm_state, in_order
from training.config import CONFIG_FOLDER

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted((CONFIG_FOLDER / "study").glob("*.yaml"))
MODEL = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2,
}  # fmt: skip
TRAINING = {"max_steps": 8, "global_batch_size": 2, "seq_len": 16, "validate_every": 4}
OWN_RATE = {"model": MODEL, "training": TRAINING | {"learning_rate": 1e-3}}


def study(path: Path | None = None, **changes: Any) -> StudyConfig:
    """A study of two arms, from a file as the command reads it."""
    fields: dict[str, Any] = {
        "title": "Test",
        "run_dir": "/nowhere",
        "base": {"model": MODEL, "training": TRAINING},
        "arms": {"vanilla": None, "lpa": {"model": {"r": 4}}},
        "sweep": {"learning_rates": [1e-3, 2e-3, 4e-3], "max_steps": 4},
        "seeds": [1, 2],
    } | changes
    if path is None:
        return StudyConfig(**fields)
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    return parse_options(StudyConfig, ["--config", str(path)], prog="", description="")[0]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Studies under a folder of their own."""

    def build(**changes: Any) -> StudyConfig:
        return study(tmp_path / "study.yaml", **({"run_dir": str(tmp_path / "study")} | changes))

    return build


def ended(run: PlannedRun, loss: float | None, **status: Any) -> None:
    """What train.py leaves of a run, as far as a study reads it."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(run.config.to_yaml())
    (run.folder / "environment.json").write_text("{}")
    steps = run.config.training.max_steps
    (run.folder / "status.json").write_text(
        json.dumps({"state": "completed", "step": steps, "time": 0.0} | status)
    )
    record = {
        "step": steps, "tokens": 32 * steps, "loss": 5.0, "lr": 0.0, "grad_norm": 1.0,
        "seconds_per_step": 0.1, "tokens_per_second": 320.0, "validation_loss": loss,
        "validation_perplexity": 1.0, "validation_bits_per_byte": 1.0,
    }  # fmt: skip
    (run.folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_arm_of_a_file_is_a_valid_run(path: Path):
    config = parse_options(StudyConfig, ["--config", str(path)], prog="", description="")[0]
    assert config.arm_names[0] == (config.baseline or "vanilla") == "vanilla"
    count = {}
    for arm in config.arm_names:
        model = planned(config, arm, 1e-3, 1, trial=False).config.model
        count[arm] = model.num_parameters()
    lpa = count.get("lpa_published", 0)
    for arm in {"lpa", "small_vanilla", "grouped_query"} & set(count) if lpa else ():
        assert count[arm] == lpa, arm
    if "lpa_equal_parameters" in count:
        assert count["lpa_equal_parameters"] == pytest.approx(count["vanilla"], rel=1e-3)
    if "small_vanilla_ffn" in count:
        assert count["small_vanilla_ffn"] == pytest.approx(lpa, rel=1e-3)


def test_the_arms_that_are_ready():
    found = yaml.safe_load((CONFIG_FOLDER / "study" / "130m.yaml").read_text())["arms"]
    assert found == {
        arm: found[arm]
        for arm in (
            "vanilla", "vanilla_published", "vanilla_aids", "lpa_published", "lpa", "lpa_aids",
            "lpa_equal_parameters",
            "small_vanilla", "small_vanilla_ffn", "grouped_query", "low_ffn", "low_all",
            "low_all_silu", "lpa_r32", "lpa_r64", "lpa_r256", "lpa_q", "lpa_k", "lpa_v", "lpa_o",
        )
    }  # fmt: skip
    small = yaml.safe_load((CONFIG_FOLDER / "study" / "small_arms.yaml").read_text())["arms"]
    assert len(small) == len(found)


# --- plan ----------------------------------------------------------------------------------------


def rates(runs: list[PlannedRun]) -> list[float]:
    return [run.learning_rate for run in runs]


def test_a_run_has_the_keys_of_base_arm_and_sweep(make):
    config = make()
    trial = planned(config, "lpa", 2e-3, 0, trial=True)
    final = planned(config, "lpa", 2e-3, 7, trial=False)
    assert (trial.config.model.r, final.config.model.r) == (4, 4)
    assert (trial.config.training.max_steps, final.config.training.max_steps) == (4, 8)
    assert (trial.config.data.final_split, final.config.data.final_split) == (None, "test")
    assert (trial.trial, final.trial) == (True, False)
    assert (final.config.training.seed, final.config.training.learning_rate) == (7, 2e-3)
    assert final.folder == Path(config.run_dir) / "final" / "lpa" / "lr-0.002-seed-7"
    assert trial.folder == Path(config.run_dir) / "trials" / "lpa" / "lr-0.002-seed-0"
    per_token = final.config.model.flops_per_token(16)
    assert final.flops == 3 * per_token * 8 * 2 * 16


def test_trials_come_first_and_final_runs_seed_by_seed(make):
    config = make(seeds=[2, 1], sweep={"learning_rates": [1e-3, 2e-3, 4e-3], "max_steps": 4})
    arms = [arm_state(config, name) for name in config.arm_names]
    assert [(run.arm, run.trial) for run in in_order(config, arms)] == [
        *[("vanilla", True)] * 3,
        *[("lpa", True)] * 3,
    ]
    for arm in arms:
        for run, loss in zip(arm.waiting, (5.0, 4.0, 4.5), strict=True):
            ended(run, loss)
    arms = [arm_state(config, name) for name in config.arm_names]
    assert [(run.arm, run.seed, run.learning_rate) for run in in_order(config, arms)] == [
        ("vanilla", 2, 2e-3),
        ("lpa", 2, 2e-3),
        ("vanilla", 1, 2e-3),
        ("lpa", 1, 2e-3),
    ]
    for run in arms[0].waiting:
        ended(run, 3.0)
    done = arm_state(config, "vanilla")
    assert ([run.seed for run in done.final], done.waiting) == ([2, 1], [])


def losses_by(loss: Any, config: StudyConfig, limit: int = 20) -> Any:
    """Ends the trials of vanilla as `loss` says of their rates, until none is left."""
    for _ in range(limit):
        arm = arm_state(config, "vanilla")
        if not arm.waiting or not arm.waiting[0].trial:
            return arm
        for run in arm.waiting:
            ended(run, loss(run.learning_rate))
    raise AssertionError("the sweep does not end")


def test_a_grid_grows_until_its_best_rate_is_inside(make):
    config = make(sweep={"learning_rates": [1e-3, 2e-3], "max_steps": 4, "extend": 3})
    arm = losses_by(lambda rate: abs(rate - 8e-3), config)
    assert sorted({t.learning_rate for t in arm.trials}) == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    assert (arm.best.trial.learning_rate, arm.best.interior) == (8e-3, True)


@pytest.mark.parametrize(("sign", "grid"), [(-1, [1, 2, 4, 8]), (1, [0.25, 0.5, 1, 2])])
def test_a_grid_grows_as_often_as_is_allowed(make, sign, grid):
    config = make(sweep={"learning_rates": [1e-3, 2e-3], "max_steps": 4, "extend": 2})
    arm = losses_by(lambda rate: 5 + sign * rate, config)
    assert sorted({1e3 * t.learning_rate for t in arm.trials}) == pytest.approx(grid)
    assert not arm.best.interior
    assert rates(arm.waiting) == pytest.approx([1e-3 * (grid[-1] if sign < 0 else grid[0])] * 2)


def test_a_trial_that_diverged_is_one_that_lost(make):
    config = make()
    for run in arm_state(config, "vanilla").waiting:
        if run.learning_rate == 4e-3:
            ended(run, None, state="failed", message="step 3: 10 steps in a row are not finite")
        else:
            ended(run, 4.0 - 100 * run.learning_rate)
    arm = arm_state(config, "vanilla")
    assert [t.loss for t in arm.trials] == [pytest.approx(3.9), pytest.approx(3.8), None]
    assert (arm.best.trial.learning_rate, arm.best.interior) == (2e-3, True)


def test_a_full_disk_is_no_divergence_whatever_the_losses(make):
    config = make()
    run = arm_state(config, "vanilla").waiting[0]
    ended(run, 9.0, state="failed", message="[Errno 28] No space left on device")
    state = arm_state(config, "vanilla")
    assert (state.trials, run in state.waiting) == ([], True)


@pytest.mark.parametrize("text", ["", "{"])
@pytest.mark.parametrize("name", ["config.yaml", "status.json"])
def test_a_file_that_is_being_written_is_of_no_run_that_is_over(make, name, text):
    config = make()
    run = arm_state(config, "vanilla").waiting[0]
    ended(run, 4.0)
    (run.folder / name).write_text(text)
    assert run in arm_state(config, "vanilla").waiting


def test_an_arm_that_always_diverges_has_a_lower_grid_and_then_no_result(make):
    config = make(sweep={"learning_rates": [1e-3, 2e-3], "max_steps": 4, "extend": 2})
    for _ in range(3):
        for run in arm_state(config, "vanilla").waiting:
            ended(run, None, state="failed", message="10 steps in a row are not finite")
    arm = arm_state(config, "vanilla")
    assert sorted(trial.learning_rate for trial in arm.trials) == [2.5e-4, 5e-4, 1e-3, 2e-3]
    assert (arm.best, arm.final, arm.waiting, arm.hopeless) == (None, [], [], True)
    other = arm_state(config, "lpa")
    assert (len(other.waiting), other.hopeless) == (2, False)
    assert not arm_state(make(sweep={}, base=OWN_RATE), "vanilla").hopeless


def test_a_rate_below_the_grid_that_does_not_diverge_is_found(make):
    config = make(sweep={"learning_rates": [1e-3, 2e-3], "max_steps": 4, "extend": 2})
    for run in arm_state(config, "vanilla").waiting:
        ended(run, None, state="failed", message="10 steps in a row are not finite")
    for run in arm_state(config, "vanilla").waiting:
        ended(run, 4.0)
    assert rates(arm_state(config, "vanilla").waiting) == [2.5e-4]


def test_a_shorter_trial_has_a_shorter_warm_up_and_decay(make):
    training = TRAINING | {"warmup_steps": 4, "schedule": "wsd", "decay_steps": 2}
    config = make(base={"model": MODEL, "training": training})
    trial = planned(config, "lpa", 1e-3, 0, trial=True).config.training
    assert (trial.max_steps, trial.warmup_steps, trial.decay_steps) == (4, 2, 1)
    final = planned(config, "lpa", 1e-3, 1, trial=False).config.training
    assert (final.max_steps, final.warmup_steps, final.decay_steps) == (8, 4, 2)
    chosen = make(sweep={"learning_rates": [1e-3, 2e-3], "max_steps": 4, "warmup_steps": 3})
    assert planned(chosen, "lpa", 1e-3, 0, trial=True).config.training.warmup_steps == 3


def test_a_folder_has_one_name(make, tmp_path: Path):
    (tmp_path / "data").mkdir()
    ended(arm_state(make(data=str(tmp_path / "data")), "vanilla").waiting[0], 4.0)
    assert len(arm_state(make(data=f"{tmp_path}/data/"), "vanilla").trials) == 1


def test_a_run_that_outlived_its_worker_is_left_alone(make):
    import filelock

    from eval.study.work import Worker

    config = make()
    run = arm_state(config, "vanilla").waiting[0]
    run.folder.mkdir(parents=True)
    worker = Worker(config, print)
    with filelock.FileLock(run.folder / ".lock", timeout=0):
        assert not worker._take_one([run])
    assert not (run.folder / "study.yaml").exists()


def test_a_run_that_failed_is_run_again(make):
    config = make()
    run = arm_state(config, "vanilla").waiting[0]
    ended(run, 4.0, state="failed", message="no space left on device")
    assert run in arm_state(config, "vanilla").waiting
    (run.folder / "status.json").write_text(json.dumps({"state": "preempted", "step": 1}))
    assert run in arm_state(config, "vanilla").waiting


def test_trials_as_long_as_the_final_runs_are_final_runs(make):
    config = make(sweep={"learning_rates": [1e-3, 2e-3, 4e-3], "seeds": [1]})
    for run in arm_state(config, "vanilla").waiting:
        assert run.folder.parent.parent.name == "final"
        ended(run, 4 + abs(run.learning_rate - 2e-3))
    arm = arm_state(config, "vanilla")
    assert [run.seed for run in arm.final] == [1]
    assert [(run.seed, run.learning_rate) for run in arm.waiting] == [(2, 2e-3)]


def test_without_a_sweep_every_arm_has_its_own_rate(make):
    arms = {"a": {"training": {"learning_rate": 3e-3}}, "b": {"training": {"learning_rate": 1e-3}}}
    config = make(sweep={}, arms=arms, only=["b"])
    assert config.arm_names == ["b"]
    assert rates(arm_state(config, "b").waiting) == [1e-3, 1e-3]


def test_a_folder_of_other_settings_is_refused(make):
    ended(arm_state(make(), "vanilla").waiting[0], 4.0)
    config = make(base={"model": MODEL, "training": TRAINING | {"weight_decay": 0.3}})
    with pytest.raises(InputError, match=r"training\.weight_decay 0\.1, and the study says 0\.3"):
        arm_state(config, "vanilla")
    moved = make(base={"model": MODEL, "training": TRAINING | {"checkpoint_every": 2}})
    assert len(arm_state(moved, "vanilla").trials) == 1


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {}}, "arms: at least one"),
        ({"arms": {"a/b": None}}, "'a/b'"),
        ({"seeds": [1, 1]}, "seeds: .*different"),
        ({"baseline": "gpt"}, "baseline: 'gpt'; arms are vanilla, lpa"),
        ({"only": ["gpt"]}, "only: 'gpt'"),
        ({"sweep": {"learning_rates": [2e-3, 1e-3]}}, "they must rise"),
        ({"sweep": {"learning_rates": [0.0, 1e-3]}}, "greater than 0"),
        ({"sweep": {"learning_rates": [1e-3]}}, "sweep.extend"),
        ({"arms": {"a": {"r": 4}}}, r"a\.r: 4; it is a block"),
        ({"arms": {"a": {"training": {"seed": 4}}}}, r"a\.training\.seed: the study sets it"),
        ({"base": {"training": {"learning_rate": 1e-3}}}, r"base\.training\.learning_rate"),
        ({"base": {"training": {"min_learning_rate": 1e-3}}}, r"training\.min_learning_rate"),
        ({"run_dir": ""}, "run_dir: it is empty"),
        ({"sweep": {"learning_rates": [1e-3, 2e-3], "extend": -1}}, r"sweep\.extend: -1"),
    ],
)
def test_a_study_that_cannot_be_is_refused(make, changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_a_wrong_key_of_an_arm_is_named_with_the_arm(make):
    config = make(arms={"vanilla": None, "lpa": {"model": {"rank": 4}}})
    with pytest.raises(InputError, match=r"arm lpa: .*model\.rank"):
        planned(config, "lpa", 1e-3, 1, trial=False)


# --- the real thing ------------------------------------------------------------------------------


def command(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "eval.study", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait(process: subprocess.Popen[str], code: int) -> str:
    try:
        out, err = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, f"{out}\n{err}"
    return out + err


def test_smoke_study_interrupted_and_finished_by_two_workers(tmp_path: Path, prepared: Path):
    options = ["smoke.yaml", "--data", str(prepared), "--run_dir", str(tmp_path / "study")]
    first = command(*options)
    running = tmp_path / "study" / "final" / "vanilla" / "lr-0.001-seed-0" / "status.json"
    while not running.exists() and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert "start the same command again" in wait(first, 75)
    assert "no final run is over" in wait(command(*options, "--page"), 2)

    options += ["--notes", '["Two workers shared the machine."]']
    workers = [command(*options) for _ in range(2)]
    said = [wait(worker, 0) for worker in workers]
    folders = sorted(p.parent for p in (tmp_path / "study" / "final").glob("*/*/status.json"))
    assert len(folders) >= 2 * 3
    for folder in folders:
        assert json.loads((folder / "status.json").read_text())["state"] == "completed"
        name = f"{folder.parent.name}/{folder.name}: validation loss"
        assert sum(text.count(name) for text in said) == 1  # once, by one of them
    numbers = json.loads((tmp_path / "study" / "page" / "comparison.json").read_text())
    assert {arm["name"] for arm in numbers["arms"]} == {"vanilla", "lpa"}
    page = (tmp_path / "study" / "page" / "index.html").read_text()
    assert page.count("<table") >= 3
    assert "Two workers shared the machine." in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no.yaml"], "no.yaml"),
        (["smoke.yaml", "--data", "/nowhere", "--run_dir", "RUNS"], "/nowhere"),
        (["smoke.yaml", "--only", "gpt"], "gpt"),
    ],
)
def test_bad_input_ends_with_code_2(options, message, tmp_path: Path):
    options = [str(tmp_path / "runs") if one == "RUNS" else one for one in options]
    said = wait(command(*options), 2)
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said
