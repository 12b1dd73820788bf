"""The command: python -m eval.convert --from_llama FOLDER --rank 64 --output DIR

docs/conversion.md describes it.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from data.command_line import parse_options
from data.errors import InputError, require_folder_of, run_cli
from data.shards import PreparedData
from data.writing import require_new
from eval.convert.build import Scales, convert, new_config, ranks_of, warnings
from eval.convert.factorise import scales
from eval.convert.fisher import calibration_windows, fisher_of_inputs
from eval.convert.options import ConvertConfig
from eval.convert.report import describe, summarise
from eval.convert.scores import build_model, open_data, score_model
from eval.convert.source import Dense, open_source
from eval.convert.write import write
from training import distributed


def column_scales(
    options: ConvertConfig, dense: Dense, data: PreparedData | None, device: torch.device
) -> tuple[Scales, int]:
    """The weights of the columns of each projection, and on how many tokens they rest; none for
    plain SVD.
    """
    if options.method == "svd" or data is None:
        return {}, 0
    stream = data.split(options.calibration_split)
    windows, count = calibration_windows(stream, dense, options.calibration_tokens)
    model = build_model(dense.config, dense.weights, device)
    fisher = fisher_of_inputs(model, windows, count, device)
    found = {name: scales(one) for name, one in fisher.items()}
    return {name: one for name, one in found.items() if one is not None}, count * dense.seq_len


def run(options: ConvertConfig) -> dict[str, Any]:
    """Converts, writes the checkpoint and returns the report."""
    if distributed.world_size() > 1:
        raise InputError("eval.convert runs in one process: start it with python, no launcher")
    require_new(Path(options.output))
    require_folder_of(options.report, "--report")
    dense = open_source(options)
    option = "--rank" if options.parameter_budget is None else "--parameter_budget"
    new_config(dense, options.rank, option)  # refused before the work
    data = open_data(options, dense)
    device = distributed.evaluation_device(options.device)
    columns, calibrated = column_scales(options, dense, data, device)
    config = new_config(dense, ranks_of(options, dense, columns, device), option)
    for warning in warnings(config, option):
        print(f"warning: {warning}", file=sys.stderr)
    converted = convert(dense, config, columns, device)
    how = {"method": options.method, "calibration_tokens": calibrated}
    result: dict[str, Any] = {
        **how,
        "source": options.source,
        "output": options.output,
        "ranks": dataclasses.asdict(config.ranks),
        "parameter_budget": options.parameter_budget,
        "seq_len": dense.seq_len,
        **summarise(dense, converted),
        "projections": converted.projections,
        "scores": None,
    }
    if data is not None:
        found: dict[str, Any] = {"data": options.data, "split": options.split}
        for when, one in (("before", dense), ("after", converted)):
            model = build_model(one.config, one.weights, device)
            found[when] = score_model(model, data, options, dense)
        result["scores"] = found
    write(Path(options.output), dense, converted, how)
    return result


def main() -> int:
    """The command."""
    options, _ = parse_options(
        ConvertConfig,
        prog="python -m eval.convert",
        description="Converts a dense Llama-like checkpoint into an LPA model.",
    )
    result = run(options)
    print(describe(result))
    if options.report:
        Path(options.report).write_text(json.dumps(result, indent=2) + "\n")
    print(f"{options.output}: written")
    return 0


if __name__ == "__main__":
    run_cli(main)
