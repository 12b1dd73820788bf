"""Which implementation computes an operation: the Triton kernel where the tensors are on a GPU and
the shape has a tested configuration, the plain torch definition everywhere else.

The functions have the names and arguments of the definitions in reference.py. They run inside of
custom operators, never under a tracer, so they may look at devices and shapes freely.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from kernels import reference
from kernels.triton import configs

WIDEST_ROW = 8192  # a program of the row-wise kernels holds a whole row in registers


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, interpreted: for tests, in float32 and float16 only
    (the interpreter computes wrong bfloat16 numbers without a word).
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture(device: torch.device) -> int | None:
    """The architecture whose configurations apply on a device; None: no Triton there."""
    if not has_triton():
        return None
    if device.type == "cuda" and torch.version.hip is None:
        return _capability(device)
    return configs.INTERPRETER if device.type == "cpu" and interpreting() else None


def usable(
    kernel: str, device: torch.device, dtype: torch.dtype, n: int, k: int = 0, head_dim: int = 0
) -> tuple[configs.Config | bool, str]:
    """Whether a Triton kernel computes an operation: its configuration (True for the row-wise
    kernels, which need none), or False and the reason.
    """
    arch = architecture(device)
    if arch is None:
        return False, "triton is not installed" if not has_triton() else f"the device is {device}"
    return usable_on(kernel, arch, dtype, n, k, head_dim)


def usable_on(
    kernel: str, arch: int, dtype: torch.dtype, n: int, k: int = 0, head_dim: int = 0
) -> tuple[configs.Config | bool, str]:
    """usable() for an architecture (90: sm_90) that need not be at hand."""
    allowed = [torch.float16, torch.float32]
    if arch != configs.INTERPRETER:
        allowed.append(torch.bfloat16)
    if dtype not in allowed:
        return False, f"no kernel for {dtype}"
    if arch not in (*configs.ARCHITECTURES, configs.INTERPRETER):
        known = ", ".join(f"sm_{a}" for a in configs.ARCHITECTURES)
        return False, f"sm_{arch} has no tested configuration; {known} have"
    if kernel in configs.KERNELS:
        config, reason = configs.find(kernel, arch, n, k, head_dim, dtype == torch.float32)
        return config or False, reason
    if n > WIDEST_ROW:
        return False, f"rows of {n} are over {WIDEST_ROW}"
    if head_dim and head_dim & (head_dim - 1):
        return False, f"head_dim {head_dim} is no power of two"
    return True, ""


def project(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    head_dim: int = 0,
) -> Tensor:
    """reference.project; without scale and rotation a plain matrix product (cuBLAS)."""
    if rstd is None and cos is None:
        return x @ weight.t()
    turned = head_dim if cos is not None else 0
    config, _ = usable("project", x.device, x.dtype, weight.size(0), x.size(1), turned)
    if not isinstance(config, configs.Config):
        return reference.project(x, weight, rstd, cos, sin, head_dim)
    from kernels.triton import launch

    x = x if x.stride(1) == 1 else x.contiguous()
    return launch.project(
        x, weight.contiguous(), rstd, _packed(cos), _packed(sin), head_dim, config
    )


def norm_backward_matmul(
    dhs: Tensor, a: Tensor, x: Tensor, coefficient: Tensor, d_residual: Tensor | None
) -> Tensor:
    """reference.norm_backward_matmul."""
    config, _ = usable("norm_backward_matmul", x.device, x.dtype, a.size(1), a.size(0))
    if not isinstance(config, configs.Config):
        return reference.norm_backward_matmul(dhs, a, x, coefficient, d_residual)
    from kernels.triton import launch

    return launch.norm_backward_matmul(
        dhs.contiguous(), a.contiguous(), x.contiguous(), coefficient, _packed(d_residual), config
    )


def row_rstd(x: Tensor, eps: float) -> Tensor:
    """reference.row_rstd."""
    if not usable("row_rstd", x.device, x.dtype, x.size(1))[0]:
        return reference.row_rstd(x, eps)
    from kernels.triton import launch

    return launch.row_rstd(x.contiguous(), eps)


def scale_and_dot(dh: Tensor, h: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """reference.scale_and_dot."""
    if not usable("scale_and_dot", dh.device, dh.dtype, dh.size(1))[0]:
        return reference.scale_and_dot(dh, h, rstd)
    from kernels.triton import launch

    return launch.scale_and_dot(dh.contiguous(), h.contiguous(), rstd)


def norm_backward(g: Tensor, x: Tensor, rstd: Tensor, d_residual: Tensor | None) -> Tensor:
    """reference.norm_backward."""
    if not usable("norm_backward", x.device, x.dtype, x.size(1))[0]:
        return reference.norm_backward(g, x, rstd, d_residual)
    from kernels.triton import launch

    return launch.norm_backward(g.contiguous(), x.contiguous(), rstd, _packed(d_residual))


def unrotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    rstd: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """reference.unrotate, into `out` where given."""
    if not usable("unrotate", x.device, x.dtype, head_dim, head_dim=head_dim)[0]:
        y = reference.unrotate(x, cos, sin, head_dim, rstd)
        return y if out is None else out.copy_(y)
    from kernels.triton import launch

    return launch.unrotate(x.contiguous(), cos.contiguous(), sin.contiguous(), head_dim, rstd, out)


def _packed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
