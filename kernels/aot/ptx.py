"""What is read from PTX: waits, barriers and writes to shared memory, and the widths of loads."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

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
