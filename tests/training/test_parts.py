"""The small parts of the loop: peaks, batch arithmetic, what is reported."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.errors import InputError
from tests.conftest import ROOT
from training import distributed
from training.config import TrainingConfig
from training.hardware import peak_flops, peak_memory_bytes
from training.metrics import Metrics


def settings(**changes: object) -> TrainingConfig:
    base = {
        "run_dir": "",
        "max_steps": 9,
        "global_batch_size": 24,
        "seq_len": 8,
        "learning_rate": 0.1,
    }
    return TrainingConfig(**(base | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA GeForce GTX 1080", None),
        ("Intel(R) Xeon(R) Processor", None),
    ],
)
def test_peak_is_the_dense_bf16_one_of_the_device(name: str, peak: float | None):
    assert peak_flops(name) == peak


@pytest.mark.parametrize(
    ("micro", "ranks", "accumulation"), [(2, 3, 4), (24, 1, 1), (None, 4, 1), (None, 1, 1)]
)
def test_accumulation_is_what_is_left_of_the_batch(
    micro: int | None, ranks: int, accumulation: int
):
    assert settings(micro_batch_size=micro).accumulation(ranks) == accumulation


@pytest.mark.parametrize(("micro", "ranks"), [(5, 1), (2, 5), (None, 5), (None, 48), (24, 2)])
def test_batch_that_does_not_divide_is_refused(micro: int | None, ranks: int):
    with pytest.raises(InputError, match=r"training\.global_batch_size: 24"):
        settings(micro_batch_size=micro).accumulation(ranks)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"warmup_steps": 9}, "warmup_steps 9"),
        ({"schedule": "wsd"}, "never decays"),
        ({"schedule": "wsd", "decay_steps": 3}, None),
        ({"decay_steps": 3}, "decay_steps has no effect with schedule cosine"),
        ({"schedule": "constant", "min_learning_rate": 0.1}, "min_learning_rate"),
    ],
)
def test_settings_without_effect_are_warned_of(changes: dict, expected: str | None):
    found = settings(**changes).warnings()
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]


def record(step: int, **changes: object) -> dict:
    values = {"step": step, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 10.0}
    values |= {"mfu": None, "peak_memory_bytes": 2**30, "data_wait_share": 0.5, "eta_seconds": 61}
    return values | {"skipped_steps": 0} | changes


def test_metrics_after_the_checkpoint_are_replaced_and_not_finite_ones_are_null(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    log = logging.getLogger("test_metrics")
    first = Metrics(tmp_path, log, 0, 5)
    for step in (1, 2, 3):
        first.record(record(step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss"')  # a run that was killed while it wrote
    again = Metrics(tmp_path, log, 2, 5)
    with caplog.at_level(logging.INFO):
        again.record(record(3, loss=math.nan, skipped_steps=1))
        again.record(record(5, mfu=0.5))
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (1, 2.0),
        (2, 2.0),
        (3, None),
        (5, 2.0),
    ]
    assert "step 5/5 | loss 2.0000 | lr 1.00e-01 | norm 1.000 | 10 tok/s | mfu 50.0%" in caplog.text
    assert "eta 1:01" in caplog.text
    assert "1 steps skipped" in caplog.text


def test_other_ranks_report_nothing(tmp_path: Path):
    silent = Metrics(None, logging.getLogger("silent"), 0, 5)
    silent.record(record(1))
    silent.advance(1)
    silent.scalars(1, {"a": 1.0})
    silent.close()
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_bound_to_a_core_has_one_thread():
    """As by taskset: two threads on one core wait for each other."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert distributed._cpu_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert 1 <= distributed._cpu_cores() <= len(before)


def test_peak_memory_is_that_of_the_process_alone():
    """Not of the process that started it, whose largest size getrusage would give."""
    program = "from training.hardware import *; print(peak_memory_bytes(torch.device('cpu')))"
    large = bytearray(b"x") * (1 << 30)
    here = peak_memory_bytes(torch.device("cpu"))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(large) < here
    assert 1 << 26 < int(done.stdout) < here - (1 << 29)
