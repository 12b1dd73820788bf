"""Steps without a finite loss or gradient: left out, counted, and in the end a stop."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import WindowLoader
from data.shards import PreparedData
from tests.conftest import Runs, finish
from training import checkpoint
from training.engine import _with_its_gradient_not_finite
from training.guard import Guard


def status(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())


@pytest.mark.parametrize("value", [2.5, -1e-30, 0.0])
def test_a_finite_loss_keeps_its_gradient(value: float):
    loss = torch.tensor(value, requires_grad=True)
    _with_its_gradient_not_finite(loss).backward()
    assert loss.grad == 1.0
    assert torch.equal(_with_its_gradient_not_finite(loss), loss)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value: float):
    """Whatever its own gradient is: that of an infinite cross-entropy may be finite."""
    x = torch.tensor(3.0, requires_grad=True)
    (x + value).backward()
    assert x.grad == 1.0
    x.grad = None
    _with_its_gradient_not_finite(x + value).backward()
    assert x.grad.isnan()


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [(0, 1), (1, 2), pytest.param(0, 2, marks=pytest.mark.slow),
     pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_run_stops_after_so_many_steps_in_a_row(stage: int, ranks: int, runs: Runs):
    """A learning rate of 1e30 blows up the weights in the first step; later ones are left out."""
    config = runs.config(
        deepspeed__zero_stage=stage,
        training__learning_rate=1.0e30,
        training__schedule="constant",
        training__warmup_steps=0,
        training__max_steps=100,
        training__max_skipped_steps=3,
        training__log_every=100,
        training__checkpoint_every=2,
    )
    run_dir = runs.folder / "run"
    process = runs.start(config, ranks=ranks, launcher="torchrun" if ranks > 1 else "python")
    _, err = finish(process, code=2 if ranks == 1 else 1)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    for part in ("after step 4: 3 steps in a row", "learning rate 1e+30", "last losses", "lower"):
        assert part in lines[0]
    assert status(run_dir)["state"] == "failed"
    assert "3 steps in a row" in status(run_dir)["message"]
    assert checkpoint.read_state(checkpoint.newest(run_dir))["step"] == 2
    found = json.loads((run_dir / "not_finite.json").read_text())
    assert (found["step"], found["skipped_in_a_row"]) == (4, 3)
    assert [one["position"] for one in found["sequences"]] == list(range(24, 32))


def test_not_stopped_where_the_limit_is_null(runs: Runs):
    config = runs.config(
        training__learning_rate=1.0e30, training__warmup_steps=0, training__max_skipped_steps=None,
        deepspeed__zero_stage=0, data__final_split=None,
    )  # fmt: skip
    runs.train(config)
    assert status(runs.folder / "run")["state"] == "completed"


def test_the_documents_are_those_of_the_micro_batch_that_was_not_finite(
    prepared: Path, tmp_path: Path
):
    stream = PreparedData.open(prepared).split("train")
    loader = WindowLoader(stream, 32, seed=7)
    guard = Guard(limit=2, batch=8, accumulation=4)
    guard.remember(torch.tensor([3.0, 3.0, 3.0, 3.0]))
    guard.remember(torch.tensor([3.0, 3.0, math.nan, 3.0]))
    error = guard.stop(5, 2, 0.125, loader, tmp_path)
    found = json.loads((tmp_path / "not_finite.json").read_text())
    assert found["last_losses"] == [3.0, None]
    assert [one["position"] for one in found["sequences"]] == [4 * 8 + 4, 4 * 8 + 5]
    # Counted anew: a document begins at each BOS.
    tokens = stream.read(0, len(stream))
    document = np.cumsum(tokens == PreparedData.open(prepared).tokenizer.bos_id) - 1
    named = set()
    for one in found["sequences"]:
        window = loader.window_ids(one["position"], 1)[0]
        assert one["first_token"] == window * 32
        read = document[window * 32 : window * 32 + 33]
        assert one["documents"] == [read.min(), read.max()]
        named |= set(read.tolist())
    assert f"in documents {', '.join(map(str, sorted(named)))} of the training split" in str(error)
    assert "learning rate 0.125" in str(error)
    assert "\n" not in str(error)


def test_a_gradient_alone_names_the_whole_batch(prepared: Path, tmp_path: Path):
    loader = WindowLoader(PreparedData.open(prepared).split("train"), 32, seed=7)
    guard = Guard(limit=1, batch=8, accumulation=2)
    guard.remember(torch.tensor([3.0, 3.0]))
    error = guard.stop(1, 1, 0.1, loader, tmp_path)
    assert "losses were finite, the gradient was not" in str(error)
    found = json.loads((tmp_path / "not_finite.json").read_text())
    assert [one["position"] for one in found["sequences"]] == list(range(8))
