"""Times the operations of the attention layer: `python -m kernels.bench`."""

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from itertools import product
from typing import Any

from kernels.bench import report, table
from kernels.bench.case import Settings, measure_case
from kernels.bench.operations import BENCH_SIZES, OPERATIONS, Problem
from kernels.bench.options import UsageError, parse


def run(options: Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Measures the cases one by one; prints and saves each."""
    begun = time.monotonic()
    device, dtype = options.device, options.dtype
    settings = Settings(
        device, dtype, options.repeats, options.seconds_per_case, options.cuda_graphs
    )
    result: dict[str, Any] = {
        "environment": report.environment(device, argv),
        "settings": {
            "cuda_graphs": options.cuda_graphs,
            "repeats": options.repeats,
            "seconds_per_case": options.seconds_per_case if options.repeats is None else None,
            "minutes": options.minutes,
        },
        "cases": [],
        "not_run": [],
        "verdict": [],
    }
    peak = report.peaks(result["environment"]["device"])
    for rows, size, op in product(options.rows, options.sizes, options.ops):
        if time.monotonic() - begun > 60 * options.minutes:
            result["not_run"].append({"op": op, "size": size, "rows": rows})
            continue
        shape = BENCH_SIZES[size]
        batch = rows // options.seq_len
        problem = Problem(size, shape.d, shape.r, shape.head_dim, batch, options.seq_len)
        measured, sets = measure_case(OPERATIONS[op], problem, options.providers, settings)
        case = report.case_report(op, OPERATIONS[op], problem, dtype, measured, sets, peak)
        result["cases"].append(case)
        if device.type == "cuda":
            result["verdict"] = report.verdict(result["cases"])
        save(result, options)
        print(table.case_table(case), end="\n\n", flush=True)
    result["seconds"] = time.monotonic() - begun
    save(result, options)
    return result


def save(result: dict[str, Any], options: Namespace) -> None:
    if options.output is not None:
        report.write(options.output, report.as_json(result))
    if options.csv is not None:
        report.write(options.csv, report.as_csv(result["cases"]))


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = parse(argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    drawing = options.plot is not None and table.has_matplotlib()
    if options.plot is not None and not drawing:
        print("warning: --plot: matplotlib is not installed; nothing is drawn", file=sys.stderr)
    try:
        result = run(options, argv)
        if drawing and result["cases"]:
            report.write(options.plot, table.plot(result["cases"], options.plot.suffix[1:]))
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the cases that are printed are saved", file=sys.stderr)
        return 130
    print(table.LEGEND)
    if result["not_run"]:
        print(f"not run, after {options.minutes:g} minutes: {len(result['not_run'])} cases")
    print(table.verdict_text(result["verdict"], options.device.type == "cuda"))
    statuses = {row["status"] for case in result["cases"] for row in case["results"]}
    return 1 if statuses & {"wrong", "error"} else 0


if __name__ == "__main__":
    sys.exit(main())
