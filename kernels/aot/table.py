"""The page docs/kernels.md, and the same results as JSON."""

import dataclasses
import difflib
from typing import Any

from kernels.aot.compile import Results, versions
from kernels.aot.occupancy import programs
from kernels.aot.readings import Readings
from kernels.aot.rules import RULES, compiles, violations
from kernels.aot.variants import Variant

PAGE = """\
# Compiled kernels

What the compiler makes of every kernel launch that the project ships, for each model size and
architecture. These are readings of compiled code, not measurements: no GPU is needed, and nothing
here is a time. [execution.md](execution.md) describes the kernels. This page was written by

```bash
python -m kernels.aot --table docs/kernels.md
```

with triton {triton}, ptxas {ptxas} for sm_80 and sm_90, and ptxas {ptxas_blackwell} for sm_100.
With `--check` in place of `--table` the command compares this page with what it compiles. Its exit
code is 1 where the page differs or a rule is broken. The rules refuse:

{rules}

The columns:

- **arch**: the GPU's architecture: sm_80 is A100, sm_90 is H100 and H200, sm_100 is B200.
- **operation**: the kernel and its form; "+ residual" adds the gradient of the residual
  connection, "one kv head" is the narrowest projection to keys or values.
- **size**, **dtype**: the model whose shapes these are, and the type of the operands; "rows of" a
  number are the widest rows that the kernels over rows take.
- **tile**: what one program computes at a time, rows × columns, in a matrix product also × the step
  along the inner dimension; then the warps of a program and the stages of its software pipeline.
- **registers**: those of a thread.
- **shared KB**: shared memory of a program, in units of 1024 bytes.
- **programs/SM**: how many programs fit a multiprocessor at once, from registers, shared memory,
  warps and tensor memory.
- **tensor-core**: tensor-core instructions in the machine code. Products of float32 use none.
- **depth**: buffers in shared memory behind each operand of a dot; "-": the kernel has no dot.

| arch | operation | size | dtype | tile | registers | shared KB | programs/SM | tensor-core \
| depth |
|---|---|---|---|---|--:|--:|--:|--:|--:|
"""


def page(results: Results) -> str:
    """The whole page: what it is, and a row for each variant."""
    refused = "\n".join(
        f"- `{rule.__name__}`: {' '.join(str(rule.__doc__).partition('.')[0].split())}"
        for rule in (compiles, *RULES)
    )
    rows = "".join(f"| {' | '.join(_cells(*result))} |\n" for result in results)
    return PAGE.format(rules=refused, **versions()) + rows


def _cells(variant: Variant, read: Readings) -> list[str]:
    head = [f"sm_{variant.architecture}", variant.operation, variant.size, variant.dtype]
    if variant.launch is None or read.error:
        return [*head, variant.launch.shape if variant.launch else "-", *["-"] * 5]
    depth = ", ".join(str(a) if a == b else f"{a}/{b}" for a, b in read.depths) or "-"
    return [
        *head,
        variant.launch.shape,
        str(read.registers),
        f"{read.shared / 1024:.1f}",
        str(programs(variant, read)),
        str(read.tensor_core),
        depth,
    ]


def to_json(results: Results) -> dict[str, Any]:
    """Versions, and of each variant its launch, its readings and what it violates."""
    return {
        "versions": versions(),
        "variants": [
            dataclasses.asdict(variant)
            | dataclasses.asdict(read)
            | {"programs": programs(variant, read), "violations": violations(variant, read)}
            for variant, read in results
        ],
    }


def difference(written: str, fresh: str) -> list[str]:
    """The lines in which the page in the tree (-) and a fresh one (+) differ."""
    lines = difflib.unified_diff(written.splitlines(), fresh.splitlines(), lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]
