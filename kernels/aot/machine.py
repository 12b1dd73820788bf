"""What is read from machine code: the tensor-core instructions of many kernels at once.

nvdisasm takes a quarter of a second to start and little for a kernel, so it gets the instructions
of all kernels of an architecture, one after the other, and the addresses tell them apart.
"""

import bisect
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_EXECUTABLE = 4  # SHF_EXECINSTR
_TENSOR_CORE = re.compile(r"/\*([0-9a-f]{4,})\*/[^;\n]*?\b(?:HMMA|HGMMA|UTC\w*MMA)\b")


def instructions(cubin: bytes) -> bytes:
    """The machine code of the one kernel in a cubin, an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<8xQ8xQQ", cubin, table + size * at) for at in range(count)]
    (only,) = [cubin[at : at + n] for flags, at, n in sections if flags & _EXECUTABLE]
    return only


def tensor_core_counts(architecture: int, codes: Sequence[bytes]) -> list[int]:
    """The number of tensor-core instructions in each machine code (HMMA, HGMMA, UTC*MMA)."""
    ends = list(itertools.accumulate(map(len, codes)))
    counts = [0] * len(codes)
    for address in _TENSOR_CORE.findall(_disassembled(architecture, b"".join(codes))):
        counts[bisect.bisect_right(ends, int(address, 16))] += 1
    return counts


def _disassembled(architecture: int, code: bytes) -> str:
    from triton import knobs

    name = f"SM{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code"
        path.write_bytes(code)
        command = [knobs.nvidia.nvdisasm.path, "--no-dataflow", "--binary", name, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
