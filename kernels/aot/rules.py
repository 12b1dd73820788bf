"""The rules that compiled code is held against.

The first sentence of a rule says what it refuses; the page of table.py quotes it.
"""

from collections.abc import Callable

from kernels.aot.occupancy import REGISTERS_PER_MULTIPROCESSOR
from kernels.aot.readings import Readings
from kernels.aot.variants import Variant
from kernels.triton import configs


def compiles(variant: Variant, read: Readings) -> str | None:
    """A shape without configuration, and code that the compiler rejects. Seen: ptxas does so with
    C7602 where a wgmma needs more registers than the number of warps leaves it.
    """
    if variant.launch is None:
        return f"no configuration: {variant.reason}"
    return read.error or None


def no_spills(variant: Variant, read: Readings) -> str | None:
    """Threads that keep values in memory, as stack or spills, for lack of registers. Measured: an
    epilogue that loads a second tile spills 576 bytes at 128×256, and each access then waits for
    the cache.
    """
    if read.stack or read.spilled:
        return f"{read.stack} bytes of stack, {read.spilled} bytes of spill stores and loads"
    return None


def shared_memory_fits(variant: Variant, read: Readings) -> str | None:
    """Programs with more shared memory than the architecture allows a block. Triton compiles 262 KB
    for sm_90 without a word; the launch then fails.
    """
    limit = configs.SHARED_MEMORY_LIMIT[variant.architecture]
    return f"{read.shared} bytes, the limit is {limit}" if read.shared > limit else None


def registers_fit(variant: Variant, read: Readings) -> str | None:
    """Programs whose threads together need more registers than a multiprocessor has. Like shared
    memory, found out by the launch alone.
    """
    threads = 32 * variant.warps
    if read.registers * threads > REGISTERS_PER_MULTIPROCESSOR:
        return f"{read.registers} registers × {threads} threads are over 65536"
    return None


def tensor_cores_used(variant: Variant, read: Readings) -> str | None:
    """Products in half precision without tensor-core instructions. A tile or layout that tensor
    cores do not take compiles all the same, to scalar code ten times slower.
    """
    missing = _half_product(variant) and not read.tensor_core
    return "no tensor-core instruction" if missing else None


def not_serialised(variant: Variant, read: Readings) -> str | None:
    """Asynchronous dots that ptxas made run one by one. Measured: an operand that is computed in
    registers inside of the loop, or some TMA loops, give C7515, "wgmma instructions are
    serialized"; Triton drops the warning.
    """
    return "; ".join(sorted(set(read.warnings))) or None


def buffers_are_deep_enough(variant: Variant, read: Readings) -> str | None:
    """Operands of a dot with unequal numbers of buffers, or on sm_90 with fewer than stages.
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
    """Loads from global memory of less than 16 bytes a thread, but for 4 of a factor per row. A
    pointer or stride whose divisibility by 16 is lost gives loads of 2 bytes, and no copies past
    the registers.
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
    """On sm_90, a write to shared memory after a wait for wgmma with no barrier between them. A
    wait is one warpgroup's own: with two of them and no barrier, the faster overwrites the tile
    that the slower still multiplies (Triton before its pull request 11056).
    """
    if variant.architecture == 90 and read.unguarded:
        return f"{read.unguarded} writes to shared memory follow a wait without a barrier"
    return None


def dots_stay_asynchronous(variant: Variant, read: Readings) -> str | None:
    """On sm_90, a main loop that waits for its own dot and not only for the one before. Measured:
    warp specialisation and fused second products wait for all, and loads and dots then take
    turns.
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
