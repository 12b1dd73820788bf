"""--dry-run: builds the model without memory and says what the run would cost."""

from typing import Any

import torch

from model import Transformer
from training import init_from, memory
from training.config import RunConfig
from training.teacher import find_teacher


def dry_run(run: RunConfig) -> dict[str, Any]:
    """Parameters, FLOPs, memory per rank, steps and tokens of a run; needs no GPU and no data.

    What the run is given (training.init_from, a teacher) must be there, and is named.
    """
    given = _given(run)
    with torch.device("meta"):
        model = Transformer(run.model)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == run.model.num_parameters(), "the count disagrees with the model"
    training = run.training
    tokens = training.max_steps * training.global_batch_size * training.seq_len
    flops = run.model.flops_per_token(training.seq_len)
    budgets = {
        str(stage): {
            str(ranks): memory.bytes_per_rank(
                run, stage, ranks, given["teacher"].config if "teacher" in given else None
            )
            for ranks in memory.WORLD_SIZES
        }
        for stage in memory.STAGES
    }
    return {
        "parameters": parameters,
        "parameters_non_embedding": run.model.num_parameters(embeddings=False),
        "flops_per_token_forward": flops,
        "flops_training": 3 * flops * tokens,
        "steps": training.max_steps,
        "tokens": tokens,
        "memory_bytes_per_rank": {
            stage: {ranks: sum(parts.values()) for ranks, parts in by_ranks.items()}
            for stage, by_ranks in budgets.items()
        },
        "memory_parts_bytes_per_rank": budgets,
        **{name: weights.record() for name, weights in given.items()},
    }


def _given(run: RunConfig) -> dict[str, init_from.GivenWeights]:
    """The weights that a run begins from, and those of its teacher, where it has them; their sums
    are not compared.
    """
    found = {}
    if run.training.init_from is not None:
        found["init_from"] = init_from.beginning(run.training.init_from, run.model, verify=False)
    teacher = find_teacher(run, verify=False)
    return found | ({"teacher": teacher} if teacher is not None else {})


def describe(run: RunConfig, result: dict[str, Any]) -> str:
    """The result as lines for a person."""
    stage = run.deepspeed.zero_stage
    lines = [
        f"parameters            {result['parameters']:>20,}",
        f"  without embeddings  {result['parameters_non_embedding']:>20,}",
        f"FLOPs/token, forward  {result['flops_per_token_forward']:>20,.0f}",
        f"FLOPs, whole training {result['flops_training']:>20.3e}",
        f"steps                 {result['steps']:>20,}",
        f"tokens                {result['tokens']:>20,}",
        f"GiB per rank ({run.training.precision}); this run has ZeRO stage {stage}",
        "  ZeRO stage" + "".join(f"{w:>6} GPU{'s' if w > 1 else ' '}" for w in memory.WORLD_SIZES),
    ]
    for name, by_ranks in result["memory_bytes_per_rank"].items():
        mark = "*" if name == str(stage) else " "
        lines.append(
            f"  {name:>9}{mark}" + "".join(f"{b / 2**30:>11.2f}" for b in by_ranks.values())
        )
    for name, label in (("init_from", "begins from"), ("teacher", "teacher")):
        if name in result:
            lines.append(f"{label:<21} {result[name]['folder']}")
    lines += [f"warning: {warning}" for warning in run.warnings()]
    return "\n".join(lines)
