"""Compiles launches and reads the results."""

import contextlib
import dataclasses
import functools
import importlib
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from kernels.aot import machine, ptx
from kernels.aot.launch import Launch
from kernels.aot.readings import Readings, operand_depths, read_log
from kernels.aot.variants import Variant

ENVIRONMENT = {"TRITON_DUMP_PTXAS_LOG": "1"}  # with -v, for registers, spills and warnings

Results = list[tuple[Variant, Readings]]


def compile_all(wanted: Sequence[Variant]) -> Results:
    """Readings of each variant, compiled in as many processes as there are cores; sizes that share
    a launch share the compilation.
    """
    jobs = list(dict.fromkeys((v.architecture, v.launch) for v in wanted if v.launch is not None))
    architectures = list(dict.fromkeys(architecture for architecture, _ in jobs))
    read: dict[tuple[int, Launch], Readings] = {}
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        compiled = dict(zip(jobs, pool.map(_compile, *zip(*jobs, strict=True)), strict=True))
        groups = [[job for job in jobs if job[0] == architecture] for architecture in architectures]
        batches = [[compiled[job] for job in group] for group in groups]
        for group, found in zip(groups, pool.map(_count, architectures, batches), strict=True):
            read |= zip(group, found, strict=True)
    return [(v, Readings() if v.launch is None else read[v.architecture, v.launch]) for v in wanted]


def compile_and_read(architecture: int, launch: Launch) -> Readings:
    """The readings of one launch."""
    (read,) = _count(architecture, [_compile(architecture, launch)])
    return read


def _compile(architecture: int, launch: Launch) -> tuple[Readings, bytes]:
    """Compiles a launch; the readings without those of the machine code, and that code where the
    launch has dots.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", architecture, 32)  # for sm_90 and later: sm_90a, sm_100a
    printed = io.StringIO()  # of Triton: the log of ptxas, or all of the PTX that it refused
    try:
        with tempfile.TemporaryDirectory() as cache, _environment(TRITON_CACHE_DIR=cache):
            with contextlib.redirect_stdout(printed):
                compiled = triton.compile(
                    _source(launch), target=target, options=dict(launch.options)
                )
            code = machine.instructions(compiled.asm["cubin"]) if launch.multiplies else b""
    except Exception as error:  # whatever stage refuses, it is that variant's result
        return Readings(error=_one_line(error)), b""
    text, hopper = compiled.asm["ptx"], architecture == 90
    read = Readings(
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        depths=operand_depths(compiled.asm["ttgir"]),
        pending=ptx.pending_groups(text) if hopper else (),
        unguarded=ptx.unguarded_writes(text) if hopper else 0,
        **read_log(printed.getvalue()),
        **ptx.widths_of_loads(text),
    )
    return read, code


def _source(launch: Launch) -> Any:
    """What Triton compiles: the kernel's source and what it is specialised for."""
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    attributes = {
        (at,): [["tt.divisibility", 16]]
        for at, (name, _) in enumerate(launch.signature)
        if name in launch.aligned
    }
    return ASTSource(kernel, dict(launch.signature), dict(launch.constants), attributes)


def _count(architecture: int, compiled: Sequence[tuple[Readings, bytes]]) -> list[Readings]:
    """The readings, with the tensor-core instructions of those that have machine code."""
    codes = [code for _, code in compiled if code]
    try:
        counts = iter(machine.tensor_core_counts(architecture, codes) if codes else ())
    except Exception as error:  # as above; the disassembler's has no kernel of its own
        failed = Readings(error=_one_line(error))
        return [failed if code else read for read, code in compiled]
    return [
        dataclasses.replace(read, tensor_core=next(counts)) if code else read
        for read, code in compiled
    ]


@contextlib.contextmanager
def _environment(**changes: str) -> Iterator[None]:
    """Triton's settings while it compiles: its log, and a cache that is empty."""
    changes |= ENVIRONMENT
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _one_line(error: Exception) -> str:
    """The line of an exception that says most: the first that speaks of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if re.search(r"\berror\b|fatal", line, re.IGNORECASE)]
    specific = [line for line in said if not re.search(r"codegen error|error code", line)]
    return f"{type(error).__name__}: {next(iter(specific + said + lines), 'no message')}"


@functools.cache
def versions() -> dict[str, str]:
    """Triton and the two assemblers that it calls."""
    import triton
    from triton import knobs

    def assembler(path: str) -> str:
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"V([\d.]+)", text)
        return found[1] if found else "unknown"

    return {
        "triton": triton.__version__,
        "ptxas": assembler(knobs.nvidia.ptxas.path),
        "ptxas_blackwell": assembler(knobs.nvidia.ptxas_blackwell.path),
    }
