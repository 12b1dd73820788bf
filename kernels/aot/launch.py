"""A kernel launch as the compiler sees it, taken from launch code that runs on no device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


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
