"""What training.suggest says: the law against numbers by hand, what N and D count, warnings."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data.command_line import parse_options
from data.errors import InputError
from model import ModelConfig, Transformer
from training import suggest as command
from training.config import CONFIG_FOLDER, RunConfig, TrainingConfig
from training.suggest import (
    batch_tokens,
    counted_parameters,
    describe,
    peak_learning_rate,
    round_batch,
    suggest,
    warnings,
)

ROOT = CONFIG_FOLDER.parent
KEYS = {
    "n_parameters",
    "d_tokens",
    "d_over_n_tokens_per_parameter",
    "suggested_peak_learning_rate",
    "suggested_batch_tokens",
    "suggested_batch_sequences",
    "rounded_batch_sequences",
    "rounded_batch_multiple_of_sequences",
    "rounded_batch_tokens",
    "rounded_batch_steps_to_d",
    "configured_peak_learning_rate",
    "configured_batch_tokens",
    "configured_batch_sequences",
    "configured_steps",
    "suggested_over_configured_learning_rate",
    "suggested_over_configured_batch",
    "warnings",
}
EXTRAPOLATION = "the law was fitted on dense models: for low-rank ones (LPA) it is an extrapolation"


def load(name: str, *options: str) -> RunConfig:
    return parse_options(
        RunConfig,
        ["--config", name, *options],
        prog="python -m training.suggest",
        description="",
        config_folder=CONFIG_FOLDER,
    )[0]


def fitted_run(
    shape: tuple[int, int, int, int] = (1280, 9472, 10, 10), steps: int = 62_500, **changes: Any
) -> RunConfig:
    """A run like those that the law was fitted on: shape is width, FFN width, heads, layers.

    A step is 125 · 2048 = 256,000 tokens, so that 15,625 steps are 4e9 of them.
    """
    width, inner, heads, layers = shape
    model = {"vocab_size": 100, "max_seq_len": 2048} | {
        key: changes.pop(key) for key in ("r", "family") if key in changes
    }
    training = {
        "run_dir": "run",
        "max_steps": steps,
        "global_batch_size": 125,
        "seq_len": 2048,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-5,
    }
    return RunConfig(
        model=ModelConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_heads=heads,
            num_layers=layers,
            **model,  # type: ignore[arg-type]
        ),
        training=TrainingConfig(**(training | changes)),  # type: ignore[arg-type]
    )


# log10 of the rate: log10 1.79 - 0.713 log10 N + 0.307 log10 D, log10 1.79 = 0.2528530;
# of the batch: log10 0.58 + 0.571 log10 D, log10 0.58 = -0.2365720.
@pytest.mark.parametrize(
    ("n", "d", "log10_rate", "log10_batch"),
    [
        (1.0, 1.0, 0.2528530, -0.2365720),
        (1e8, 1e10, 0.2528530 - 5.704 + 3.070, -0.2365720 + 5.710),
        (1e9, 1e9, 0.2528530 - 6.417 + 2.763, -0.2365720 + 5.139),
        (1e9, 1e11, 0.2528530 - 6.417 + 3.377, -0.2365720 + 6.281),
        # log10 2^30 = 9.0308999, log10 2e10 = 10.3010300
        (2**30, 2e10, 0.2528530 - 6.4390316 + 3.1624162, -0.2365720 + 5.8818881),
    ],
)
def test_formula_by_hand(n: float, d: float, log10_rate: float, log10_batch: float):
    # The terms above are rounded to 7 decimals, three of them at most.
    assert math.log10(peak_learning_rate(n, d)) == pytest.approx(log10_rate, abs=2e-7)
    assert math.log10(batch_tokens(d)) == pytest.approx(log10_batch, abs=2e-7)


def test_rate_falls_with_n_and_rises_with_d_and_batch_rises_with_d():
    sizes = [10.0**k for k in range(6, 13)]
    by_n = [peak_learning_rate(n, 1e10) for n in sizes]
    by_d = [peak_learning_rate(1e9, d) for d in sizes]
    batches = [batch_tokens(d) for d in sizes]
    assert by_n == sorted(by_n, reverse=True)
    assert by_d == sorted(by_d)
    assert batches == sorted(batches)
    assert all(len(set(values)) == len(sizes) for values in (by_n, by_d, batches))


# The shapes and N of the authors' table of runs.
@pytest.mark.parametrize(
    ("shape", "n"),
    [
        ((960, 9368, 15, 7), 214_663_680),
        ((1024, 9552, 16, 8), 268_304_384),
        ((1280, 9472, 10, 10), 429_260_800),
        ((1280, 9048, 10, 13), 536_872_960),
        ((2048, 8192, 16, 16), 1_073_741_824),
    ],
)
def test_n_is_that_of_the_authors_runs(shape: tuple[int, int, int, int], n: int):
    assert suggest(fitted_run(shape))["n_parameters"] == n


@pytest.mark.parametrize(
    "changes", [{}, {"r": 4}, {"r": 4, "family": "paper-1"}, {"num_kv_heads": 1, "r": 2}]
)
def test_n_counts_the_matrices_of_the_blocks_and_nothing_else(changes: dict[str, Any]):
    small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24}
    config = ModelConfig(**(small | {"num_layers": 3, "num_heads": 2} | changes))
    with torch.device("meta"):
        blocks = Transformer(config).layers
    matrices = sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    assert counted_parameters(config) == matrices


def test_lpa_370m_by_hand():
    result = suggest(load("lpa_370m.yaml"))
    n = 24 * (4 * 256 * (1024 + 1024) + 3 * 1024 * 2736)
    d = 14_000 * 512 * 1024
    assert (result["n_parameters"], result["d_tokens"]) == (n, d)
    # log10 N = 8.401489, log10 D = 9.865698
    rate = 10 ** (0.252853 - 0.713 * 8.401489 + 0.307 * 9.865698)
    tokens = 10 ** (-0.236572 + 0.571 * 9.865698)
    assert result["suggested_peak_learning_rate"] == pytest.approx(rate, rel=5e-6)
    assert result["suggested_batch_tokens"] == pytest.approx(tokens, rel=5e-6)
    assert result["suggested_batch_sequences"] == pytest.approx(tokens / 1024, rel=5e-6)
    assert result["d_over_n_tokens_per_parameter"] == pytest.approx(d / n)
    assert result["configured_peak_learning_rate"] == 8e-4
    assert result["configured_batch_sequences"] == 512
    assert result["configured_batch_tokens"] == 512 * 1024
    assert result["configured_steps"] == 14_000
    assert result["suggested_over_configured_learning_rate"] == pytest.approx(rate / 8e-4, rel=5e-6)
    assert result["suggested_over_configured_batch"] == pytest.approx(
        tokens / (512 * 1024), rel=5e-6
    )
    # 243.5 sequences: 2 · 8 ranks · 16; half the configured batch takes twice the steps.
    assert result["rounded_batch_sequences"] == 256
    assert result["rounded_batch_multiple_of_sequences"] == 128
    assert result["rounded_batch_tokens"] == 256 * 1024
    assert result["rounded_batch_steps_to_d"] == 28_000


def test_vanilla_twin_differs_in_n_alone():
    lpa, vanilla = suggest(load("lpa_370m.yaml")), suggest(load("transformer_370m.yaml"))
    assert vanilla["n_parameters"] == 24 * (4 * 1024**2 + 3 * 1024 * 2736)
    assert vanilla["d_tokens"] == lpa["d_tokens"]
    assert vanilla["suggested_batch_tokens"] == lpa["suggested_batch_tokens"]
    assert vanilla["suggested_peak_learning_rate"] < lpa["suggested_peak_learning_rate"]


@pytest.mark.parametrize(
    ("option", "n", "d"),
    [
        ("--model.num_layers=12", 126_025_728, 7_340_032_000),
        ("--model.r=null", 302_383_104, 7_340_032_000),
        ("--model.vocab_size=50000", 252_051_456, 7_340_032_000),
        ("--training.max_steps=7000", 252_051_456, 3_670_016_000),
        ("--training.global_batch_size=256", 252_051_456, 3_670_016_000),
        ("--training.seq_len=2048", 252_051_456, 14_680_064_000),
    ],
)
def test_options_change_n_and_d(option: str, n: int, d: int):
    result = suggest(load("lpa_370m.yaml", option))
    assert (result["n_parameters"], result["d_tokens"]) == (n, d)


@pytest.mark.parametrize(
    ("sequences", "micro", "rounded", "multiple"),
    [
        (243.5, 16, 256, 128),  # 8 ranks: 5 % more
        (180.0, 16, 192, 64),  # 8 ranks would take 128, 29 % less
        (6.1, 1, 6, 2),
        (80.0, 9, 72, 72),  # 10 % less, still taken
        (79.0, 10, 80, 80),
        (80.1, 9, 81, 9),  # 72 is over 10 % less
        (20.0, 16, 16, 16),  # nothing is near: the nearest multiple of a micro-batch
        (3.0, 16, 16, 16),  # at least one micro-batch
    ],
)
def test_rounded_batch(sequences: float, micro: int, rounded: int, multiple: int):
    assert round_batch(sequences, micro) == (rounded, multiple)


@pytest.mark.parametrize("micro", [1, 6, 16])
@pytest.mark.parametrize("sequences", [0.4, 7.0, 33.3, 100.0, 1000.0])
def test_train_accepts_the_rounded_batch(sequences: float, micro: int):
    rounded, multiple = round_batch(sequences, micro)
    run = fitted_run(global_batch_size=rounded, micro_batch_size=micro)
    ranks = multiple // micro
    assert ranks * micro * run.training.accumulation(ranks) == rounded


# Smallest and largest values of the authors' table.
@pytest.mark.parametrize(
    ("key", "low", "high", "name"),
    [
        ("n_parameters", 214_663_680, 1_073_741_824, "N, parameters: "),
        ("d_tokens", 4_000_000_000, 100_000_000_000, "D, tokens: "),
        (
            "d_over_n_tokens_per_parameter",
            10_000_000_000 / 536_872_960,
            100_000_000_000 / 214_663_680,
            "D/N, tokens per parameter: ",
        ),
        ("suggested_peak_learning_rate", 0.0002441, 0.0221, "suggested peak learning rate: "),
        ("suggested_batch_tokens", 16 * 2048, 2048 * 2048, "suggested batch, tokens: "),
    ],
)
def test_warning_of_a_quantity_begins_just_outside_of_its_range(
    key: str, low: float, high: float, name: str
):
    run = fitted_run()
    inside = suggest(run)
    assert inside["warnings"] == []
    for bound, beyond in ((low, -math.inf), (high, math.inf)):
        assert warnings(run, inside | {key: bound}) == []
        found = warnings(run, inside | {key: math.nextafter(bound, beyond)})
        assert len(found) == 1
        assert found[0].startswith(name)
    assert "214,663,680 to 1,073,741,824" in warnings(run, inside | {"n_parameters": 1})[0]


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (fitted_run((960, 9368, 15, 7), steps=15_625), []),  # the smallest N and D
        (fitted_run((960, 9367, 15, 7), steps=15_625), ["N, parameters"]),
        (fitted_run((960, 9368, 15, 7), steps=15_624), ["D, tokens"]),
        (fitted_run((2048, 8192, 16, 16), steps=390_625), []),  # the largest N and D
        (fitted_run((2048, 8193, 16, 16), steps=390_625), ["N, parameters"]),
        (fitted_run((2048, 8192, 16, 16), steps=390_626), ["D, tokens"]),
        (fitted_run((960, 9368, 15, 7), steps=390_625), []),  # the most tokens per parameter
        (fitted_run((2048, 8192, 16, 16), steps=15_625), ["D/N"]),  # 3.7 of them
        (fitted_run(seq_len=2047), ["training.seq_len"]),
        (fitted_run(min_learning_rate=1.1e-5), ["training.min_learning_rate"]),
        (fitted_run(min_learning_rate=0.0), ["training.min_learning_rate"]),
        (fitted_run(r=1280), [EXTRAPOLATION]),
        (fitted_run((1280, 15_000, 10, 10), family="paper-1"), ["model.family: paper-1"]),
        (
            load("lpa_tiny.yaml"),
            [
                "N,",
                "D,",
                "D/N,",
                "suggested batch",
                "training.seq_len",
                "training.min_learning_rate",
                EXTRAPOLATION,
            ],
        ),
    ],
)
def test_warnings_of_whole_runs(run: RunConfig, names: list[str]):
    found = suggest(run)["warnings"]
    assert len(found) == len(names)
    for warning, name in zip(found, names, strict=True):
        assert warning.startswith(name)


def test_text_says_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(
        "sys.argv", ["suggest", "--config", "lpa_370m", "--training.learning_rate", "1e-3"]
    )
    assert command.main() == 0
    lines = capsys.readouterr().out.splitlines()
    words = {line[:20].strip(): line[20:].split() for line in lines}
    assert words["N, parameters"][0] == "252,051,456"
    assert words["D, tokens"][0] == "7,340,032,000"
    assert words["peak learning rate"] == ["1.956e-03", "1.000e-03", "1.96"]
    assert words["batch, tokens"] == ["249,311", "524,288", "0.476"]
    assert words["batch, sequences"] == ["243.5", "512"]
    assert words["rounded"][0] == "256"
    assert "nearest multiple of 128, for 8 ranks of micro_batch_size 16: +5.1%" in " ".join(
        words["rounded"]
    )
    assert words["steps to D with it"] == ["28,000", "14,000"]
    assert lines[-3:] == [
        "warning: training.seq_len: 1,024; the fitted runs had 2,048",
        "warning: training.min_learning_rate: 8e-05; the fitted runs had 1e-05",
        f"warning: {EXTRAPOLATION}",
    ]


def test_text_without_a_micro_batch_size():
    run = fitted_run()
    text = describe(run, suggest(run))
    assert "for 8 ranks: " in text
    assert "micro_batch_size" not in text
    assert "warning" not in text


def test_command_writes_json(tmp_path: Path):
    output = tmp_path / "out.json"
    options = ["--output", str(output), "--training.max_steps", "1000"]
    done = subprocess.run(
        [sys.executable, "-m", "training.suggest", "--config", "lpa_tiny.yaml", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert set(result) == KEYS
    assert result == suggest(load("lpa_tiny.yaml", "--training.max_steps=1000"))
    assert f"{result['d_tokens']:,}" in done.stdout
    for warning in result["warnings"]:
        assert f"warning: {warning}" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["required"]),
        (["--config", "nowhere"], ["--config nowhere", "No such file", "lpa_370m"]),
        (["--config", "lpa_370m", "--model.hidden_sise", "8"], ["model.hidden_size"]),
        (["--config", "lpa_370m", "--model.r", "2000"], ["model.r", "2000", "1024"]),
        (["--config", "lpa_370m", "--training.max_steps", "0"], ["max_steps", "at least 1"]),
        (["--config", "lpa_370m", "--output", "no/such/out.json"], ["--output", "no/such"]),
    ],
)
def test_bad_input_is_one_line(
    options: list[str],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("sys.argv", ["suggest", *options])
    with pytest.raises(InputError) as caught:
        command.main()
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message, message
    assert capsys.readouterr().out == ""


def test_exit_code_of_bad_input_is_2():
    done = subprocess.run(
        [sys.executable, "-m", "training.suggest", "--config", "nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --config nowhere")
    assert done.stderr.count("\n") == 1
