"""The execution block under DeepSpeed: the same losses, and a log that says what ran."""

import json
from typing import Any

import pytest

from data.command_line import parse_options
from tests.conftest import Runs
from tests.training.oracle import plain_training
from training.config import RunConfig

REBUILD = {"execution__recompute_qkv": True, "execution__recompute_ffn": True}
FUSED = {"execution__kernels": "triton"}
COMPILED = {"execution__compile": "on"}
BLOCKS = {"execution__recompute_blocks": True}
DOCUMENTS = {"model__document_start_id": 1}


def case(name: str, stage: int, ranks: int, fast: bool = False, **changes: Any) -> Any:
    marks = () if fast else pytest.mark.slow
    values = {"deepspeed__zero_stage": stage, **changes}
    return pytest.param(values, ranks, id=f"{name}-stage{stage}-{ranks}ranks", marks=marks)


CASES = [
    case("fused-rebuilt-documents", 3, 2, fast=True, **FUSED, **REBUILD, **DOCUMENTS),
    case("fused", 0, 1, fast=True, **FUSED),
    *[case("fused-rebuilt", stage, 2, **FUSED, **REBUILD) for stage in (0, 1, 2, 3)],
    *[case("fused-compiled", stage, 2, **FUSED, **COMPILED) for stage in (0, 1, 2, 3)],
    *[case("compiled", stage, 2, **COMPILED) for stage in (1, 3)],
    *[case("blocks", stage, 2, **FUSED, **BLOCKS) for stage in (1, 3)],
    case("compiled-rebuilt", 3, 2, **FUSED, **COMPILED, **REBUILD),
    case("vanilla-fused", 3, 2, **FUSED, model__r=None),
    case("small-chunks", 3, 2, **FUSED, execution__loss_chunk_tokens=7),
]


@pytest.mark.parametrize(("changes", "ranks"), CASES)
def test_losses_are_those_of_plain_torch(changes: dict[str, Any], ranks: int, runs: Runs):
    config = runs.config(training__max_steps=4, training__checkpoint_every=0, **changes)
    run, _ = parse_options(RunConfig, ["--config", str(config)], prog="test", description="test")
    expected = plain_training(run, 4)
    runs.train(config, ranks=ranks, launcher="torchrun" if ranks > 1 else "python")
    lines = (runs.folder / "run/metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    losses, norms = ([m[key] for m in expected] for key in ("loss", "grad_norm"))
    assert [m["loss"] for m in found] == pytest.approx(losses, rel=2e-6)
    assert [m["grad_norm"] for m in found] == pytest.approx(norms, rel=2e-5)


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_bf16_is_as_near_to_fp32_as_unfused(stage: int, runs: Runs):
    """Stage 0 is autocast over fp32 weights, whose residual stream must stay in fp32."""
    found = {}
    for name, changes in {
        "fp32": {},
        "plain": {"training__precision": "bf16"},
        "fused": {"training__precision": "bf16", **FUSED},
    }.items():
        config = runs.config(
            name, training__max_steps=4, deepspeed__zero_stage=stage, data__final_split=None,
            training__learning_rate=1e-3, **changes,
        )  # fmt: skip
        runs.train(config)
        text = (runs.folder / name / "metrics.jsonl").read_text()
        found[name] = [json.loads(line)["loss"] for line in text.splitlines()]
    error = {
        name: max(abs(a - b) for a, b in zip(found[name], found["fp32"], strict=True))
        for name in ("plain", "fused")
    }
    assert 0 < error["fused"] <= 2 * error["plain"] + 1e-3


def test_the_log_says_what_runs_where(runs: Runs):
    config = runs.config(training__max_steps=1, **FUSED, execution__attention="math", **REBUILD)
    runs.train(config)
    log = (runs.folder / "run/log.txt").read_text()
    assert "fused operators; plain torch inside (the device is cpu): norm, norm + down" in log
    assert "attention: torch SDPA (math)" in log
    assert "blocks: not compiled (auto, on cpu)" in log
    assert "backward: q, k, v and attention, which math computes in pieces; the FFN's norm" in log


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execution__attention": "cudnn"}, "execution.attention: cudnn needs a GPU"),
        ({"execution__loss": "liger"}, "execution.loss: liger needs a GPU; the device is cpu"),
        (
            {"execution__kernels": "triton", "model__family": "paper-1"},
            "execution.kernels: triton, but family paper-1 has no fused layer",
        ),
    ],
)
def test_what_cannot_be_had_is_one_line(changes: dict[str, Any], message: str, runs: Runs):
    _, err = runs.train(runs.config(**changes), code=2)
    assert [line for line in err.splitlines() if message in line]
    assert "Traceback" not in err


def test_settings_without_effect_are_named(runs: Runs):
    config = runs.config(training__max_steps=1, **REBUILD, **BLOCKS)
    runs.train(config)
    log = (runs.folder / "run/log.txt").read_text()
    assert "warning: execution.recompute_qkv and recompute_ffn have no effect" in log
