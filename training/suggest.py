"""Suggests a peak learning rate and a batch size for a run's configuration, from the Step Law.

    python -m training.suggest --config lpa_370m.yaml --output out.json

The law (Li et al. 2025, "Predictable Scale: Part I, Step Law", arXiv 2503.04715):

    peak learning rate = 1.79 · N^-0.713 · D^0.307
    batch in tokens    = 0.58 · D^0.571

N counts the entries of the blocks' attention and feed-forward matrices, no embeddings, output head,
norms or biases: that is how the N in the authors' table of runs follows from their shapes. A
low-rank projection counts with its factors A and B. D is the tokens that training reads, repeated
ones included: max_steps · global_batch_size · seq_len.

The law was fitted on 1,911 runs of dense SwiGLU models at 17 pairs of N and D. The ranges below are
read off that table (github.com/step-law/steplaw, commit 32a8f4c, data/dense_lr_bs_loss.csv).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

from data.command_line import parse_options
from data.errors import require_folder_of, run_cli
from model import ModelConfig
from training.config import CONFIG_FOLDER, RunConfig


class Range(NamedTuple):
    """The smallest and largest value of a quantity among the fitted runs, both included."""

    low: float
    high: float


PARAMETERS = Range(214_663_680, 1_073_741_824)
TOKENS = Range(4_000_000_000, 100_000_000_000)
TOKENS_PER_PARAMETER = Range(10e9 / 536_872_960, 100e9 / 214_663_680)
LEARNING_RATE = Range(2.441e-4, 2.21e-2)
BATCH_TOKENS = Range(16 * 2048, 2048 * 2048)
SEQ_LEN = Range(2048, 2048)
MIN_LEARNING_RATE = Range(1e-5, 1e-5)

# A batch is a multiple of micro_batch_size times one of these, so that it divides over as many
# ranks; the first whose rounding moves the batch by at most this share of it is taken.
RANKS = (8, 4, 2, 1)
ROUNDING = 0.1


def counted_parameters(model: ModelConfig) -> int:
    """N of the law."""
    return model.num_layers * sum(p.matmul_parameters() for p in model.block_projections().values())


def peak_learning_rate(parameters: float, tokens: float) -> float:
    """1.79 · N^-0.713 · D^0.307."""
    return float(1.79 * parameters**-0.713 * tokens**0.307)


def batch_tokens(tokens: float) -> float:
    """0.58 · D^0.571, in tokens."""
    return float(0.58 * tokens**0.571)


def round_batch(sequences: float, micro_batch_size: int) -> tuple[int, int]:
    """The batch rounded to the nearest multiple, at least one, and what it is a multiple of."""
    for ranks in RANKS:
        multiple = micro_batch_size * ranks
        rounded = max(1, round(sequences / multiple)) * multiple
        if abs(rounded - sequences) <= ROUNDING * sequences:
            break
    return rounded, multiple


def suggest(run: RunConfig) -> dict[str, Any]:
    """What the law says of a run, and what the run has."""
    training = run.training
    sequence, batch = training.seq_len, training.global_batch_size
    parameters, tokens = counted_parameters(run.model), training.max_steps * batch * sequence
    rate, law_batch = peak_learning_rate(parameters, tokens), batch_tokens(tokens)
    rounded, multiple = round_batch(law_batch / sequence, training.micro_batch_size or 1)
    result: dict[str, Any] = {
        "n_parameters": parameters,
        "d_tokens": tokens,
        "d_over_n_tokens_per_parameter": tokens / parameters,
        "suggested_peak_learning_rate": rate,
        "suggested_batch_tokens": law_batch,
        "suggested_batch_sequences": law_batch / sequence,
        "rounded_batch_sequences": rounded,
        "rounded_batch_multiple_of_sequences": multiple,
        "rounded_batch_tokens": rounded * sequence,
        "rounded_batch_steps_to_d": max(1, round(tokens / (rounded * sequence))),
        "configured_peak_learning_rate": training.learning_rate,
        "configured_batch_tokens": batch * sequence,
        "configured_batch_sequences": batch,
        "configured_steps": training.max_steps,
        "suggested_over_configured_learning_rate": rate / training.learning_rate,
        "suggested_over_configured_batch": law_batch / (batch * sequence),
    }
    return result | {"warnings": warnings(run, result)}


def warnings(run: RunConfig, result: dict[str, Any]) -> list[str]:
    """In what a run, or the suggestion for it, is unlike the runs that the law was fitted on."""
    quantities: dict[str, tuple[float, Range]] = {
        "N, parameters": (result["n_parameters"], PARAMETERS),
        "D, tokens": (result["d_tokens"], TOKENS),
        "D/N, tokens per parameter": (
            result["d_over_n_tokens_per_parameter"],
            TOKENS_PER_PARAMETER,
        ),
        "suggested peak learning rate": (result["suggested_peak_learning_rate"], LEARNING_RATE),
        "suggested batch, tokens": (result["suggested_batch_tokens"], BATCH_TOKENS),
        "training.seq_len": (run.training.seq_len, SEQ_LEN),
        "training.min_learning_rate": (run.training.min_learning_rate, MIN_LEARNING_RATE),
    }
    found = []
    for name, (value, (low, high)) in quantities.items():
        if not low <= value <= high:
            fitted = _number(low) if low == high else f"{_number(low)} to {_number(high)}"
            found.append(f"{name}: {_number(value)}; the fitted runs had {fitted}")
    if any(p.rank is not None for p in run.model.block_projections().values()):
        found.append(
            "the law was fitted on dense models: for low-rank ones (LPA) it is an extrapolation"
        )
    if run.model.family != "llama":
        found.append(f"model.family: {run.model.family}; the fitted runs had SwiGLU blocks")
    return found


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def describe(run: RunConfig, result: dict[str, Any]) -> str:
    """The result as lines for a person."""
    r, micro = result, run.training.micro_batch_size
    multiple, law = r["rounded_batch_multiple_of_sequences"], r["suggested_batch_sequences"]
    ranks = multiple // (micro or 1)
    change = r["rounded_batch_sequences"] / law - 1
    rounding = f"the nearest multiple of {multiple}, for {ranks} rank{'s' if ranks > 1 else ''}"
    rounding += f" of micro_batch_size {micro}" if micro else ""
    lines = [
        f"N, parameters        {r['n_parameters']:>18,}"
        "  (attention and feed-forward matrices, low-rank ones as A and B)",
        f"D, tokens            {r['d_tokens']:>18,}"
        f"  ({r['d_over_n_tokens_per_parameter']:.1f} per parameter)",
        f"{'':20} {'suggested':>18} {'configured':>18} {'ratio':>8}",
        f"peak learning rate   {r['suggested_peak_learning_rate']:>18.3e}"
        f" {r['configured_peak_learning_rate']:>18.3e}"
        f" {r['suggested_over_configured_learning_rate']:>8.3g}",
        f"batch, tokens        {r['suggested_batch_tokens']:>18,.0f}"
        f" {r['configured_batch_tokens']:>18,} {r['suggested_over_configured_batch']:>8.3g}",
        f"batch, sequences     {law:>18,.1f} {r['configured_batch_sequences']:>18,}",
        f"  rounded            {r['rounded_batch_sequences']:>18,}  ({rounding}: {change:+.1%})",
        f"  steps to D with it {r['rounded_batch_steps_to_d']:>18,} {r['configured_steps']:>18,}",
    ]
    return "\n".join(lines + [f"warning: {warning}" for warning in r["warnings"]])


def main() -> int:
    """The command."""

    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("--output", help="a JSON file for the result")

    run, options = parse_options(
        RunConfig,
        prog="python -m training.suggest",
        description="Suggests a peak learning rate and a batch size for a run, from the Step Law.",
        config_folder=CONFIG_FOLDER,
        add_options=add_options,
    )
    require_folder_of(options.output)
    result = suggest(run)
    print(describe(run, result))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
