"""What the machine is, and the peak its MFU is measured against."""

import platform
from pathlib import Path

import torch

# Dense bf16 tensor-core peaks in FLOP/s from NVIDIA's data sheets (not the doubled sparse figures).
# The first pattern that occurs in the device's name counts, so longer names stand first.
PEAK_BF16_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_flops(name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s; None where the table does not have it."""
    return next((peak for pattern, peak in PEAK_BF16_FLOPS.items() if pattern in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has used: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    try:  # first, since a process inherits ru_maxrss of the one that started it
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
