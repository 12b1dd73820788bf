"""The benchmark's programs from end to end at tiny sizes; nothing looks at how long it took."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from data.errors import InputError
from data.loader import WindowLoader
from model import ModelConfig, Transformer
from tests.conftest import ROOT, Runs
from training.bench import ddp, loader, loop, lpa, measure, page, processes, startup, step
from training.bench.__main__ import main, measured
from training.bench.measure import DifferentLossError
from training.bench.profiling import group_of, seconds_by_group

MEASUREMENT_KEYS = {
    "case", "side", "repeats", "seconds_median", "seconds_p10", "seconds_p90",
}  # fmt: skip
RATIO_KEYS = {"case", "quantity", "ratio", "low", "high", "confidence", "rounds", "goal", "reached"}


def check_result(result: dict[str, Any]) -> None:
    """What every benchmark returns, and that JSON can hold it."""
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["seed"] == 0
    assert result["measurements"]
    assert result["ratios"]
    for row in result["measurements"]:
        assert row.keys() >= MEASUREMENT_KEYS
        assert 0 < row["seconds_p10"] <= row["seconds_median"] <= row["seconds_p90"]
    for row in result["ratios"]:
        assert row.keys() >= RATIO_KEYS
        assert row["low"] <= row["high"]
        assert row["reached"] == (None if row["goal"] is None else row["ratio"] >= row["goal"])


def medians(result: dict[str, Any]) -> dict[str, float]:
    return {row["side"]: row["seconds_median"] for row in result["measurements"]}


# --- measure.py ---------------------------------------------------------------------------------


def test_sides_take_turns():
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) or 0.0 for name in "AB"}
    seconds = measure.in_turn(sides, 3)
    assert calls == list("ABABAB")
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_warm_up_is_left_out(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    now = [100.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def once() -> float:
        calls.append(0)
        now[0] += 50 if len(calls) <= measure.WARM_UP else 3
        return 1.0

    seconds, losses = measure.compare_steps("case", {"A": once}, 2, 1e-5)
    assert len(calls) == measure.WARM_UP + 2
    assert seconds["A"] == [3, 3]
    assert losses["losses_compared"] == measure.WARM_UP


def test_quantiles():
    row = measure.measurement("case", "side", [float(n) for n in range(11)], extra=1)
    assert (row["seconds_median"], row["seconds_p10"], row["seconds_p90"]) == (5, 1, 9)
    assert (row["repeats"], row["extra"]) == (11, 1)
    assert measure.tokens_per_second([row], 20)[0]["tokens_per_second"] == 4


def test_ratio_is_that_of_the_medians():
    row = measure.ratio("case", "what", [2, 4, 60], [1, 2, 3], goal=1.5)
    assert row["ratio"] == 2
    assert row["reached"] is True
    assert measure.ratio("case", "what", [1, 1], [1, 1], goal=1.5)["reached"] is False
    row = measure.ratio("case", "what", [1, 1], [2, 2], of=lambda r: (1 - r) / 0.25)
    assert (row["ratio"], row["low"], row["high"]) == (2, 2, 2)
    with pytest.raises(ValueError, match="3 rounds of one side and 2"):
        measure.ratio("case", "what", [1, 2, 3], [1, 2])


def test_interval_draws_rounds_of_both_sides_together():
    drift = [1.0, 2.0, 3.0, 4.0, 5.0]  # far more than the difference between the sides
    row = measure.ratio("case", "what", [1.1 * x for x in drift], drift)
    assert math.isclose(row["low"], 1.1)
    assert math.isclose(row["high"], 1.1)
    assert row["rounds"] == 5


def test_interval_draws_whole_rounds():
    """One slow round in four: three or more of four drawn rounds are slow in 5 % of draws. Of 36
    repeats drawn singly, half would never be.
    """
    rounds = [[1.0] * 9, [1.0] * 9, [1.0] * 9, [2.0] * 9]
    row = measure.ratio("case", "what", rounds, [[1.0] * 9] * 4)
    assert (row["ratio"], row["low"], row["high"]) == (1, 1, 2)


def test_interval_covers_the_true_ratio():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(60):
        a, b = (torch.empty(30).normal_(mean, 0.1, generator=generator) for mean in (1.2, 1.0))
        row = measure.ratio("case", "what", a.tolist(), b.tolist())
        hits += row["low"] <= 1.2 <= row["high"]
    assert 51 <= hits <= 60  # 57 expected; under 51 has a probability of about 0.1 %


@pytest.mark.parametrize("other", [1.0001, math.nan, math.inf])
def test_different_losses_are_refused(other: float):
    with pytest.raises(DifferentLossError, match=r"case, step 1: .* of ours .* of theirs"):
        measure.check_losses("case", {"ours": [1.0, 1.0], "theirs": [1.0, other]}, 1e-5)


def test_losses_within_the_tolerance_pass():
    found = measure.check_losses("case", {"ours": [2.0, 1.0], "theirs": [2.0, 1.00001]}, 1e-4)
    assert found["first_loss"] == 2
    assert math.isclose(found["largest_relative_difference"], 1e-5, rel_tol=1e-6)


def test_profile_counts_inner_operators():
    x = torch.randn(64, 64)
    seconds = seconds_by_group(lambda: torch.mm(x, x), 2)
    assert seconds["matrix products"] > 0
    assert group_of("aten::_fused_adamw_") == "optimizer"
    assert group_of("aten::silu") == "other elementwise and overhead"


# --- step ---------------------------------------------------------------------------------------


def test_step_from_end_to_end():
    result = step.measure(quick=True)
    check_result(result)
    seconds = medians(result)
    assert list(seconds) == ["ours, eager", "transformers, eager"]
    (ratio,) = result["ratios"]
    assert math.isclose(
        ratio["ratio"], seconds["transformers, eager"] / seconds["ours, eager"], rel_tol=1e-9
    )
    assert ratio["goal"] == 1.05
    for row in result["measurements"]:
        assert math.isclose(row["tokens_per_second"], 2 * 16 / row["seconds_median"])
    assert result["losses"][0]["losses_compared"] == measure.WARM_UP
    assert {row["side"] for row in result["profiles"]} == set(seconds)


@pytest.mark.slow
def test_step_compiled():
    case = replace(step.cases(quick=True)[0], modes=("eager", "compiled"))
    result = step.measure_case(case)
    goals = {row["quantity"]: row["goal"] for row in result["ratios"]}
    assert list(goals.values()) == [1.05, 1.15]
    assert len(medians(result)) == 4


@pytest.mark.parametrize(
    "name", ["lm_head", "layers.1.self_attn.q_proj", "layers.0.mlp.up_proj", "norm"]
)
def test_step_refuses_other_weights(name: str, monkeypatch: pytest.MonkeyPatch):
    build = step.llama

    def altered(model: Any) -> Any:
        theirs = build(model)
        with torch.no_grad():
            theirs.get_parameter(f"{'' if name == 'lm_head' else 'model.'}{name}.weight").mul_(1.1)
        return theirs

    monkeypatch.setattr(step, "llama", altered)
    with pytest.raises(DifferentLossError, match=r"of ours, eager .* of transformers"):
        step.measure(quick=True)


def test_step_refuses_a_side_that_does_not_train(monkeypatch: pytest.MonkeyPatch):
    build = step.training_step

    def altered(loss: Any, model: torch.nn.Module, *inputs: torch.Tensor) -> measure.Step:
        if isinstance(model, Transformer):
            return build(loss, model, *inputs)
        return lambda: loss(*inputs).item()

    monkeypatch.setattr(step, "training_step", altered)
    with pytest.raises(DifferentLossError, match="step 1: "):
        step.measure(quick=True)


# --- lpa ----------------------------------------------------------------------------------------


def test_lpa_from_end_to_end():
    result = lpa.measure(quick=True)
    check_result(result)
    (case,) = lpa.cases(quick=True)
    for part in lpa.PARTS:
        rows = [row for row in result["measurements"] if row["case"] == case.name(part)]
        assert [row["side"] for row in rows] == ["vanilla", "lpa"]
        vanilla, low = rows
        time_ratio, share = (r for r in result["ratios"] if r["case"] == case.name(part))
        assert time_ratio["ratio"] == pytest.approx(
            low["seconds_median"] / vanilla["seconds_median"]
        )
        flops = low["flops_per_token"] / vanilla["flops_per_token"]
        assert time_ratio["flops_lpa_over_vanilla"] == pytest.approx(flops)
        assert share["ratio"] == pytest.approx((1 - time_ratio["ratio"]) / (1 - flops))
        assert share["goal"] == (None if part == "projections" else 0.9)
        assert share["low"] == pytest.approx(
            min((1 - r) / (1 - flops) for r in (time_ratio["low"], time_ratio["high"]))
        )


def test_lpa_flops_by_hand():
    """d = 32, ffn 48, r = 8, one layer, 16 tokens, a head of 64 or 16."""
    (case,) = lpa.cases(quick=True)
    low, dense = 4 * 8 * (32 + 32), 4 * 32 * 32  # q, k, v, o
    rest = 2 * 3 * 32 * 48 + 4 * 32 * 17 / 2  # feed-forward network, causal attention
    head = {"step": 2 * 64 * 32, "blocks": 2 * 16 * 32}
    for part in lpa.PARTS:
        _, _, flops = lpa.part_of(case, part)
        outside = rest + head[part] if part in head else 0
        assert flops == {"vanilla": 3 * (2 * dense + outside), "lpa": 3 * (2 * low + outside)}


def test_lpa_twins_have_the_same_function():
    (case,) = lpa.cases(quick=True)
    models = lpa.twins(case.model)
    assert models["vanilla"].config.r is None
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    logits = {k: model(tokens) for k, model in models.items()}
    torch.testing.assert_close(logits["vanilla"], logits["lpa"], rtol=1e-4, atol=1e-4)
    counts = {k: sum(p.numel() for p in m.parameters()) for k, m in models.items()}
    assert counts == {k: m.config.num_parameters() for k, m in models.items()}
    assert counts["lpa"] < counts["vanilla"]


@pytest.mark.parametrize("part", lpa.PARTS)
def test_lpa_refuses_other_weights(part: str, monkeypatch: pytest.MonkeyPatch):
    build = lpa.twins

    def altered(config: ModelConfig) -> dict[str, Transformer]:
        models = build(config)
        with torch.no_grad():
            models["lpa"].get_parameter("layers.0.attention.q_proj.B").mul_(1.1)
        return models

    monkeypatch.setattr(lpa, "twins", altered)
    with pytest.raises(DifferentLossError):
        lpa.measure_part(lpa.cases(quick=True)[0], part)


# --- ddp ----------------------------------------------------------------------------------------


def test_ddp_from_end_to_end():
    result = ddp.measure_case(ddp.cases(quick=True)[0]) | {"seed": 0}
    check_result(result)
    seconds = medians(result)
    assert list(seconds) == ["DDP", "ZeRO stage 0"]
    (ratio,) = result["ratios"]
    assert ratio["ratio"] == pytest.approx(seconds["DDP"] / seconds["ZeRO stage 0"])
    assert ratio["goal"] == 0.95
    (losses,) = result["losses"]
    assert losses["losses_compared"] == measure.WARM_UP


@pytest.mark.slow
def test_ddp_at_stage_3():
    result = ddp.measure_case(ddp.cases(quick=True)[-1])
    assert list(medians(result)) == ["DDP", "ZeRO stage 3"]
    assert result["ratios"][0]["goal"] is None


def test_ddp_refuses_other_weights():
    """The engine has the weights of seed 0; DDP gets those of seed 1."""
    code = (
        "from training.bench import ddp; build = ddp.init_weights;"
        "ddp.init_weights = lambda model, seed: build(model, seed + 1);"
        "ddp.measure_rank(ddp.cases(quick=True)[0])"
    )
    environment = processes.rank_environment(0, 1, processes.free_port())
    with pytest.raises(processes.ProgramError, match=r"DifferentLossError: .*step 0: .* of DDP"):
        processes.run(processes.python("-c", code), environment)


# --- loop ---------------------------------------------------------------------------------------


def test_loop_from_end_to_end(prepared: Path, tmp_path: Path):
    case = replace(loop.cases(quick=True)[0], rounds=1)
    result = loop.measure_case(case, tmp_path, prepared) | {"seed": 0}
    check_result(result)
    seconds = medians(result)
    assert list(seconds) == ["train.py", "minimal loop"]
    (ratio,) = result["ratios"]
    assert ratio["ratio"] == pytest.approx(seconds["minimal loop"] / seconds["train.py"])
    assert (ratio["goal"], ratio["rounds"]) == (0.98, 1)
    windows = (case.steps - loop.SKIPPED) // case.log_every
    assert all(row["repeats"] == windows for row in result["measurements"])
    assert result["losses"][0]["losses_compared"] == windows


def test_loop_refuses_other_weights(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The minimal loop with the weights and the data of another seed."""
    run_side = loop.run_side

    def altered(side: str, *arguments: Any) -> list[dict[str, Any]]:
        monkeypatch.setattr(loop, "SEED", int(side == "minimal loop"))
        return run_side(side, *arguments)

    monkeypatch.setattr(loop, "run_side", altered)
    case = replace(loop.cases(quick=True)[0], rounds=1)
    with pytest.raises(DifferentLossError, match=r"of train.py .* of minimal loop"):
        loop.measure_case(case, tmp_path, prepared)


# --- startup ------------------------------------------------------------------------------------


def test_startup_phases_add_up(runs: Runs):
    config = str(runs.config("tiny", training__validate_every=2, training__validation_tokens=200))
    run_dir, started = runs.folder / "started", time.time()
    processes.run(startup.command("python", config, runs.data, run_dir))
    found = startup.phases(started, run_dir)
    parts = ["imports, checks", "engine", "reports", "validation", "first step"]
    assert list(found) == [*parts, "total"]
    assert found["total"] == pytest.approx(sum(found[part] for part in parts))
    # A file's time may be up to one tick of the kernel's clock early.
    assert all(found[part] > -0.02 for part in parts)
    assert started + found["total"] <= time.time()


def test_import_seconds_by_package():
    found = startup.import_seconds("import numpy, yaml")
    assert {"numpy", "yaml"} <= found.keys()
    assert len(found) == 1 + startup.LISTED_PACKAGES
    assert found["all"] >= sum(v for k, v in found.items() if k != "all") > 0


@pytest.mark.slow
def test_startup_from_end_to_end(runs: Runs):
    config = str(runs.config("tiny", training__validate_every=2, training__validation_tokens=200))
    result = startup.measure(quick=True, data=runs.data, config=config)
    check_result(result)
    assert {row["case"] for row in result["ratios"]} == {"python train.py", "deepspeed train.py"}
    totals = [row for row in result["measurements"] if row["side"] == "total"]
    for total, ratio in zip(totals, result["ratios"], strict=True):
        assert ratio["ratio"] == pytest.approx(12 / total["seconds_median"])


# --- loader -------------------------------------------------------------------------------------


def test_loader_from_end_to_end():
    result = loader.measure(quick=True)
    check_result(result)
    for row, ratio in zip(result["measurements"], result["ratios"], strict=True):
        count, length = map(int, row["case"].split("×"))
        assert row["tokens_per_second"] == pytest.approx(count * length / row["seconds_median"])
        assert ratio["ratio"] == pytest.approx(row["tokens_per_second"] / 20e6)


def test_loader_reads_every_batch_once(tmp_path: Path):
    stream = loader.write_shards(tmp_path, 1000)
    assert len(stream) == 2000
    windows = WindowLoader(stream, 16, 0)
    seen: list[tuple[int, int]] = []
    batch = windows.batch
    windows.batch = lambda position, count: seen.append((position, count)) or batch(position, count)
    read = loader.reading(windows, 4)
    read()
    read()
    assert seen == [(0, 4), (4, 4)]


# --- processes ----------------------------------------------------------------------------------


def test_a_failing_program_is_an_error_with_its_last_words():
    code = "import sys; print('first\\nsecond', file=sys.stderr); sys.exit(3)"
    with pytest.raises(processes.ProgramError, match=r"exit code 3: first \| second"):
        processes.run(processes.python("-c", code))


def test_all_programs_end_where_one_fails(tmp_path: Path):
    mark = tmp_path / "process"
    waits = f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid()));"
    fails = f"""
import pathlib, time
while not (pathlib.Path({str(mark)!r}).exists() and pathlib.Path({str(mark)!r}).read_text()):
    time.sleep(0.05)
1 / 0"""
    commands = [processes.python("-c", code) for code in (fails, waits + "time.sleep(600)")]
    with pytest.raises(processes.ProgramError, match="ZeroDivisionError"):
        processes.run_all(commands, [processes.clean_environment()] * 2)
    assert not psutil.pid_exists(int(mark.read_text()))


def test_the_launchers_variables_are_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    assert "RANK" not in processes.clean_environment()
    found = processes.rank_environment(1, 2, 1234)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_PORT"]) == ("1", "2", "1234")


# --- the command and the page -------------------------------------------------------------------


@pytest.fixture(autouse=True)
def signal_handler() -> Iterator[None]:
    """The command handles SIGTERM for the rest of its process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_result_goes_to_the_console_a_file_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output, document = tmp_path / "out.json", tmp_path / "page.md"
    assert main(["loader", "--quick", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result.keys() == {"environment", "quick", "benchmarks", "seconds"}
    assert result["quick"] is True
    assert result["environment"]["packages"]["torch"] == torch.__version__
    assert str(ROOT) not in output.read_text()
    check_result(result["benchmarks"]["loader"])
    shown = capsys.readouterr().out
    document.write_text(f"above\n\n{page.BEGIN}\nold\n{page.END}\n\nbelow\n")
    for _ in range(2):  # what is replaced once can be replaced again
        assert main(["page", "--input", str(output), "--page", str(document)]) == 0
    text = document.read_text()
    assert "old" not in text
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    median = result["benchmarks"]["loader"]["measurements"][0]["seconds_median"]
    for part in ("### loader", "| 2×16 | WindowLoader.batch |", f"| {median * 1e3:.3g} |"):
        assert part in text
        assert part in shown
    assert "Quick mode" in text


def test_tables():
    ratio = measure.ratio("a case", "what", [3, 3], [2, 2], goal=1.4)
    row = measure.measurement("a case", "side", [0.5, 0.5])
    text = page.section("name", {"ratios": [ratio], "measurements": [row]})
    assert "| a case | what | 1.500 | 1.500 to 1.500 | 1.4 | yes |" in text
    assert "| a case | side | 500 | 500 to 500 | - | 2 |" in text
    assert page.milliseconds(0.0012345) == "1.23"


def test_all_runs_each_in_its_own_process():
    found = measured("loader", quick=True, alone=False)
    check_result(found)
    assert found["seconds"] > 0


def test_a_difference_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def different(quick: bool) -> None:
        measure.check_losses("a case", {"ours": [1.0], "theirs": [2.0]}, 1e-5)

    monkeypatch.setattr(loader, "measure", different)
    assert main(["loader", "--quick"]) == 1
    assert capsys.readouterr().err.startswith("error: a case, step 0: ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["benchmark"]),
        (["fast"], ["'fast'", "step", "loader", "all"]),
        (["loader", "--output", "no/such/out.json"], ["--output", "no/such"]),
        (["loader", "--input", "x.json"], ["--input", "page"]),
        (["page", "--input", "x.json"], ["--input x.json", "no such file"]),
        (["page", "--page", "README.md"], ["--input", "page"]),
        (["loader", "--speed", "1"], ["--speed"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], expected: list[str]):
    with pytest.raises(InputError) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


def test_a_page_without_marks_is_refused(tmp_path: Path):
    document, result = tmp_path / "page.md", tmp_path / "result.json"
    document.write_text("nothing")
    result.write_text("{}")
    with pytest.raises(InputError, match=r"page\.md: has no lines"):
        main(["page", "--input", str(result), "--page", str(document)])
    assert document.read_text() == "nothing"


def test_exit_code_of_bad_input_is_2():
    done = subprocess.run(
        [sys.executable, "-m", "training.bench", "fast"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
