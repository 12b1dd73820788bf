"""How many programs share a multiprocessor.

The numbers are from the CUDA C++ Programming Guide, technical specifications per compute
capability.
"""

from kernels.aot.readings import Readings
from kernels.aot.variants import Variant

REGISTERS_PER_MULTIPROCESSOR = 65_536
SHARED_PER_MULTIPROCESSOR = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes
SHARED_RESERVED = 1024  # bytes of each block that the system takes
WARPS_PER_MULTIPROCESSOR = 64
BLOCKS_PER_MULTIPROCESSOR = 32
TENSOR_MEMORY_COLUMNS = 512


def programs(variant: Variant, read: Readings) -> int:
    """Programs that share a multiprocessor, by what runs out first."""
    warps = variant.warps
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
