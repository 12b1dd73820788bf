"""Writing checkpoints in the background, and what the speed of a run says of it."""

import gc
import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.errors import InputError
from data.loader import WindowLoader, rank_slice
from data.shards import PreparedData
from model import ModelConfig
from tests.conftest import Runs
from training import checkpoint, full_state, saving
from training.batches import Batches
from training.clock import PHASES, StepClock
from training.config import RunConfig, TrainingConfig
from training.garbage import GarbageCollection
from training.profile import parse_steps
from training.saving import Saver

MODEL = ModelConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, r=4
)


@pytest.fixture
def saver(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Saver:
    """A saver in the background of a state that is one tensor a kind."""
    monkeypatch.setattr(
        full_state,
        "gather",
        lambda engine: iter((kind, "w", engine.value.clone()) for kind in full_state.KINDS),
    )
    monkeypatch.setattr(full_state, "steps_taken", lambda _: 1)
    engine = SimpleNamespace(run=SimpleNamespace(model=MODEL), value=torch.ones(3))
    tokenizer = PreparedData.open(prepared).tokenizer
    return Saver(engine, tmp_path, tokenizer, keep=2, keep_every=None, in_background=True)  # type: ignore[arg-type]


def slow(monkeypatch: pytest.MonkeyPatch, begin: dict) -> None:
    """Makes the writing wait until it is let go."""
    write = saving._write_files

    def waiting(*args: object) -> int:
        while not begin:
            time.sleep(0.01)
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "_write_files", waiting)


def test_training_goes_on_while_a_checkpoint_is_written(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begin: dict = {}
    slow(monkeypatch, begin)
    times = iter([10.0, 12.0, 17.0])  # begun, gathered, written
    monkeypatch.setattr(saving, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    saver.save({"step": 1})
    assert checkpoint.newest(tmp_path) is None
    assert saver.take_written() is None
    saver.engine.value.zero_()  # the training steps on
    begin["now"] = True
    saver.finish()
    folder = checkpoint.newest(tmp_path)
    assert checkpoint.read_state(folder)["step"] == 1
    written = saver.take_written()
    assert written.folder == folder
    assert written.bytes == sum(
        p.stat().st_size for p in folder.iterdir() if p.name != "checkpoint.json"
    )
    assert (written.seconds, written.blocked_seconds) == (7, 2)
    assert saver.take_written() is None
    import safetensors.torch

    assert safetensors.torch.load_file(folder / "model.safetensors")["w"].tolist() == [1, 1, 1]


def test_a_save_waits_for_the_one_before_and_old_ones_go(saver: Saver, tmp_path: Path):
    for step in (1, 2, 3):
        saver.save({"step": step})
    saver.finish()
    assert [p.name for p in checkpoint.candidates(tmp_path)] == ["step-00000003", "step-00000002"]


def test_a_failure_in_the_background_is_told_and_leaves_nothing(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saver.save({"step": 1})
    saver.finish()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "_write_files", full)
    saver.save({"step": 2})
    saver.wait()
    assert saver.failed()
    with pytest.raises(InputError, match=r"step-00000002: .*No space left.*free space and start"):
        saver.finish()
    assert not saver.failed()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_defect_in_the_background_is_not_hidden(saver: Saver, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> int:
        raise KeyError("a defect")

    monkeypatch.setattr(saving, "_write_files", broken)
    saver.save({"step": 1})
    with pytest.raises(KeyError, match="a defect"):
        saver.finish()


def run_config(**training: object) -> RunConfig:
    base = {"run_dir": "", "max_steps": 5, "global_batch_size": 8, "seq_len": 16}
    settings = TrainingConfig(**(base | {"learning_rate": 0.1} | training))  # type: ignore[arg-type]
    return RunConfig(
        ModelConfig(
            vocab_size=400, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2
        ),
        settings,
    )


def test_batches_are_those_of_the_loader_from_any_step_on(prepared: Path):
    loader = WindowLoader(PreparedData.open(prepared).split("train"), 16, seed=3)
    device = torch.device("cpu")
    clock = StepClock(device, 0)
    batches = Batches(run_config(), loader, device, accumulation=2, first_step=2)
    found = [batches.next(clock) for _ in range(6)]
    expected = [
        torch.from_numpy(loader.batch(*place))
        for step in (2, 3, 4)
        for place in rank_slice(step, 8, 1, 0, 2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(AssertionError, match="no step is left"):
        batches.next(clock)
    batches.close()


def test_a_token_that_the_model_does_not_have_is_an_error(prepared: Path):
    loader = WindowLoader(PreparedData.open(prepared).split("train"), 16, seed=3)
    run = run_config()
    run.model.vocab_size = 5
    batches = Batches(run, loader, torch.device("cpu"), accumulation=1, first_step=0)
    with pytest.raises(InputError, match=r"holds token id \d+; model.vocab_size is 5"):
        batches.next(StepClock(torch.device("cpu"), 0))
    batches.close()


def test_garbage_is_collected_at_the_steps_asked_for():
    collected: list[int] = []
    step = 0

    def watch(phase: str, _: dict) -> None:
        if phase == "start":
            collected.append(step)

    garbage = GarbageCollection(3)
    gc.callbacks.append(watch)
    try:
        assert not gc.isenabled()
        for step in range(1, 8):
            [[] for _ in range(5000)]
            garbage.step(step)
    finally:
        gc.callbacks.remove(watch)
        garbage.close()
    assert collected == [3, 6]
    assert gc.isenabled()


def test_garbage_is_left_to_python_where_asked():
    GarbageCollection(None).step(1)
    assert gc.isenabled()


@pytest.mark.parametrize(("text", "steps"), [("3", (3, 3)), ("3-5", (3, 5)), ("1-9", (1, 9))])
def test_profiled_steps(text: str, steps: tuple[int, int]):
    assert parse_steps(text, 9) == steps


@pytest.mark.parametrize("text", ["", "0", "5-3", "9-10", "1-2-3", "-3", "a"])
def test_profiled_steps_that_are_none(text: str):
    with pytest.raises(InputError, match=r"--profile: .*from 1 to training.max_steps 9"):
        parse_steps(text, 9)


def test_a_run_says_where_its_time_went(runs: Runs):
    config = runs.config(
        training__max_steps=9,
        training__untimed_steps=4,
        training__validate_every=3,
        training__log_every=2,
        data__final_split=None,
    )
    out, _ = runs.train(config, "--profile", "6-7", ranks=2, launcher="torchrun")
    run_dir = runs.folder / "run"
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        parts = sum(record[f"{name}_seconds"] for name in PHASES)
        assert 0 < parts <= record["seconds_per_step"] * 1.001
        assert min(record[f"{name}_seconds"] for name in PHASES) >= 0
        assert record["tokens_per_second"] == pytest.approx(8 * 32 / record["seconds_per_step"])
        assert record["data_wait_share"] == record["data_seconds"] / record["seconds_per_step"]
        assert len(record["peak_memory_bytes_by_rank"]) == 2
        assert record["peak_memory_bytes"] == max(record["peak_memory_bytes_by_rank"])
    # Windows: 1 | 2 | 3 | 4 | (5, 6) | (7, 8) | 9: those after step 4 without a traced step count.
    counted = records[-1:]
    steps = [r["step"] for r in records]
    assert steps == [1, 2, 3, 4, 6, 8, 9]
    assert all(r["mean_tokens_per_second"] is None for r in records if r["step"] <= 8)
    whole = json.loads((run_dir / "throughput.json").read_text())
    assert whole["steps"] == 1
    assert whole["seconds_per_step"] == pytest.approx(counted[-1]["seconds_per_step"])
    assert counted[-1]["mean_tokens_per_second"] == pytest.approx(whole["tokens_per_second"])
    assert whole["checkpoints_saved"] == 3
    assert whole["checkpoint_blocked_seconds_median"] <= whole["checkpoint_seconds_median"]
    assert "mean of 1 steps, without the first 4" in out
    for rank in (0, 1):
        trace = run_dir / "profile" / f"steps-6-7-rank{rank}.json.gz"
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        assert any(event.get("name") == "aten::mm" for event in events)
        assert "aten::mm" in trace.with_suffix("").with_suffix(".txt").read_text()


def test_tensorboard_has_the_memory_of_each_rank(trained: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(trained / "tensorboard")).Reload()
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    shown = board.Scalars("peak_memory_bytes_by_rank/0")[-1]
    assert (shown.step, shown.value) == (6, pytest.approx(last["peak_memory_bytes_by_rank"][0]))
