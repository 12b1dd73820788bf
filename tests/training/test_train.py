"""train.py as a user starts it: launchers, ZeRO stages, resume, signals, run directory."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from data.command_line import parse_options
from model import Transformer, init_weights
from tests.conftest import Runs, finish
from tests.training.oracle import plain_training
from training import checkpoint
from training.config import RunConfig
from training.engine import deepspeed_config


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def load(config: Path, *options: str) -> RunConfig:
    run, _ = parse_options(
        RunConfig, ["--config", str(config), *options], prog="test", description="test"
    )
    return run


def status(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


def test_training_is_that_of_a_plain_torch_loop(trained: Path):
    run = load(trained / "config.yaml")
    expected = plain_training(run, 6)
    found = metrics(trained)
    assert [m["step"] for m in found] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5)
        assert one["lr"] == other["lr"]


def test_run_directory_describes_itself(trained: Path):
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "log.txt", "final.json"):
        assert (trained / name).stat().st_size > 0
    environment = json.loads((trained / "environment.json").read_text())
    assert {"git_commit", "git_dirty", "packages", "command_line", "device"} <= set(environment)
    assert environment["threads"] >= 1
    assert environment["command_line"][0] == "train.py", "no path of the machine"
    assert environment["load_average_1min"] >= 0
    assert status(trained)["state"] == "completed"
    assert status(trained)["step"] == 6
    last = metrics(trained)[-1]
    run = load(trained / "config.yaml")
    assert last["tokens"] == 6 * run.training.global_batch_size * run.training.seq_len
    assert {"validation_loss", "validation_perplexity", "validation_bits_per_byte"} <= set(last)
    state = checkpoint.read_state(checkpoint.resolve(trained))
    assert state["position"] == 6 * run.training.global_batch_size


def test_tensorboard_shows_the_numbers_of_metrics_jsonl(trained: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(trained / "tensorboard")).Reload()
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "validation_loss"):
        shown = {e.step: e.value for e in board.Scalars(name) if e.step > 0}
        written = {m["step"]: m[name] for m in metrics(trained) if name in m}
        assert shown == pytest.approx(written, rel=1e-6)


@pytest.fixture(scope="module")
def two_rank_losses(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> dict[int, list]:
    """Metrics of each ZeRO stage on two processes."""
    found = {}
    for stage in (0, 1, 2, 3):
        runs = Runs(tmp_path_factory.mktemp(f"stage{stage}"), prepared)
        config = runs.config(deepspeed__zero_stage=stage, training__max_steps=5)
        # Stage 1 through `deepspeed` itself; torchrun starts the others in half the time.
        runs.train(config, ranks=2, launcher="deepspeed" if stage == 1 else "torchrun")
        found[stage] = metrics(runs.folder / "run")
        weights = checkpoint.newest(runs.folder / "run") / "model.safetensors"
        found[stage][-1]["weights"] = safetensors.torch.load_file(weights)
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stages_on_two_ranks_give_the_same_losses(
    stage: int, two_rank_losses: dict[int, list], runs: Runs
):
    expected = plain_training(load(runs.config(training__max_steps=5)), 5)
    found = two_rank_losses[stage]
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in expected], rel=2e-6)
    norms = [m["grad_norm"] for m in expected]
    assert [m["grad_norm"] for m in found] == pytest.approx(norms, rel=2e-5)
    reference = two_rank_losses[0][-1]["weights"]
    for name, weight in found[-1]["weights"].items():
        assert weight.shape == reference[name].shape
        assert (weight - reference[name]).abs().max() < 2e-5, name


CASES = [
    pytest.param({"deepspeed__zero_stage": 0, "model__family": "paper-1"}, 1, id="dropout-stage0"),
    *[
        pytest.param(
            {"deepspeed__zero_stage": stage, "training__precision": precision},
            ranks,
            id=f"{precision}-stage{stage}-{ranks}ranks",
            marks=pytest.mark.slow,
        )
        for stage in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
        for ranks in (1, 2)
    ],
]


@pytest.mark.parametrize(("changes", "ranks"), CASES)
def test_resumed_run_is_one_that_never_stopped(changes: dict[str, Any], ranks: int, runs: Runs):
    """Stopped after step 2, and after step 5, twice in a row."""
    config = runs.config(training__checkpoint_every=1, training__keep_checkpoints=None, **changes)
    launcher = "python" if ranks == 1 else "torchrun"
    runs.train(config, ranks=ranks, launcher=launcher)
    run_dir = runs.folder / "run"
    straight = metrics(run_dir)
    straight_weights = (run_dir / "checkpoints/step-00000006/model.safetensors").read_bytes()
    for stopped in (2, 5):
        for step in range(stopped + 1, 7):
            shutil.rmtree(run_dir / f"checkpoints/step-{step:08d}")
        out, _ = runs.train(config, ranks=ranks, launcher=launcher)
        assert f"resumed from {run_dir}/checkpoints/step-{stopped:08d}" in out
        again = metrics(run_dir)
        for key in ("step", "loss", "lr", "grad_norm", "tokens"):
            assert [m[key] for m in again] == [m[key] for m in straight]
        weights = (run_dir / "checkpoints/step-00000006/model.safetensors").read_bytes()
        assert weights == straight_weights


MOVES = [
    pytest.param((1, 2), (3, 1), id="stage1-2ranks-to-stage3-1rank"),
    *[
        pytest.param(before, after, id=f"{before}-{after}", marks=pytest.mark.slow)
        for before, after in (
            ((1, 1), (1, 2)), ((3, 2), (0, 1)), ((0, 1), (3, 2)), ((2, 2), (1, 4)), ((0, 2), (2, 1))
        )
    ],
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_resumed_with_other_ranks_and_another_stage(
    before: tuple[int, int], after: tuple[int, int], runs: Runs
):
    """There and back again: the losses are those of a run that never moved, but for rounding."""

    def go(stage: int, ranks: int, steps: int) -> str:
        config = runs.config(
            training__max_steps=steps, training__checkpoint_every=2, training__schedule="constant",
            deepspeed__zero_stage=stage,
        )  # fmt: skip
        return runs.train(config, ranks=ranks, launcher="torchrun" if ranks > 1 else "python")[0]

    go(*before, 2)
    out = go(*after, 4)
    assert f"zero_stage was {before[0]}, now it is {after[0]}" in out or before[0] == after[0]
    assert f"world_size was {before[1]}, now it is {after[1]}" in out or before[1] == after[1]
    go(*before, 6)
    found = metrics(runs.folder / "run")
    config = runs.config(training__max_steps=6, training__schedule="constant")
    expected = plain_training(load(config), 6)
    assert [m["step"] for m in found] == [1, 2, 3, 4, 5, 6]
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in expected], rel=2e-6)
    norms = [m["grad_norm"] for m in expected]
    assert [m["grad_norm"] for m in found] == pytest.approx(norms, rel=2e-5)


def wait_for_steps(process: Any, run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        path = run_dir / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= steps:
            return
        time.sleep(0.05)
    raise AssertionError(f"{steps} steps were not reached")


def test_signal_saves_and_a_second_run_is_refused_meanwhile(runs: Runs):
    config = runs.config(training__max_steps=100_000, training__checkpoint_every=0)
    run_dir = runs.folder / "run"
    process = runs.start(config)
    wait_for_steps(process, run_dir, 2)
    assert status(run_dir)["state"] == "running"
    _, err = runs.train(config, code=2)
    assert err.count("\n") == 1
    assert "another run is using it" in err
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    stopped = status(run_dir)
    assert stopped["state"] == "preempted"
    assert checkpoint.read_state(checkpoint.newest(run_dir))["step"] == stopped["step"]
    steps = stopped["step"] + 2
    runs.train(config, "--training.max_steps", str(steps))
    assert status(run_dir)["state"] == "completed"
    assert [m["step"] for m in metrics(run_dir)] == list(range(1, steps + 1))


@pytest.mark.slow
def test_signal_to_one_of_two_ranks_stops_both(runs: Runs):
    import psutil

    config = runs.config(training__max_steps=100_000)
    process = runs.start(config, ranks=2, launcher="deepspeed")
    wait_for_steps(process, runs.folder / "run", 2)
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [c for c in children if c.environ().get("RANK") == "1"]
    ranks[-1].send_signal(signal.SIGUSR1)
    finish(process, code=75)
    assert status(runs.folder / "run")["state"] == "preempted"


def test_finished_run_trains_no_further(trained: Path, tmp_path: Path, prepared: Path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    runs = Runs(tmp_path, prepared)
    before = (copy / "metrics.jsonl").read_text()
    runs.train(copy / "config.yaml", "--training.run_dir", str(copy))
    assert (copy / "metrics.jsonl").read_text() == before
    assert status(copy)["state"] == "completed"


def test_config_yaml_of_a_run_is_the_configuration_it_had(trained: Path):
    written = yaml.safe_load((trained / "config.yaml").read_text())
    assert written["model"]["r"] == 8
    assert written["training"]["beta2"] == 0.95, "defaults are written too"
    assert written["deepspeed"]["zero_stage"] == 1


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_step_without_a_finite_gradient_is_left_out_and_counted(stage: int, runs: Runs):
    """A learning rate of 1e30 blows up the weights in the first step; later ones are skipped."""
    config = runs.config(
        deepspeed__zero_stage=stage,
        data__final_split=None,
        training__learning_rate=1.0e30,
        training__warmup_steps=0,
        training__max_steps=3,
    )
    runs.train(config)
    found = metrics(runs.folder / "run")
    assert [m["skipped_steps"] for m in found] == [0, 1, 2]
    assert found[-1]["loss"] is None or found[-1]["grad_norm"] is None
    weights = checkpoint.newest(runs.folder / "run") / "model.safetensors"
    for name, weight in safetensors.torch.load_file(weights).items():
        assert weight.isfinite().all(), name


@pytest.mark.slow
def test_run_begun_from_another_ones_checkpoint(trained: Path, runs: Runs):
    """It takes the settings of its own configuration, and goes on from its own checkpoints."""
    source = str(trained / "checkpoints" / "step-00000003")
    config = runs.config(training__max_steps=5, training__learning_rate=1e-3)
    options = ["--training.resume", source, "--training.weight_decay", "0.5"]
    runs.train(config, *options)
    found = metrics(runs.folder / "run")
    assert [m["step"] for m in found] == [4, 5]
    out, _ = runs.train(config, *options, "--training.max_steps", "6")
    assert "step-00000005" in out
    assert metrics(runs.folder / "run")[0] == found[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizer_gives_the_same_losses(stage: int, runs: Runs):
    config = runs.config(deepspeed__zero_stage=stage, deepspeed__offload_optimizer="cpu")
    runs.train(config)
    expected = [m["loss"] for m in plain_training(load(config), 6)]
    assert [m["loss"] for m in metrics(runs.folder / "run")] == pytest.approx(expected, rel=2e-6)


def test_options_overrule_the_file_whatever_their_order(runs: Runs):
    run = load(runs.config())
    config = str(runs.config())
    before, _ = parse_options(
        RunConfig, ["--training.seed", "9", "--config", config], prog="test", description="test"
    )
    assert (before.training.seed, run.training.seed) == (9, 5)


@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=pytest.mark.slow if s > 1 else ()) for s in (1, 2, 3)]
)
def test_bf16_begins_from_the_fp32_weights(stage: int, runs: Runs):
    """At a learning rate of almost nothing the master weights stay what they were at first."""
    config = runs.config(
        deepspeed__zero_stage=stage,
        training__precision="bf16",
        training__learning_rate=1.0e-30,
        training__max_steps=1,
        data__final_split=None,
    )
    run = load(config)
    runs.train(config, ranks=2, launcher="torchrun")
    weights = checkpoint.newest(runs.folder / "run") / "model.safetensors"
    expected = Transformer(run.model)
    init_weights(expected, run.training.seed)
    found = safetensors.torch.load_file(weights)
    for name, parameter in expected.named_parameters():
        assert torch.equal(found[name], parameter.detach()), name


def test_gradients_of_bf16_are_summed_over_ranks_in_fp32(runs: Runs):
    run = load(runs.config(training__precision="bf16"))
    assert deepspeed_config(run, 2)["communication_data_type"] == "fp32"
