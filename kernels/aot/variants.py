"""Which launches are shipped: those of the table of configurations, at its sizes.

launch.py of kernels/triton runs on tensors without storage, and what it launches is recorded.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kernels.aot.launch import Launch, record
from kernels.triton import configs

# Besides bfloat16, at every size for every architecture: what the tests on a GPU also run. 370m has
# every tile of the half-precision table; float32 has one more tile for heads of 128, at 3b.
ALSO = dict.fromkeys((80, 90), (("fp16", "370m"), ("fp32", "370m"), ("fp32", "3b")))

# Odd numbers of rows and positions: Triton compiles them for any value, as it does at run time for
# one that is neither 1 nor a multiple of 16.
ROWS, POSITIONS = 4095, 1023


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

    @property
    def warps(self) -> int:
        """Warps of a program; 0 without a launch."""
        return dict(self.launch.options)["num_warps"] if self.launch is not None else 0


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


def shipped(architectures: Sequence[int]) -> list[Variant]:
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
