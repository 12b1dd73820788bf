"""Rows of results, the verdict, and the files."""

import csv
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.bench.case import Measured
from kernels.bench.operations import MODES, Operation, Problem, flops, minimal_bytes
from kernels.bench.timing import quantiles

Row = dict[str, Any]

# Dense bfloat16 (and float16) FLOP/s and bytes/s of memory, from NVIDIA's data sheets of these
# products: A100 (2021), H100 (2023), H200 (2024), DGX B200 and GB200 NVL72 (2024, divided by 8 and
# by 72). Where a sheet gives figures with sparsity, half of them.
PEAKS = {
    r"\bA100-SXM4-40GB": (312e12, 1.555e12),
    r"\bA100-PCIE-40GB": (312e12, 1.555e12),
    r"\bA100-SXM4-80GB": (312e12, 2.039e12),
    r"\bA100 80GB PCIe": (312e12, 1.935e12),
    r"\bH100 80GB HBM3\b": (989.4e12, 3.35e12),
    r"\bH100 PCIe\b": (756e12, 2.0e12),
    r"\bH100 NVL\b": (835e12, 3.9e12),
    r"\bH200 NVL\b": (835e12, 4.8e12),
    r"\bH200$": (989.4e12, 4.8e12),
    r"\bB200$": (2.25e15, 8.0e12),
    r"\bGB200$": (2.5e15, 8.0e12),
}
CASE_KEYS = (
    "op", "size", "rows", "batch", "seq_len", "dtype", "d", "r", "head_dim", "input_sets",
)  # fmt: skip
RESULT_KEYS = (
    "provider", "mode", "status", "message", "microseconds_median", "microseconds_p20",
    "microseconds_p80", "microseconds_host_median", "repeats", "flops", "minimal_bytes",
    "teraflops_per_second", "gigabytes_per_second", "share_of_roofline", "speedup_against_compile",
    "peak_memory_bytes",
)  # fmt: skip


def peaks(device_name: str) -> tuple[float, float] | None:
    """FLOP/s and bytes/s of a device, None where the table does not have it; a MIG slice has
    neither.
    """
    if "MIG" in device_name:
        return None
    return next((p for pattern, p in PEAKS.items() if re.search(pattern, device_name)), None)


def roofline_seconds(
    work: int, moved: int, itemsize: int, peak: tuple[float, float] | None
) -> float | None:
    """max(FLOPs / peak, bytes / peak): no implementation is faster. None where the peaks are
    unknown; those of the table are for 16-bit numbers.
    """
    if peak is None or itemsize != 2:
        return None
    return max(work / peak[0], moved / peak[1])


def case_report(
    op: str,
    operation: Operation,
    problem: Problem,
    dtype: torch.dtype,
    measured: Mapping[str, Measured],
    sets: int,
    peak: tuple[float, float] | None,
) -> Row:
    """One case as it stands in the JSON: a row in "results" for each provider and mode."""
    rows = [
        _result(name, mode, result, operation, problem, dtype.itemsize, peak)
        for name, result in measured.items()
        for mode in MODES
    ]
    medians = {(row["provider"], row["mode"]): row["microseconds_median"] for row in rows}
    for row in rows:
        compiled, own = medians.get(("compile", row["mode"])), row["microseconds_median"]
        row["speedup_against_compile"] = compiled / own if compiled and own else None
    noise = {}
    for mode in MODES:
        first, again = medians.get(("eager", mode)), medians.get(("eager_again", mode))
        noise[mode] = abs(again / first - 1) if first and again else None
    return {
        "op": op,
        "size": problem.size,
        "rows": problem.rows,
        "batch": problem.batch,
        "seq_len": problem.seq_len,
        "dtype": str(dtype).removeprefix("torch."),
        "d": problem.d,
        "r": problem.r,
        "head_dim": problem.head_dim,
        "input_sets": sets,
        "noise_share": noise,
        "paths": {name: result.paths for name, result in measured.items() if result.paths},
        "correctness": {name: result.correctness for name, result in measured.items()},
        "results": rows,
    }


def _result(
    name: str,
    mode: str,
    result: Measured,
    operation: Operation,
    problem: Problem,
    itemsize: int,
    peak: tuple[float, float] | None,
) -> Row:
    row: Row = dict.fromkeys(RESULT_KEYS)
    work, moved = flops(operation, problem, mode), minimal_bytes(operation, problem, itemsize, mode)
    row |= {"provider": name, "mode": mode, "status": result.status, "message": result.message}
    row |= {"flops": work, "minimal_bytes": moved, "repeats": len(result.samples)}
    row["peak_memory_bytes"] = result.peak_memory_bytes
    if not result.samples:
        return row
    row |= quantiles([sample.seconds(mode) for sample in result.samples])
    seconds = row["microseconds_median"] / 1e6
    row["teraflops_per_second"] = work / seconds / 1e12
    row["gigabytes_per_second"] = moved / seconds / 1e9
    least = roofline_seconds(work, moved, itemsize, peak)
    row["share_of_roofline"] = least / seconds if least else None
    hosts = [sample.host for sample in result.samples if sample.host is not None]
    if hosts and mode == "forward_backward":
        row["microseconds_host_median"] = quantiles(hosts)["microseconds_median"]
    return row


def verdict(cases: Sequence[Row]) -> list[Row]:
    """For each case and mode, whether fused (eager or compiled) is the fastest provider.

    ratio: the best fused median over the best other one; within_noise: it differs from 1 by no more
    than eager does from itself. A case without a fused or without another result has no entry.
    """
    entries = []
    for case in cases:
        for mode in MODES:
            medians = {
                row["provider"]: row["microseconds_median"]
                for row in case["results"]
                if row["mode"] == mode and row["status"] == "ok"
            }
            medians.pop("eager_again", None)
            fused = {name: t for name, t in medians.items() if name.startswith("fused")}
            others = {name: t for name, t in medians.items() if name not in fused}
            if not fused or not others:
                continue
            best, rival = min(fused, key=fused.__getitem__), min(others, key=others.__getitem__)
            ratio, noise = fused[best] / others[rival], case["noise_share"][mode]
            entries.append(
                {
                    **{key: case[key] for key in ("op", "size", "rows", "seq_len", "dtype")},
                    "mode": mode,
                    "fastest": best if ratio < 1 else rival,
                    "fused_is_fastest": ratio < 1,
                    "best_fused": best,
                    "best_other": rival,
                    "ratio": ratio,
                    "within_noise": None if noise is None else abs(ratio - 1) <= noise,
                }
            )
    return entries


# --- environment --------------------------------------------------------------------------------


def _output(command: Sequence[str]) -> str | None:
    """What a program prints, None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    folder = Path(__file__).resolve().parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def environment(device: torch.device, argv: Sequence[str]) -> Row:
    """Where and of what the numbers are; null for what is unknown."""
    cuda = device.type == "cuda"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = _output(query) if cuda else None
    changed = _output(["git", "status", "--porcelain"])
    name = device_name(device)
    peak = peaks(name)
    return {
        "device": name,
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "peak_flops_per_second": peak[0] if peak else None,
        "peak_bytes_per_second": peak[1] if peak else None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda if cuda else None,
        "driver": driver.splitlines()[0] if driver else None,
        "python": platform.python_version(),
        "cpu_threads": torch.get_num_threads(),
        "git_commit": _output(["git", "rev-parse", "HEAD"]),
        "git_dirty": None if changed is None else bool(changed),
        "command": shlex.join(["python", "-m", "kernels.bench", *argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


# --- files --------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes) -> None:
    """Written aside, then renamed: a reader finds the old file or the new one, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


def as_json(report: Row) -> str:
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def as_csv(cases: Sequence[Row]) -> str:
    """The rows of all cases, each with what its case is. An empty field is JSON's null."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*CASE_KEYS, *RESULT_KEYS], lineterminator="\n")
    writer.writeheader()
    for case in cases:
        for row in case["results"]:
            writer.writerow({**{key: case[key] for key in CASE_KEYS}, **row})
    return file.getvalue()
