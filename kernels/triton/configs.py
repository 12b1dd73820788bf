"""The static table of launch configurations: what is in it is tested, what is not runs elsewhere.

Nothing is tuned at run time: compilers for Hopper have produced wrong code for single
configurations, so a configuration that no test has seen must not be reached. A shape without an
entry takes the reference path.
"""

from dataclasses import dataclass

ARCHITECTURES = (80, 90, 100)  # A100; H100 and H200; B200: those that kernels.aot compiles for
SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may use
INTERPRETER = 0  # the "architecture" of TRITON_INTERPRET=1


@dataclass(frozen=True)
class Config:
    """How a matrix product is cut into tiles.

    Attributes:
        block_m: Rows of a tile.
        block_n: Columns of a tile.
        block_k: Inner dimension of one step of the main loop.
        num_warps: Warps of a program.
        num_stages: Buffers of the software pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Size:
    """A model size that has kernels: hidden size d, rank r (0: dense), width of a head."""

    d: int
    r: int
    head_dim: int


# d, r, head_dim of configs/lpa_{130m,370m,3b}.yaml
SIZES = {"130m": Size(768, 128, 64), "370m": Size(1024, 256, 64), "3b": Size(3072, 512, 128)}
HEAD_DIMS = (64, 128)
KERNELS = ("project", "norm_backward_matmul")

# On sm_90, by kernels.aot: _TILE takes 98 registers with a scale and 114 with a rotation (head_dim
# 64), so two programs share a multiprocessor; _WIDE asks less of the L2 cache per operation but
# spills where the epilogue loads a second tile, and on sm_80 it leaves no register free.
_TILE = Config(128, 128, 64, num_warps=8, num_stages=3)
_WIDE = Config(128, 256, 64, num_warps=8, num_stages=3)
_NARROW = Config(128, 64, 64, num_warps=8, num_stages=3)  # few key and value heads
# float32 is multiplied exactly (no TF32), without tensor cores: for checks, not for speed.
_EXACT = Config(64, 64, 32, num_warps=8, num_stages=2)
_EXACT_WIDE_HEADS = Config(32, 128, 32, num_warps=8, num_stages=2)


def untested(d: int, ranks: tuple[int | None, int | None, int | None], head_dim: int) -> str:
    """Why a layer with these ranks of q, k and v is no size of the table; empty where it is one."""
    for size in SIZES.values():
        dense = ranks == (None, None, None)
        if (size.d, size.head_dim) == (d, head_dim) and (dense or ranks == (size.r,) * 3):
            return ""
    known = "; ".join(f"{s.d}, {s.r}, {s.head_dim}" for s in SIZES.values())
    named = "/".join("dense" if r is None else str(r) for r in dict.fromkeys(ranks))
    return (
        f"hidden size {d} with rank {named} and heads of {head_dim} has no tested configuration; "
        f"tested are {known}"
    )


def inner_dimensions(kernel: str) -> set[int]:
    """The inner dimensions that a kernel has at the sizes of the table."""
    if kernel == "norm_backward_matmul":  # dx = dhs a: the latents of q, k and v
        return {3 * size.r for size in SIZES.values()}
    return {size.d for size in SIZES.values()} | {size.r for size in SIZES.values()}


def find(
    kernel: str, architecture: int, n: int, k: int, head_dim: int, exact: bool
) -> tuple[Config | None, str]:
    """The configuration of a matrix product, or None and why there is none.

    kernel: "project" or "norm_backward_matmul"; n output columns; k inner dimension; head_dim 0:
    without rotation; exact: float32 operands, multiplied in float32.
    """
    if architecture == INTERPRETER:
        config = Config(32, max(32, head_dim), 16, num_warps=4, num_stages=2)
    elif architecture not in ARCHITECTURES:
        return None, f"sm_{architecture} has no tested configuration"
    elif head_dim and head_dim not in HEAD_DIMS:
        return None, f"head_dim {head_dim} has no configuration; 64 and 128 have"
    elif k not in inner_dimensions(kernel):
        known = ", ".join(map(str, sorted(inner_dimensions(kernel))))
        return None, f"inner dimension {k} has no tested configuration; {known} have"
    elif exact:
        config = _EXACT_WIDE_HEADS if head_dim == 128 else _EXACT
    elif kernel == "project" and not head_dim and n % _WIDE.block_n == 0 and architecture >= 90:
        config = _WIDE
    else:
        config = _TILE if n % _TILE.block_n == 0 or head_dim == 128 else _NARROW
        if kernel == "norm_backward_matmul" and architecture == 80:
            config = _NARROW  # _TILE's epilogue takes 255 registers there, and spills
    if n % config.block_n or k % config.block_k:
        return None, f"{n} columns are no multiple of {config.block_n}" + (
            f", or inner dimension {k} none of {config.block_k}" if k % config.block_k else ""
        )
    return config, ""
