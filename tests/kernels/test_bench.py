"""The benchmark: formulas against counts by hand, the comparison before timing, order, files."""

import csv
import dataclasses
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import dispatch
from kernels.bench import __main__ as bench
from kernels.bench import case, inputs, options, report, table, timing
from kernels.bench.case import Settings, measure_case
from kernels.bench.gate import Gate, WrongError, recorded_paths, row_error
from kernels.bench.inputs import Run, random_set
from kernels.bench.operations import MODES, OPERATIONS, PROVIDERS, Problem, flops, minimal_bytes
from kernels.bench.options import UsageError
from kernels.bench.timing import Sample, interleaved, quantiles, time_interleaved
from tests.conftest import ROOT

CPU = torch.device("cpu")
SMALL = Problem("small", d=32, r=8, head_dim=16, batch=2, seq_len=6)
# d 8, r 2, two heads of 4, M = 6 rows: what the counts by hand below are of
HAND = Problem("hand", d=8, r=2, head_dim=4, batch=2, seq_len=3)
FAST = Settings(CPU, torch.float32, repeats=2, seconds=0.0)
UNCOMPILED = ["eager", "fused", "eager_again"]


def drawn(operation: Any, dtype: torch.dtype = torch.float32, problem: Problem = SMALL) -> Any:
    return random_set(operation, problem, dtype, torch.Generator().manual_seed(1))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kernels.bench", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the command, once --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of every operation at two numbers of rows."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = [
        "--device", "cpu", "--sizes", "tiny", "--rows", "64", "32", "--seq_len", "16",
        "--providers", *UNCOMPILED, "--dtype", "fp32", "--repeats", "3",
        "--output", str(folder / "out.json"), "--csv", str(folder / "out.csv"),
    ]  # fmt: skip
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(
        done=done,
        report=json.loads((folder / "out.json").read_text()),
        csv=(folder / "out.csv").read_text(),
        files=sorted(path.name for path in folder.iterdir()),
    )


def test_json_has_every_case(finished):
    cases = finished.report["cases"]
    assert [(c["rows"], c["op"]) for c in cases] == [(n, op) for n in (64, 32) for op in OPERATIONS]
    for found in cases:
        assert set(report.CASE_KEYS) < set(found)
        assert (found["d"], found["r"], found["head_dim"], found["seq_len"]) == (256, 64, 64, 16)
        assert found["batch"] * 16 == found["rows"]
        assert found["dtype"] == "float32"
        assert found["input_sets"] == inputs.SETS
        assert [(r["provider"], r["mode"]) for r in found["results"]] == [
            (name, mode) for name in UNCOMPILED for mode in MODES
        ]
    assert finished.report["not_run"] == []
    assert finished.report["seconds"] > 0  # it is reported; how long is nobody's business here


def test_json_rows(finished):
    for found in finished.report["cases"]:
        for row in found["results"]:
            assert list(row) == list(report.RESULT_KEYS)
            assert (row["status"], row["message"], row["repeats"]) == ("ok", "", 3)
            low, middle, high = (row[f"microseconds_{key}"] for key in ("p20", "median", "p80"))
            assert 0 < low <= middle <= high
            problem = Problem("tiny", 256, 64, 64, found["batch"], 16)
            operation = OPERATIONS[found["op"]]
            assert row["flops"] == flops(operation, problem, row["mode"])
            assert row["minimal_bytes"] == minimal_bytes(operation, problem, 4, row["mode"])
            assert row["teraflops_per_second"] == pytest.approx(row["flops"] / middle / 1e6)
            assert row["gigabytes_per_second"] == pytest.approx(row["minimal_bytes"] / middle / 1e3)
            # what a CPU has not, and what compile is needed for
            for key in (
                "share_of_roofline",
                "peak_memory_bytes",
                "microseconds_host_median",
                "speedup_against_compile",
            ):
                assert row[key] is None


def test_json_noise_floor_is_eager_against_itself(finished):
    for found in finished.report["cases"]:
        medians = {(r["provider"], r["mode"]): r["microseconds_median"] for r in found["results"]}
        for mode in MODES:
            expected = abs(medians["eager_again", mode] / medians["eager", mode] - 1)
            assert found["noise_share"][mode] == pytest.approx(expected)


def test_json_environment(finished):
    environment = finished.report["environment"]
    assert set(environment) == {
        "device", "capability", "peak_flops_per_second", "peak_bytes_per_second", "torch", "triton",
        "cuda", "driver", "python", "cpu_threads", "git_commit", "git_dirty", "command", "date",
    }  # fmt: skip
    assert environment["torch"] == torch.__version__
    assert environment["cpu_threads"] == 1
    assert environment["command"].startswith("python -m kernels.bench --device cpu --sizes tiny")
    assert environment["git_commit"] is None or len(environment["git_commit"]) == 40
    assert environment["capability"] is environment["driver"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", environment["date"])


def test_json_says_which_path_ran(finished):
    kernels = {
        "norm_down": {"row_rstd", "project", "scale_and_dot", "norm_backward_matmul"},
        "up_rotary": {"project", "unrotate"},
        "norm_qkv": {"row_rstd", "project", "unrotate", "norm_backward"},
        "low_dim_linear": set(),
    }
    kernels["lpa_layer"] = kernels["norm_down"] | kernels["up_rotary"]
    kernels["vanilla_layer"] = kernels["norm_qkv"]
    for found in finished.report["cases"]:
        assert set(found["paths"]) <= {"fused"}  # the others never ask for a kernel
        paths = found["paths"].get("fused", [])
        assert {path["kernel"] for path in paths} == kernels[found["op"]]
        for path in paths:
            assert path["path"] == "reference"
            assert path["reason"] == "the device is cpu"
    project = finished.report["cases"][0]["paths"]["fused"][1]
    assert (project["kernel"], project["n"], project["k"]) == ("project", 192, 256)


def test_json_has_no_verdict_on_a_cpu(finished):
    assert finished.report["verdict"] == []
    assert "verdict: none" in finished.done.stdout


def test_csv_has_the_rows_of_the_json(finished):
    lines = list(csv.DictReader(io.StringIO(finished.csv)))
    expected = [(c, row) for c in finished.report["cases"] for row in c["results"]]
    assert len(lines) == len(expected)
    for line, (found, row) in zip(lines, expected, strict=True):
        assert list(line) == [*report.CASE_KEYS, *report.RESULT_KEYS]
        for key, text in line.items():
            value = row[key] if key in row else found[key]
            assert text == ("" if value is None else str(value))


def test_table_is_aligned(finished):
    blocks = finished.done.stdout.split("\n\n")[: 2 * len(OPERATIONS)]
    for block, found in zip(blocks, finished.report["cases"], strict=True):
        title, header, *lines = block.splitlines()
        assert title.startswith(f"{found['op']}  tiny")
        assert f"{found['rows']} rows of 16" in title
        providers = lines[: len(UNCOMPILED)]
        assert [line.split()[0] for line in providers] == UNCOMPILED
        assert len({len(line) for line in (header, *providers)}) == 1
        for line, rows in zip(providers, batched(found["results"], 3), strict=True):
            for row in rows:
                low, high = row["microseconds_p20"], row["microseconds_p80"]
                assert f"{row['microseconds_median']:.1f} ({low:.1f}-{high:.1f})" in line
            assert line.split()[-4:] == ["n/a"] * 4
        assert "(the device is cpu)" in block or found["op"] == "low_dim_linear"
        assert "noise floor" in lines[-1]


def batched(items: list[Any], n: int) -> list[list[Any]]:
    return [items[i : i + n] for i in range(0, len(items), n)]


def test_the_command_leaves_only_its_files(finished):
    assert finished.files == ["out.csv", "out.json"]


# --- formulas -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "forward"),
    [
        ("norm_down", 2 * 6 * 3 * 16),  # 6 rows through three 2x8
        ("up_rotary", 2 * 6 * 3 * 16),
        ("norm_qkv", 2 * 6 * 3 * 64),
        ("low_dim_linear", 2 * 6 * 2 * 16),
        # Query 1 sees 1 key, query 2 two, query 3 three: 6 pairs, 2 heads, 2 sequences = 24 pairs
        # of 4 entries; 2 products of 2 FLOPs an entry.
        ("lpa_layer", 2 * 6 * 8 * 16 + 24 * 4 * 4),
        ("vanilla_layer", 2 * 6 * 4 * 64 + 24 * 4 * 4),
    ],
)
def test_flops_by_hand(op, forward):
    counted = [flops(OPERATIONS[op], HAND, mode) for mode in MODES]
    assert counted == [forward, 2 * forward, 3 * forward]


@pytest.mark.parametrize("op", ["norm_down", "up_rotary", "norm_qkv", "low_dim_linear"])
def test_flops_as_torch_counts_them(op):
    operation = OPERATIONS[op]
    run = Run(operation.eager, "eager", operation, drawn(operation))
    with FlopCounterMode(display=False) as counter:
        outputs = run.forward()
    assert counter.get_total_flops() == flops(operation, SMALL, "forward")
    with FlopCounterMode(display=False) as counter:
        run.backward(outputs)
    assert counter.get_total_flops() == flops(operation, SMALL, "backward")


# Entries at HAND: x, y, q, k, v, residual 48, h 12 each, norm 8, a, b 16 each, w 64 each; tables
# cos and sin of 3 positions and 2 pairs, 12 entries of 4 bytes together.
BYTES = {
    "norm_down": (2 * (48 + 8 + 48 + 36), 2 * (36 + 48 + 8 + 48 + 48 + 8 + 48)),
    "up_rotary": (2 * (36 + 48 + 144) + 48, 2 * (144 + 36 + 48 + 36 + 48) + 48),
    "norm_qkv": (2 * (48 + 8 + 192 + 144) + 48, 2 * (144 + 2 * (48 + 8 + 192)) + 48),
    "low_dim_linear": (2 * (48 + 32 + 48 + 48), 2 * (48 + 2 * (48 + 32))),
    "lpa_layer": (2 * (48 + 8 + 128 + 48) + 48, 2 * (48 + 2 * (48 + 8 + 128)) + 48),
    "vanilla_layer": (2 * (48 + 8 + 256 + 48) + 48, 2 * (48 + 2 * (48 + 8 + 256)) + 48),
}


@pytest.mark.parametrize("op", list(OPERATIONS))
def test_minimal_bytes_by_hand(op):
    forward, backward = BYTES[op]
    counted = [minimal_bytes(OPERATIONS[op], HAND, 2, mode) for mode in MODES]
    assert counted == [forward, backward, forward + backward]


@pytest.mark.parametrize("op", list(OPERATIONS))
def test_minimal_bytes_of_the_tensors_that_run(op):
    operation = OPERATIONS[op]
    given = drawn(operation, torch.bfloat16)
    assert given.nbytes == minimal_bytes(operation, SMALL, 2, "forward")  # d_outputs: as outputs


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", (989.4e12, 4.8e12)),
        ("NVIDIA H100 80GB HBM3", (989.4e12, 3.35e12)),
        ("NVIDIA H100 PCIe", (756e12, 2.0e12)),
        ("NVIDIA A100-SXM4-40GB", (312e12, 1.555e12)),
        ("NVIDIA A100-SXM4-80GB", (312e12, 2.039e12)),
        ("NVIDIA B200", (2.25e15, 8e12)),
        # names that hold a known one, and other products
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H20", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100X", None),
        ("NVIDIA L4", None),
        ("Some Processor", None),
    ],
)
def test_peaks_are_never_guessed(name, peak):
    assert report.peaks(name) == peak


def test_roofline_is_the_slower_of_both():
    peak = (100.0, 10.0)
    assert report.roofline_seconds(1000, 50, 2, peak) == 10  # 1000 / 100 against 50 / 10
    assert report.roofline_seconds(1000, 500, 2, peak) == 50
    assert report.roofline_seconds(1000, 50, 2, None) is None
    assert report.roofline_seconds(1000, 50, 4, peak) is None  # the peaks are those of 16 bits


def test_shares_and_speedups():
    """From samples that are given: 2 ms for compile, 1 ms for fused."""
    measured = {
        name: case.Measured(samples=[Sample(t / 4, 3 * t / 4, host=t / 8)] * 3)
        for name, t in {"compile": 2e-3, "fused": 1e-3}.items()
    }
    operation = OPERATIONS["norm_down"]
    found = report.case_report(
        "norm_down", operation, HAND, torch.bfloat16, measured, 3, (1e9, 1e6)
    )
    rows = {(row["provider"], row["mode"]): row for row in found["results"]}
    assert rows["fused", "forward"]["microseconds_median"] == pytest.approx(250)
    assert rows["fused", "backward"]["microseconds_median"] == pytest.approx(750)
    both = rows["fused", "forward_backward"]
    assert both["speedup_against_compile"] == pytest.approx(2)
    assert both["microseconds_host_median"] == pytest.approx(125)
    # 768 bytes at 1 MB/s are 768 µs, 1728 FLOPs at 1 GFLOP/s less
    assert both["share_of_roofline"] == pytest.approx(0.768)
    assert both["gigabytes_per_second"] == pytest.approx(768e-9 / 1e-3)
    assert "/ 65% / 77%" in table.case_table(found)
    assert found["noise_share"] == dict.fromkeys(MODES)


def test_quantiles():
    found = quantiles([5e-6, 1e-6, 3e-6, 2e-6, 4e-6, 9e-6])
    assert found["microseconds_median"] == pytest.approx(3.5)
    assert found["microseconds_p20"] == pytest.approx(2)
    assert found["microseconds_p80"] == pytest.approx(5)
    assert list(quantiles([2e-6]).values()) == pytest.approx([2, 2, 2])


# --- inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", list(OPERATIONS))
def test_inputs_are_random_and_differ(op):
    sets = case._input_sets(OPERATIONS[op], SMALL, FAST)
    assert len(sets) == inputs.SETS
    for name in [n for n in sets[0].inputs if n not in ("cos", "sin")]:
        for first, second in itertools.pairwise(sets):
            assert first.inputs[name].ne(0).all()
            assert first.inputs[name].ne(second.inputs[name]).any()
    for name, gradient in sets[0].d_outputs.items():
        assert gradient.shape == SMALL.shape(name)
        assert gradient.std() > 0.5


def test_input_sets_exceed_the_cache(monkeypatch):
    def cache(nbytes: int) -> None:
        properties = SimpleNamespace(L2_cache_size=nbytes)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    cuda = torch.device("cuda")
    cache(40_000_000)
    assert inputs.set_count(cuda, 60_000_000) == 3
    assert inputs.set_count(cuda, 30_000_000) == 4  # 100 MB
    cache(126_000_000)
    assert inputs.set_count(cuda, 30_000_000) == 9  # 252 MB
    assert inputs.set_count(CPU, 1) == inputs.SETS


# --- correctness --------------------------------------------------------------------------------


@pytest.mark.parametrize("op", list(OPERATIONS))
@pytest.mark.parametrize("form", ["stacked", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_form_passes(op, form, dtype):
    operation = OPERATIONS[op]
    given = drawn(operation, dtype)
    gate = Gate(operation, given)
    found = gate.check(Run(getattr(operation, form), form, operation, given))
    assert found["error"] <= found["limit"]
    assert max(gate.limits.values()) < 20 * torch.finfo(dtype).eps  # no gate for all
    names = {f"d_{name}" for name in operation.inputs if name not in ("cos", "sin")}
    assert set(gate.limits) == names | set(operation.outputs)


def wrong_row(y: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(y)
    mask[-1, -1] = 1.01
    return y * mask


WRONG = {
    "one row is 1% off": wrong_row,
    "gradient is 1% off": lambda y: y * 1.01 - (y * 0.01).detach(),
    "not finite": lambda y: torch.where(y == y.max(), torch.nan, y),
    "zeros": lambda y: y * 0,
}


@pytest.mark.parametrize("fault", list(WRONG))
def test_wrong_provider_is_reported_and_not_timed(fault, monkeypatch):
    right = OPERATIONS["low_dim_linear"]
    wrong = dataclasses.replace(right, fused=lambda *a: (WRONG[fault](*right.fused(*a)),))
    timed: list[str] = []

    def spy(runs: Any, *rest: Any) -> Any:
        timed.extend(runs)
        return time_interleaved(runs, *rest)

    monkeypatch.setattr(case, "time_interleaved", spy)
    measured, _ = measure_case(wrong, SMALL, UNCOMPILED, FAST)
    assert timed == ["eager", "eager_again"]
    assert measured["fused"].status == "wrong"
    assert "is off by" in measured["fused"].message
    assert not measured["fused"].samples
    assert measured["fused"].correctness is None
    for name in ("eager", "eager_again"):
        assert measured[name].status == "ok"
        assert len(measured[name].samples) == 2


def test_swapped_gradients_are_wrong():
    operation = OPERATIONS["norm_down"]

    def swapped(x: Any, norm: Any, a_q: Any, a_k: Any, a_v: Any) -> Any:
        return operation.fused(x, norm, a_k, a_q, a_v)

    given = drawn(operation)
    with pytest.raises(WrongError, match=r"(d_)?(h|a)_[qk] is off"):
        Gate(operation, given).check(Run(swapped, "fused", operation, given))


def test_row_error_by_hand():
    exact = torch.tensor([[3.0, 4.0], [0.0, 5.0]])  # every row has norm 5
    result = exact + torch.tensor([[0.0, 0.0], [0.3, 0.4]])
    assert row_error(result, exact) == pytest.approx(0.1)
    assert row_error(result.half(), exact.double()) == pytest.approx(0.1, rel=1e-2)
    for bad in (math.nan, math.inf):
        assert row_error(torch.full((2, 2), bad), exact) == math.inf


def test_eager_that_is_not_finite_lets_nobody_pass():
    operation = OPERATIONS["low_dim_linear"]
    given = drawn(operation, torch.float16)
    given.inputs["x"].mul_(1e4)
    given.inputs["a"].mul_(1e3)
    with pytest.raises(WrongError, match="eager itself is not finite"):
        Gate(operation, given)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "out_of_memory"),
        (RuntimeError("a\nb"), "error"),
    ],
)
@pytest.mark.parametrize("call", [1, 4])  # at the comparison, and while timing
def test_provider_that_raises_lets_the_others_go_on(error, status, call):
    right = OPERATIONS["low_dim_linear"]
    calls = 0

    def raises(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise error
        return right.fused(*arguments)

    operation = dataclasses.replace(right, fused=raises)
    measured, sets = measure_case(operation, SMALL, ["fused", "eager"], FAST)
    assert calls == call
    assert measured["fused"].status == status
    assert "\n" not in measured["fused"].message
    assert not measured["fused"].samples
    assert len(measured["eager"].samples) == 2
    found = report.case_report("low_dim_linear", operation, SMALL, FAST.dtype, measured, sets, None)
    json.loads(report.as_json(found))
    assert f"fused: {status.replace('_', ' ')}: " in table.case_table(found)
    assert [row["status"] for row in found["results"]] == [status] * 3 + ["ok"] * 3


def test_definition_that_fails_fails_all():
    def raises(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    operation = dataclasses.replace(OPERATIONS["low_dim_linear"], eager=raises)
    measured, _ = measure_case(operation, SMALL, ["eager", "fused"], FAST)
    assert {result.status for result in measured.values()} == {"out_of_memory"}


COMPILED = [name for name, provider in PROVIDERS.items() if provider.compiled]


@pytest.mark.parametrize(
    "op",
    [op if op == "up_rotary" else pytest.param(op, marks=pytest.mark.slow) for op in OPERATIONS],
)
def test_compiled_providers(op):
    """Whole graphs, and right."""
    measured, _ = measure_case(OPERATIONS[op], SMALL, COMPILED, FAST)
    assert [r.message for r in measured.values()] == [""] * len(COMPILED)
    assert {r.status for r in measured.values()} == {"ok"}


def test_providers_are_what_their_names_say(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append((f, options)) or f)
    operation = OPERATIONS["norm_qkv"]
    functions = {name: provider.function(operation) for name, provider in PROVIDERS.items()}
    eager, stacked, fused = operation.eager, operation.stacked, operation.fused
    assert functions == {
        "eager": eager, "compile": eager, "stacked": stacked, "fused": fused,
        "fused_compile": fused, "eager_again": eager,
    }  # fmt: skip
    whole = {"fullgraph": True, "dynamic": False}
    assert compiled == [(eager, whole), (stacked, whole), (fused, whole)]


def test_recorded_paths_says_what_dispatch_answers(monkeypatch):
    original = dispatch.usable
    monkeypatch.setattr(dispatch, "architecture", lambda device: 90)
    with recorded_paths() as paths:
        for _ in range(2):
            dispatch.usable("project", CPU, torch.bfloat16, 768, 128, 64)
        dispatch.usable("project", CPU, torch.bfloat16, 768, 100, 64)
    assert dispatch.usable is original
    assert [(path["k"], path["path"]) for path in paths] == [(128, "triton"), (100, "reference")]
    assert paths[0]["reason"] == ""
    assert "inner dimension 100" in paths[1]["reason"]
    line = table.paths_line(paths)
    assert line.startswith("triton: project; reference: project (inner dimension 100 ")


# --- time ---------------------------------------------------------------------------------------


class FakeClock:
    """Counts: every measurement takes as many seconds as there were before it."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[Any] = []
        self.hosts: list[float] = []
        self.fails = fails

    def measure(self, run: Any, host: float) -> Sample:
        self.calls.append(run)
        self.hosts.append(host)
        if run[0] == self.fails and len(self.calls) > 12:
            raise RuntimeError("late")
        return Sample(float(len(self.calls)), 0.5, host=7.0)


def fake_runs(sets: int = 3) -> Any:
    return {name: [f"{name}{i}" for i in range(sets)] for name in "ABC"}


def test_order_is_interleaved():
    assert [name for _, _, name in interleaved("ABC", 2)] == list("ABCABC")
    clock = FakeClock()
    samples = time_interleaved(fake_runs(), clock, 4, 0.0, pytest.fail)
    assert "".join(run[0] for run in clock.calls) == "ABC" * (timing.WARM_UP + 4)
    # The first counted round begins after three warm-up rounds of three.
    assert [sample.forward for sample in samples["A"]] == [10, 13, 16, 19]
    assert [sample.forward for sample in samples["C"]] == [12, 15, 18, 21]


def test_neighbours_use_different_input_sets():
    clock = FakeClock()
    time_interleaved(fake_runs(), clock, 6, 0.0, pytest.fail)
    for one_round in batched([run[1] for run in clock.calls], 3):
        assert set(one_round) == set("012")
    for name in "ABC":
        assert {run[1] for run in clock.calls if run[0] == name} == set("012")


def test_clock_is_told_the_last_host_time():
    clock = FakeClock()
    time_interleaved(fake_runs(), clock, 1, 0.0, pytest.fail)
    assert clock.hosts == [0.0] * 3 + [7.0] * 9


def test_provider_that_fails_late_leaves_the_round():
    clock, failures = FakeClock(fails="B"), []
    samples = time_interleaved(
        fake_runs(), clock, 4, 0.0, lambda name, error: failures.append((name, str(error)))
    )
    assert failures == [("B", "late")]
    # Nine to warm up, a whole round, then B raises at its second counted measurement.
    assert "".join(run[0] for run in clock.calls[9:]) == "ABCABCACAC"
    assert set(samples) == {"A", "C"}
    assert [len(found) for found in samples.values()] == [4, 4]


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 10), (1e9, 100)])
def test_repeats_from_seconds(seconds, expected):
    samples = time_interleaved(fake_runs(), FakeClock(), None, seconds, pytest.fail)
    assert [len(found) for found in samples.values()] == [expected] * 3


def test_sample_modes():
    sample = Sample(1.0, 2.5)
    assert [sample.seconds(mode) for mode in MODES] == [1.0, 2.5, 3.5]


class FakeEvent:
    """A CUDA event on a clock that each recording moves by a millisecond."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 1
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "FakeEvent") -> float:
        return other.at - self.at


def test_cuda_clock_without_a_gpu(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("rest"))
    monkeypatch.setattr(timing, "BUFFER_BYTES", 10)
    order: list[str] = []

    clock = timing.CUDAClock(CPU)
    assert clock.buffer.nbytes == 2000
    assert clock.seconds_a_write == pytest.approx(1e-4)  # ten writes between two recordings

    class Buffer:
        def fill_(self, value: int) -> None:
            order.append("write")

    class FakeRun:
        def forward(self) -> str:
            order.append("forward")
            return "outputs"

        def backward(self, outputs: str) -> None:
            assert outputs == "outputs"
            order.append("backward")
            FakeEvent.now += 4

    clock.buffer = Buffer()
    sample = clock.measure(FakeRun(), host=3.5e-4)
    assert order == ["rest", *["write"] * 5, "forward", "backward"]
    assert (sample.forward, sample.backward) == (pytest.approx(1e-3), pytest.approx(5e-3))
    assert sample.host is not None
    order.clear()
    clock.measure(FakeRun(), host=10.0)
    assert order.count("write") == timing.SPACER_WRITES


# --- verdict ------------------------------------------------------------------------------------


def synthetic(noise: float | None = 0.01, **microseconds: float | None) -> dict[str, Any]:
    """A case whose providers take the given time in each mode; None: it failed."""
    rows = [
        {
            "provider": name,
            "mode": mode,
            "status": "error" if t is None else "ok",
            "microseconds_median": t,
        }
        for name, t in microseconds.items()
        for mode in MODES
    ]
    return {
        "op": "norm_down", "size": "130m", "rows": 4096, "seq_len": 1024, "dtype": "bfloat16",
        "noise_share": dict.fromkeys(MODES, noise), "results": rows,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("microseconds", "expected"),
    [
        ({"compile": 10, "stacked": 9, "fused": 8, "fused_compile": 12}, ("fused", True, 8 / 9)),
        ({"compile": 10, "fused": 11, "fused_compile": 9}, ("fused_compile", True, 0.9)),
        ({"compile": 10, "stacked": 8, "fused_compile": 9}, ("stacked", False, 9 / 8)),
        ({"compile": 10, "fused": 10}, ("compile", False, 1.0)),
        # neither the repeat of eager nor a provider that failed is a rival
        ({"compile": 10, "fused": 9, "eager_again": 1, "stacked": None}, ("fused", True, 0.9)),
    ],
)
def test_verdict(microseconds, expected):
    entries = report.verdict([synthetic(**microseconds)])
    assert [entry["mode"] for entry in entries] == list(MODES)
    for entry in entries:
        assert (entry["op"], entry["size"], entry["rows"]) == ("norm_down", "130m", 4096)
        found = (entry["fastest"], entry["fused_is_fastest"], entry["ratio"])
        assert found == (*expected[:2], pytest.approx(expected[2]))


@pytest.mark.parametrize(
    ("fused", "noise", "expected"), [(10.05, 0.01, True), (10.2, 0.01, False), (10.2, None, None)]
)
def test_verdict_knows_the_noise(fused, noise, expected):
    entry = report.verdict([synthetic(noise, compile=10.0, fused=fused)])[0]
    assert entry["within_noise"] is expected


def test_verdict_needs_both_sides():
    cases = [synthetic(fused=1.0), synthetic(compile=1.0), synthetic(fused=None, compile=1.0)]
    assert report.verdict(cases) == []
    assert "none" in table.verdict_text([], on_cuda=True)


def test_verdict_lists_where_fused_is_slower():
    cases = [synthetic(compile=10.0, fused=5.0), synthetic(compile=10.0, fused=12.0)]
    head, _, line = table.verdict_text(report.verdict(cases), on_cuda=True).splitlines()
    assert head.endswith("fastest provider in 1 of 2 cases")
    assert "norm_down 130m 4096 rows: compile is the fastest, fused takes 1.200" in line


# --- files --------------------------------------------------------------------------------------


def test_write_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    report.write(path, "old")
    real = Path.write_bytes

    def disk_full(self: Path, content: bytes) -> int:
        real(self, content[:2])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match=re.escape(str(path))) as error:
        report.write(path, "new content")
    assert error.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(Path, "write_bytes", real)

    def no_rename(*_: Any) -> None:
        assert path.read_text() == "old"  # all is written aside by then
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="Permission denied"):
        report.write(path, "new content")
    assert path.read_text() == "old"
    monkeypatch.undo()
    report.write(path, b"new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        "--device", "cpu", "--rows", "16", "--seq_len", "16", "--repeats", "1", "--dtype", "fp32",
        "--output", str(folder / "out.json"), "--csv", str(folder / "out.csv"),
        "--providers", "eager", "fused", *more,
    ]  # fmt: skip


def test_saved_after_every_case(tmp_path, monkeypatch, capsys):
    def second_is_interrupted(*a: Any) -> Any:
        if (tmp_path / "out.json").exists():
            raise KeyboardInterrupt
        return measure_case(*a)

    monkeypatch.setattr(bench, "measure_case", second_is_interrupted)
    assert bench.main(arguments(tmp_path)) == 130
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [found["op"] for found in saved["cases"]] == ["norm_down"]
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + 6
    assert "norm_down  tiny" in capsys.readouterr().out


def test_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    assert bench.main(arguments(tmp_path, "--ops", "low_dim_linear")) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/out.json: No space left on device\n"


def test_out_of_time_is_written_down(tmp_path, monkeypatch, capsys):
    now = iter([0.0, 59.0, 61.0, 61.0, 62.0])
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: next(now)))
    more = ["--minutes", "1", "--ops", "low_dim_linear", "norm_down", "norm_qkv"]
    assert bench.main(arguments(tmp_path, *more)) == 0
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [found["op"] for found in saved["cases"]] == ["low_dim_linear"]
    assert saved["not_run"] == [
        {"op": op, "size": "tiny", "rows": 16} for op in ("norm_down", "norm_qkv")
    ]
    assert saved["seconds"] == 62
    assert "not run, after 1 minutes: 2 cases" in capsys.readouterr().out


def test_exit_code_says_that_a_provider_is_wrong(tmp_path, monkeypatch, capsys):
    right = OPERATIONS["low_dim_linear"]
    wrong = dataclasses.replace(right, fused=lambda *a: (wrong_row(*right.fused(*a)),))
    monkeypatch.setitem(bench.OPERATIONS, "low_dim_linear", wrong)
    assert bench.main(arguments(tmp_path, "--ops", "low_dim_linear")) == 1
    assert re.search(r"  fused: wrong: \w+ is off by ", capsys.readouterr().out)


def test_plot_without_matplotlib_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "has_matplotlib", lambda: False)
    more = ["--ops", "low_dim_linear", "--plot", str(tmp_path / "out.png")]
    assert bench.main(arguments(tmp_path, *more)) == 0
    warning = "warning: --plot: matplotlib is not installed; nothing is drawn\n"
    assert capsys.readouterr().err == warning
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("suffix", options.PLOT_SUFFIXES)
def test_plot(suffix, finished):
    pytest.importorskip("matplotlib")
    content = table.plot(finished.report["cases"], suffix[1:])
    assert content.startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix])


def test_plot_lines_are_microseconds_a_row():
    first, second = synthetic(compile=8.192, fused=None), synthetic(compile=32.0)
    second["rows"] = 8192
    lines = table._lines([first, second], "norm_down", "130m")
    assert lines == {"compile": [(4096, pytest.approx(0.002)), (8192, pytest.approx(32 / 8192))]}
    assert table._lines([first], "norm_down", "3b") == {}


# --- the command line ---------------------------------------------------------------------------


BAD = {
    "--ops nothing": "--ops: 'nothing'; allowed are norm_down, up_rotary, norm_qkv, low_dim_linear",
    "--providers magic": "--providers: 'magic'; allowed are eager, compile, stacked, fused",
    "--sizes 7b": "--sizes: '7b'; allowed are 130m, 370m, 3b, tiny",
    "--dtype int8": "--dtype: 'int8'; allowed are bf16, fp16, fp32",
    "--device tpu": "--device: 'tpu'; allowed are auto, cuda, cpu",
    "--rows 1000": "--rows: 1000 is no multiple of --seq_len 1024",
    "--rows 64 --seq_len 48": "--rows: 64 is no multiple of --seq_len 48",
    "--rows 0": "--rows: '0'; allowed are whole numbers over 0",
    "--rows": "--rows: expected at least one argument",
    "--repeats 1.5": "--repeats: '1.5'; allowed are whole numbers over 0",
    "--seconds-per-case nan": "'nan'; allowed are numbers over 0",
    "--repeats 3 --seconds_per_case 1": "--repeats: not together with --seconds_per_case",
    "--output missing/out.json": "--output: missing/out.json: the folder missing does not exist",
    "--csv missing/out.csv": "--csv: missing/out.csv: the folder missing does not exist",
    "--output .": "--output: . is a folder; allowed is a file",
    "--plot out.txt": "--plot: out.txt; allowed are .png, .pdf, .svg",
    "--colour": "unrecognized arguments: --colour",
    "--row 64": "unrecognized arguments: --row 64",
}


@pytest.mark.parametrize("line", list(BAD))
def test_bad_input_is_one_line(line, capsys):
    assert bench.main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert BAD[line] in captured.err


def test_cuda_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for line, text in (
        ("--device cuda", "--device: cuda, but torch finds no CUDA device here"),
        ("--cuda-graphs", "--cuda_graphs: needs a CUDA device"),
    ):
        assert bench.main(line.split()) == 2
        assert capsys.readouterr().err.startswith(f"error: {text}")


def test_exit_code_of_the_command():
    done = command("--ops", "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --ops: 'nothing'; allowed are norm_down")
    assert done.stderr.count("\n") == 1


def test_defaults(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parsed = options.parse([])
    assert (parsed.sizes, parsed.rows, parsed.seq_len) == (["tiny"], [2048], 1024)
    assert (parsed.ops, parsed.providers) == (list(OPERATIONS), list(PROVIDERS))
    assert (parsed.device, parsed.dtype) == (CPU, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parsed = options.parse(["--rows", "2048", "1024", "2048"])
    assert parsed.sizes == ["130m", "370m", "3b"]
    assert parsed.rows == [2048, 1024]
    assert sorted(options.parse([]).rows) == [4096, 8192, 16384, 32768, 65536]
    with pytest.raises(UsageError):
        options.parse(["--output", "missing/out.json"])


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_on_a_gpu(graphs):
    settings = Settings(torch.device("cuda"), torch.bfloat16, 5, 0.0, cuda_graphs=graphs)
    problem = Problem("130m", 768, 128, 64, batch=4, seq_len=1024)
    peak = report.peaks(torch.cuda.get_device_name())
    for op, operation in OPERATIONS.items():
        measured, sets = measure_case(operation, problem, list(PROVIDERS), settings)
        assert [r.message for r in measured.values()] == [""] * len(PROVIDERS)
        found = report.case_report(op, operation, problem, torch.bfloat16, measured, sets, peak)
        for row in found["results"]:
            assert row["peak_memory_bytes"] > 0
            assert row["share_of_roofline"] is None or 0 < row["share_of_roofline"] < 1
        assert len(report.verdict([found])) == len(MODES)
