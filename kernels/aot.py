"""Compiles every launch that the project ships for each architecture, without a GPU, and checks
the compiled code.

    python -m kernels.aot --check docs/kernels_table.md
    python -m kernels.aot --arch 90 --output readings.json

The interpreter shows that a kernel computes the right numbers, not that it compiles well: it knows
no registers, no shared memory and no asynchronous dots. Those are read here, from the compiler's
log, its intermediate code (TTGIR), its PTX and the disassembled machine code, and held against
RULES. What is compiled follows from the shipped table of configurations: launch.py runs on tensors
without storage, and its launches are recorded instead of started.

Exit codes: 0 no rule is violated, 1 one is (or the table differs), 2 wrong input.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kernels.triton import configs

# CUDA C++ Programming Guide, technical specifications per compute capability.
REGISTERS_PER_MULTIPROCESSOR = 65_536
SHARED_PER_MULTIPROCESSOR = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes
SHARED_RESERVED = 1024  # bytes of each block that the system takes
WARPS_PER_MULTIPROCESSOR = 64
BLOCKS_PER_MULTIPROCESSOR = 32
TENSOR_MEMORY_COLUMNS = 512

# Besides bfloat16, at every size for every architecture: what the tests on a GPU also run. 370m has
# every tile of the half-precision table; float32 has one more tile for heads of 128, at 3b.
ALSO = dict.fromkeys((80, 90), (("fp16", "370m"), ("fp32", "370m"), ("fp32", "3b")))

# Odd numbers of rows and positions: Triton compiles them for any value, as it does at run time for
# one that is neither 1 nor a multiple of 16.
ROWS, POSITIONS = 4095, 1023
ENVIRONMENT = {"TRITON_DUMP_PTXAS_LOG": "1"}  # with -v, for registers, spills and warnings


# --- what is compiled ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A kernel with what Triton specialises it for.

    Attributes:
        module, kernel: Where the kernel is.
        signature: Name and type of each argument, "constexpr" for constants.
        constants: Name and value of each constant.
        aligned: Names of the arguments that are multiples of 16 (addresses in bytes).
        options: num_warps and, where given, num_stages.
        row_vectors: Whether an operand has one entry a row: its loads are 4 bytes wide.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]
    row_vectors: bool

    @property
    def multiplies(self) -> bool:
        """Whether the kernel is a matrix product: those alone have an inner tile."""
        return "BLOCK_K" in dict(self.constants)

    @property
    def shape(self) -> str:
        """The tile, warps and stages for the table."""
        blocks = [str(v) for k, v in self.constants if k.startswith("BLOCK_")]
        options = dict(self.options)
        stages = f", {options['num_stages']} stages" if "num_stages" in options else ""
        return f"{'×'.join(blocks)}, {options['num_warps']} warps{stages}"


@dataclass(frozen=True)
class Variant:
    """A launch of an operation at a model size; no launch: `reason` says why there is none."""

    architecture: int
    operation: str
    size: str
    dtype: str
    launch: Launch | None
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.operation}, {self.size}, {self.dtype}, sm_{self.architecture}"


def _describe(kernel: Any, args: Sequence[Any], keywords: dict[str, Any]) -> Launch:
    """The launch that kernel[grid](*args, **keywords) would be, specialised by Triton's rules."""
    import torch

    types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    given = dict(zip(kernel.arg_names, args, strict=False)) | keywords
    options = {name: given.pop(name) for name in set(given) - set(kernel.arg_names)}
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name] = types[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:  # allocations are aligned
                aligned.append(name)
        elif parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0:
                aligned.append(name)
    return Launch(
        module=kernel.fn.__module__,
        kernel=kernel.__name__,
        signature=tuple(signature.items()),
        constants=tuple(constants.items()),
        aligned=tuple(aligned),
        options=tuple(sorted(options.items())),
        row_vectors=any(isinstance(v, torch.Tensor) and v.dim() == 1 for v in given.values()),
    )


def record(launch: Callable[[], Any]) -> Launch:
    """What the one kernel launch inside of `launch` would be; nothing runs."""
    from triton.runtime import JITFunction

    recorded = []
    run = JITFunction.run

    def instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        recorded.append(_describe(kernel, args, keywords))

    JITFunction.run = instead
    try:
        launch()
    finally:
        JITFunction.run = run
    (only,) = recorded
    return only


def _products(architecture: int, size: configs.Size, kind: Any) -> Iterator[tuple[str, Any]]:
    """Name and launch of the matrix products that ops.py asks for at a size; where the table has
    no configuration, name and the reason.
    """
    import torch

    from kernels.triton import launch

    empty = functools.partial(torch.empty, device="meta", dtype=kind)
    d, r, width = size.d, size.r, size.head_dim
    exact = kind == torch.float32
    x, rstd = empty(ROWS, d), empty(ROWS, dtype=torch.float32)
    h = empty(ROWS, 3 * r).split(r, dim=1)[1]
    cos = empty(POSITIONS, width // 2, dtype=torch.float32)

    def project(x: torch.Tensor, n: int, scaled: bool, rotated: bool) -> Any:
        turned, angle = (width, cos) if rotated else (0, None)
        config, reason = configs.find("project", architecture, n, x.size(1), turned, exact)
        if config is None:
            return reason
        weight, scale = empty(n, x.size(1)), rstd if scaled else None
        return lambda: launch.project(x, weight, scale, angle, angle, width, config)

    yield "norm_down", project(x, 3 * r, True, False)
    for heads, n in (("", d), (", one kv head", width)):
        yield f"up_rotary{heads}", project(h, n, False, True)
        yield f"norm_qkv, rotated{heads}", project(x, n, True, True)
        yield f"norm_qkv, not rotated{heads}", project(x, n, True, False)
    config, reason = configs.find("norm_backward_matmul", architecture, d, 3 * r, 0, exact)
    backward = functools.partial(launch.norm_backward_matmul, empty(ROWS, 3 * r), empty(3 * r, d))
    for name, residual in (("", None), (" + residual", x)):
        made = reason if config is None else functools.partial(backward, x, rstd, residual, config)
        yield f"norm_down backward{name}", made


def _row_kernels(columns: int, latents: int, kind: Any) -> Iterator[tuple[str, Any]]:
    """Name and launch of the kernels over whole rows."""
    import torch

    from kernels.triton import launch

    empty = functools.partial(torch.empty, device="meta", dtype=kind)
    x, h, rstd = empty(ROWS, columns), empty(ROWS, latents), empty(ROWS, dtype=torch.float32)
    yield "row_rstd", lambda: launch.row_rstd(x, 1e-5)
    yield "scale_and_dot", lambda: launch.scale_and_dot(h, h, rstd)
    yield "norm_backward", lambda: launch.norm_backward(x, x, rstd, None)
    yield "norm_backward + residual", lambda: launch.norm_backward(x, x, rstd, x)


def _unrotations(size: configs.Size, kind: Any) -> Iterator[tuple[str, Any]]:
    """Name and launch of the rotation's gradient: whole, and into columns of a wider matrix."""
    import torch

    from kernels.triton import launch

    empty = functools.partial(torch.empty, device="meta", dtype=kind)
    x, rstd = empty(ROWS, size.d), empty(ROWS, dtype=torch.float32)
    cos = empty(POSITIONS, size.head_dim // 2, dtype=torch.float32)
    out = empty(ROWS, 3 * size.d).split(size.d, dim=1)[1]
    yield "unrotate", lambda: launch.unrotate(x, cos, cos, size.head_dim, None)
    yield "unrotate + scale", lambda: launch.unrotate(x, cos, cos, size.head_dim, rstd, out)


def variants(architectures: Sequence[int]) -> list[Variant]:
    """Every launch at the sizes of the table, and the row-wise kernels at the widest row."""
    import torch

    from kernels.dispatch import WIDEST_ROW

    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    found = []
    for architecture in architectures:
        chosen = [("bf16", size) for size in configs.SIZES] + list(ALSO.get(architecture, ()))
        for dtype, name in chosen:
            size, kind = configs.SIZES[name], kinds[dtype]
            launches = itertools.chain(
                _products(architecture, size, kind),
                _row_kernels(size.d, 3 * size.r, kind),
                _unrotations(size, kind),
            )
            for operation, launch in launches:
                made = (None, launch) if isinstance(launch, str) else (record(launch), "")
                found.append(Variant(architecture, operation, name, dtype, *made))
        for operation, launch in _row_kernels(WIDEST_ROW, WIDEST_ROW, torch.bfloat16):
            widest = f"rows of {WIDEST_ROW}"
            found.append(Variant(architecture, operation, widest, "bf16", record(launch)))
    return sorted(found, key=lambda v: (v.architecture, v.operation, v.dtype, v.size))


# --- what is read from the compiled code --------------------------------------------------------


@dataclass(frozen=True)
class Readings:
    """What the rules look at.

    Attributes:
        error: Why the compiler refused, in one line; all else is then without meaning.
        registers: Of a thread.
        stack, spilled: Bytes of a thread in local memory: frame; stores and loads of spills.
        shared: Bytes of a program in shared memory.
        tensor_memory: Columns of a program in tensor memory (sm_100).
        tensor_core: Tensor-core instructions (HMMA, HGMMA, UTC*MMA).
        warnings: Of ptxas, code C75xx: it changed asynchronous dots.
        depths: For each dot, the number of buffers behind either operand; 0: in registers.
        loads, copies: Global loads and copies into shared memory, by bits a thread takes at once.
        pending: Of each wait for wgmma inside of a loop: the groups left running.
        unguarded: Writes to shared memory after a wait for wgmma with no barrier between them.
    """

    error: str = ""
    registers: int = 0
    stack: int = 0
    spilled: int = 0
    shared: int = 0
    tensor_memory: int = 0
    tensor_core: int = 0
    warnings: tuple[str, ...] = ()
    depths: tuple[tuple[int, int], ...] = ()
    loads: dict[str, int] = dataclasses.field(default_factory=dict)
    copies: dict[str, int] = dataclasses.field(default_factory=dict)
    pending: tuple[int, ...] = ()
    unguarded: int = 0


def read_log(log: str) -> dict[str, Any]:
    """Registers, local memory and warnings from what `ptxas -v` says."""
    used = re.search(r"Used (\d+) registers", log)
    local = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", log)
    assert used is not None, f"no registers in the log of ptxas: {log!r}"
    assert local is not None, f"no stack frame in the log of ptxas: {log!r}"
    return {
        "registers": int(used[1]),
        "stack": int(local[1]),
        "spilled": int(local[2]) + int(local[3]),
        "warnings": tuple(re.findall(r"\(C75\d\d\)[^\n]*", log)),
    }


def operand_depths(ttgir: str) -> tuple[tuple[int, int], ...]:
    """The numbers of shared-memory buffers behind the operands of each dot, without repeats.

    An operand is followed back, through element-wise code where there is some, to the
    `memdesc_index` that picks one of the buffers: memdesc<3x128x64xbf16> -> memdesc<128x64xbf16>.
    """
    definitions: dict[str, str] = {}
    for results, text in re.findall(r"^\s*(%\w+(?::\d+)?(?:, %\w+)*) = (.*)$", ttgir, re.MULTILINE):
        definitions |= dict.fromkeys(re.findall(r"%\w+", results), text)
    for first in re.findall(r"iter_args\((.*?)\)", ttgir):  # an argument of a loop: its first value
        definitions.update(pair.split(" = ") for pair in first.split(", "))

    def depth(name: str, seen: frozenset[str] = frozenset()) -> int:
        text = definitions.get(name, "")
        if index := re.match(r"ttg\.memdesc_index .*?: !ttg\.memdesc<(\d+)x", text):
            return int(index[1])
        if text.startswith("ttg.local_alloc"):
            return 1
        operands = re.sub(r"\[[^]]*\]| token .*| : .*", "", text)
        found = {
            depth(operand, seen | {name})
            for operand in re.findall(r"%\w+", operands)
            if operand not in seen | {name}
        }
        return min(found - {0}, default=0)

    dots = r"(?:ttng\.warp_group_dot|ttng\.tc_gen5_mma|tt\.dot) (%\w+)(?:#\d+)?, (%\w+)"
    return tuple(sorted({(depth(a), depth(b)) for a, b in re.findall(dots, ttgir)}))


_PTX = re.compile(
    r"(?P<dot>wgmma\.mma_async)"
    r"|wgmma\.wait_group\.sync\.aligned\s+(?P<wait>\d+)"
    r"|(?P<barrier>\bbar\.sync\s+0\s*;|barrier(?:\.cta)?\.sync(?:\.aligned)?\s+0\s*;)"
    r"|(?P<write>cp\.async\.(?:c[ag]|bulk)\.(?!commit|wait)|\bst\.shared|\bstmatrix)"
    r"|^(?P<label>\$\w+):"
    r"|\bbra(?:\.uni)?\s+(?P<branch>\$\w+)"
)


def _ptx_events(ptx: str) -> list[tuple[str, str]]:
    found = (match for line in ptx.splitlines() for match in _PTX.finditer(line))
    return [(str(match.lastgroup), match[str(match.lastgroup)]) for match in found]


def _ptx_loops(events: list[tuple[str, str]]) -> Iterator[tuple[int, int]]:
    """First and last event of each loop: a label and a later branch back to it."""
    labels = {name: at for at, (kind, name) in enumerate(events) if kind == "label"}
    for at, (kind, name) in enumerate(events):
        if kind == "branch" and labels.get(name, at) < at:
            yield labels[name], at


def pending_groups(ptx: str) -> tuple[int, ...]:
    """What each wait for wgmma inside of a loop with wgmma leaves running."""
    events = _ptx_events(ptx)
    bodies = [events[first:last] for first, last in _ptx_loops(events)]
    return tuple(
        int(value)
        for body in bodies
        if any(kind == "dot" for kind, _ in body)
        for kind, value in body
        if kind == "wait"
    )


def unguarded_writes(ptx: str) -> int:
    """Writes to shared memory that follow a wait for wgmma without a barrier of the whole program
    between them, also over the end of a loop into its next turn.
    """
    events = _ptx_events(ptx)
    turns = {last: first for first, last in _ptx_loops(events)}
    path = []
    for at, event in enumerate(events):
        path.append(at)
        if event[0] == "branch" and at in turns:
            path += range(turns[at], at)
    waited, found = False, set()
    for at in path:
        kind = events[at][0]
        if kind in ("wait", "barrier"):
            waited = kind == "wait"
        elif kind == "write" and waited:
            found.add(at)
    return len(found)


def widths_of_loads(ptx: str) -> dict[str, Any]:
    """How many global loads and copies to shared memory take how many bits at once."""
    loads: Counter[str] = Counter()
    for suffix in re.findall(r"\bld\.global(\S*)", ptx):
        vector = re.search(r"\.v(\d)\b", suffix)
        bits = re.search(r"\.[bufs](\d+)$", suffix)
        assert bits is not None, f"a load without a type: ld.global{suffix}"
        loads[str(int(vector[1] if vector else 1) * int(bits[1]))] += 1
    copied = r"\bcp\.async\.c[ag]\.\S+\s*\[[^]]*\],\s*\[[^]]*\],\s*(\w+)"
    copies = Counter(str(8 * int(size, 0)) for size in re.findall(copied, ptx))
    return {"loads": dict(sorted(loads.items())), "copies": dict(sorted(copies.items()))}


def compile_and_read(architecture: int, launch: Launch) -> Readings:
    """Compiles a launch for an architecture and reads the result. For sm_90 and later the compiler
    targets the architecture-specific names (sm_90a, sm_100a).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    attributes = {
        (at,): [["tt.divisibility", 16]]
        for at, (name, _) in enumerate(launch.signature)
        if name in launch.aligned
    }
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), attributes)
    target = GPUTarget("cuda", architecture, 32)
    printed = io.StringIO()  # of Triton: the log of ptxas, or all of the PTX that it refused
    try:
        with tempfile.TemporaryDirectory() as cache, _environment(TRITON_CACHE_DIR=cache):
            with contextlib.redirect_stdout(printed):
                compiled = triton.compile(source, target=target, options=dict(launch.options))
            code = _disassembled(compiled.asm["cubin"], cache) if launch.multiplies else ""
    except Exception as error:  # whatever stage refuses, it is that variant's result
        return Readings(error=_one_line(error))
    ptx, hopper = compiled.asm["ptx"], architecture == 90
    return Readings(
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        tensor_core=len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", code)),
        depths=operand_depths(compiled.asm["ttgir"]),
        pending=pending_groups(ptx) if hopper else (),
        unguarded=unguarded_writes(ptx) if hopper else 0,
        **read_log(printed.getvalue()),
        **widths_of_loads(ptx),
    )


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


def _disassembled(cubin: bytes, folder: str) -> str:
    from triton import knobs

    path = Path(folder) / "kernel.cubin"
    path.write_bytes(cubin)
    command = [knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _one_line(error: Exception) -> str:
    """The line of an exception that says most: the first that speaks of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if re.search(r"\berror\b|fatal", line, re.IGNORECASE)]
    specific = [line for line in said if not re.search(r"codegen error|error code", line)]
    return f"{type(error).__name__}: {next(iter(specific + said + lines), 'no message')}"


# --- the rules ----------------------------------------------------------------------------------


def compiles(variant: Variant, read: Readings) -> str | None:
    """The table has a configuration and the compiler accepts it. Seen: ptxas refuses with C7602
    where a wgmma needs more registers than the number of warps leaves it.
    """
    if variant.launch is None:
        return f"no configuration: {variant.reason}"
    return read.error or None


def no_spills(variant: Variant, read: Readings) -> str | None:
    """Nothing of a thread lives in memory. Measured: an epilogue that loads a second tile spills
    576 bytes at 128×256, and each access then waits for the cache.
    """
    if read.stack or read.spilled:
        return f"{read.stack} bytes of stack, {read.spilled} bytes of spill stores and loads"
    return None


def shared_memory_fits(variant: Variant, read: Readings) -> str | None:
    """A block fits the multiprocessor's shared memory. Triton compiles 262 KB for sm_90 without a
    word; the launch then fails.
    """
    limit = configs.SHARED_MEMORY_LIMIT[variant.architecture]
    return f"{read.shared} bytes, the limit is {limit}" if read.shared > limit else None


def registers_fit(variant: Variant, read: Readings) -> str | None:
    """All threads of a block find registers. Like shared memory, found out by the launch alone."""
    threads = 32 * _warps(variant)
    if read.registers * threads > REGISTERS_PER_MULTIPROCESSOR:
        return f"{read.registers} registers × {threads} threads are over 65536"
    return None


def tensor_cores_used(variant: Variant, read: Readings) -> str | None:
    """Products in half precision run on tensor cores. A tile or layout that these do not take
    compiles all the same, to scalar code ten times slower.
    """
    missing = _half_product(variant) and not read.tensor_core
    return "no tensor-core instruction" if missing else None


def not_serialised(variant: Variant, read: Readings) -> str | None:
    """ptxas left the dots asynchronous. Measured: an operand that is computed in registers inside
    of the loop, or some TMA loops, give C7515, "wgmma instructions are serialized"; Triton drops
    the warning.
    """
    return "; ".join(sorted(set(read.warnings))) or None


def buffers_are_deep_enough(variant: Variant, read: Readings) -> str | None:
    """Both operands of a dot have the same number of buffers, and on sm_90 as many as stages.
    Measured: a tile that also feeds element-wise code in the loop (a sum of squares) gets one
    buffer fewer, and the next copy then overwrites what the asynchronous dot still reads.
    """
    if variant.launch is None or not variant.launch.multiplies:
        return None
    stages = dict(variant.launch.options)["num_stages"]
    least = stages if _hopper_product(variant) else 1
    bad = [pair for pair in read.depths if pair[0] != pair[1] or min(pair) < least]
    if bad or not read.depths:
        found = ", ".join(f"{a} and {b}" for a, b in bad) or "no dot"
        return f"buffers of the operands: {found}; wanted: equal, at least {least}"
    return None


def loads_are_vectorised(variant: Variant, read: Readings) -> str | None:
    """Global loads take 16 bytes a thread; per-row factors alone may take 4. A pointer or stride
    whose divisibility by 16 is lost gives loads of 2 bytes, and no copies past the registers.
    """
    rows = variant.launch is not None and variant.launch.row_vectors
    found = [("load", *item, 32 if rows else 128) for item in read.loads.items()]
    found += [("copy", *item, 128) for item in read.copies.items()]
    if not any(int(width) >= 128 for _, width, _, _ in found):
        return f"none of 128 bits: {read.loads} loads, {read.copies} copies"
    narrow = [
        f"{kind} of {width} bits, {count} times"
        for kind, width, count, least in found
        if int(width) < 128 and int(width) != least
    ]
    return "; ".join(narrow) or None


def barrier_before_reuse(variant: Variant, read: Readings) -> str | None:
    """On sm_90 a barrier stands between a wait for wgmma and the next write to shared memory. A
    wait is one warpgroup's own: with two of them and no barrier, the faster overwrites the tile
    that the slower still multiplies (Triton before its pull request 11056).
    """
    if variant.architecture == 90 and read.unguarded:
        return f"{read.unguarded} writes to shared memory follow a wait without a barrier"
    return None


def dots_stay_asynchronous(variant: Variant, read: Readings) -> str | None:
    """On sm_90 the loop waits for the dot before last, not for its own. Measured: warp
    specialisation and fused second products wait for all, and loads and dots then take turns.
    """
    if not _hopper_product(variant):
        return None
    if not read.pending:
        return "no wait for wgmma inside of a loop"
    return "the loop waits for its own dot" if min(read.pending) < 1 else None


RULES: tuple[Callable[[Variant, Readings], str | None], ...] = (
    no_spills,
    shared_memory_fits,
    registers_fit,
    tensor_cores_used,
    not_serialised,
    buffers_are_deep_enough,
    loads_are_vectorised,
    barrier_before_reuse,
    dots_stay_asynchronous,
)


def violations(variant: Variant, read: Readings) -> list[str]:
    """What is wrong with a variant, "rule: finding"; `compiles` alone where nothing compiled."""
    rules = (compiles,) if variant.launch is None or read.error else RULES
    said = ((rule.__name__, rule(variant, read)) for rule in rules)
    return [f"{name}: {message}" for name, message in said if message is not None]


def _half_product(variant: Variant) -> bool:
    """A matrix product of half-precision operands: float32 is multiplied without tensor cores."""
    return variant.launch is not None and variant.launch.multiplies and variant.dtype != "fp32"


def _hopper_product(variant: Variant) -> bool:
    """A matrix product that runs as wgmma."""
    return _half_product(variant) and variant.architecture == 90


def _warps(variant: Variant) -> int:
    return dict(variant.launch.options)["num_warps"] if variant.launch is not None else 0


def programs(variant: Variant, read: Readings) -> int:
    """Programs that share a multiprocessor, by what runs out first."""
    warps = _warps(variant)
    registers = 32 * warps * (-(-read.registers // 8) * 8)  # a warp takes multiples of 256
    limits = [
        REGISTERS_PER_MULTIPROCESSOR // max(registers, 1),
        SHARED_PER_MULTIPROCESSOR[variant.architecture] // (read.shared + SHARED_RESERVED),
        WARPS_PER_MULTIPROCESSOR // max(warps, 1),
        BLOCKS_PER_MULTIPROCESSOR,
    ]
    if read.tensor_memory:
        limits.append(TENSOR_MEMORY_COLUMNS // read.tensor_memory)
    return min(limits)


# --- results ------------------------------------------------------------------------------------

Results = list[tuple[Variant, Readings]]


def compile_all(wanted: Sequence[Variant]) -> Results:
    """Readings of each variant, compiled in as many processes as there are cores; sizes that share
    a launch share the compilation.
    """
    jobs = list(dict.fromkeys((v.architecture, v.launch) for v in wanted if v.launch is not None))
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    with pool:
        read: dict[Any, Readings] = dict(
            zip(jobs, pool.map(compile_and_read, *zip(*jobs, strict=True)), strict=True)
        )
    return [(v, read.get((v.architecture, v.launch), Readings())) for v in wanted]


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


def table(results: Results) -> str:
    """The page docs/kernels_table.md."""
    used = versions()
    lines = [
        "# Compiled kernels",
        "",
        "Written by `python -m kernels.aot --table docs/kernels_table.md`, not by hand; no GPU is"
        " needed. The rules that",
        "each row keeps are in [kernels/aot.py](../kernels/aot.py). Compilers: triton"
        f" {used['triton']} with ptxas {used['ptxas']}, for sm_100",
        f"ptxas {used['ptxas_blackwell']}. Registers are a thread's, shared memory is a program's"
        " in KB of 1024 bytes, tensor-core counts are",
        "instructions in the machine code, depth is the number of buffers behind each operand of"
        " a dot.",
        "",
        "| arch | operation | size | dtype | tile | registers | shared KB | programs/SM |"
        " tensor-core | depth |",
        "|---|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for variant, read in results:
        head = [f"sm_{variant.architecture}", variant.operation, variant.size, variant.dtype]
        if variant.launch is None or read.error:
            cells = [variant.launch.shape if variant.launch else "-", *["-"] * 5]
        else:
            depth = ", ".join(str(a) if a == b else f"{a}/{b}" for a, b in read.depths) or "-"
            cells = [variant.launch.shape, str(read.registers), f"{read.shared / 1024:.1f}"]
            cells += [str(programs(variant, read)), str(read.tensor_core), depth]
        lines.append(f"| {' | '.join(head + cells)} |")
    return "\n".join(lines) + "\n"


def to_json(results: Results) -> dict[str, Any]:
    """Versions, and of each variant its launch, its readings and what it violates."""
    return {
        "versions": versions(),
        "variants": [
            dataclasses.asdict(variant)
            | dataclasses.asdict(read)
            | {"programs": programs(variant, read), "violations": violations(variant, read)}
            for variant, read in results
        ],
    }


def difference(written: str, fresh: str) -> list[str]:
    """The lines in which the page in the tree (-) and a fresh one (+) differ."""
    lines = difflib.unified_diff(written.splitlines(), fresh.splitlines(), lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


# --- command line -------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m kernels.aot", description=(__doc__ or "").partition("\n\n")[0])
    allowed = configs.ARCHITECTURES
    parser.add_argument("--arch", type=int, nargs="+", choices=allowed, help="default: all")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="writes all readings")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="writes the table")
    parser.add_argument("--check", type=Path, metavar="FILE.md", help="compares with this table")
    options = parser.parse_args(arguments)
    if options.arch and (options.table or options.check):
        parser.error("the table has every architecture: leave out --arch, or --table and --check")
    for name in ("output", "table"):
        path = getattr(options, name)
        if path is not None and (problem := _unwritable(path)):
            parser.error(f"--{name} {path}: {problem}")
    try:
        options.written = None if options.check is None else options.check.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no text"
        parser.error(f"--check {options.check}: {reason}")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed")
    from triton import knobs

    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so nothing compiles: unset it")
    return options


def _unwritable(path: Path) -> str | None:
    folder = path.absolute().parent
    if path.is_dir():
        return "is a folder"
    if not folder.is_dir():
        return f"the folder {path.parent} does not exist"
    where = path if path.exists() else folder
    return None if os.access(where, os.W_OK) else f"{where} cannot be written"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints, writes and compares; the exit code."""
    options = _parse(arguments)
    start = time.perf_counter()
    wanted = variants(sorted(set(options.arch or configs.ARCHITECTURES)))
    try:
        results = compile_all(wanted)
    except BrokenProcessPool:
        print("a compiling process died: out of memory, or the compiler aborted", file=sys.stderr)
        return 1
    fresh = table(results)
    print(fresh, end="")
    if options.table is not None:
        options.table.write_text(fresh, encoding="utf-8")
    if options.output is not None:
        options.output.write_text(json.dumps(to_json(results), indent=1) + "\n", encoding="utf-8")

    problems = [
        f"violated: {variant.name}: {message}"
        for variant, read in results
        for message in violations(variant, read)
    ]
    if options.written is not None and options.written != fresh:
        problems.append(f"{options.check} differs from what was compiled (-), which is (+):")
        problems += difference(options.written, fresh)
    compilations = len({(v.architecture, v.launch) for v in wanted})
    seconds = time.perf_counter() - start
    print(f"\n{len(wanted)} variants, {compilations} compilations, {seconds:.0f} s", flush=True)
    for line in problems:
        print(line, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
