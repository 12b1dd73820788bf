"""What the rules look at, and how it is read from the log of ptxas and from TTGIR."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any


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
