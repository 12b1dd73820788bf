"""From the seconds of the rounds to rates, ratios, and the share of the saved FLOPs."""

from collections.abc import Sequence

from eval.throughput.workload import Round
from model.cache import CacheForm, added_flops
from model.config import ModelConfig
from training.bench.measure import Row, measurement, ratio

PHASES = ("forward", "backward", "optimizer")
# From its least to its largest value a sample of n holds the median with a probability of
# 1 - 2^(1 - n): 93.75 % of 5, 96.9 % of 6. A bootstrap median never leaves the sample.
LEAST_ROUNDS = 6


def flops_per_token(
    model: ModelConfig, mode: str, seq_len: int, steps: int, form: CacheForm = "full"
) -> float:
    """FLOPs of a token in the work that is timed, by ModelConfig.flops_per_token: of the factors,
    three times the forward pass in training.

    decode: of the `steps` tokens that follow `seq_len`. Token i of them, from 1, sees seq_len + i
    keys, on average seq_len + (steps + 1) / 2, as a query of a prompt of 2 · seq_len + steps does;
    and what the form of the cache adds to that.
    """
    if mode == "decode":
        more = added_flops(model, form, seq_len + (steps + 1) / 2)
        return model.flops_per_token(2 * seq_len + steps) + more
    return (3 if mode == "train" else 1) * model.flops_per_token(seq_len)


def side_row(
    name: str,
    rounds: Sequence[Round],
    tokens_per_step: int,
    flops: float,
    peak_flops: float | None,
) -> Row:
    """One side's numbers, each with the seconds that it comes from.

    tokens_per_step: over all ranks. flops: of a token. peak_flops: FLOP/s of all devices together;
    None where they are unknown, and then `mfu` is too.
    """
    found = measurement("", name, [one["seconds_per_step"] for one in rounds])
    row: Row = {
        "name": name,
        "tokens_per_second": tokens_per_step / found["seconds_median"],
        "tokens_per_second_p10": tokens_per_step / found["seconds_p90"],
        "tokens_per_second_p90": tokens_per_step / found["seconds_p10"],
        **_quantiles("seconds_per_step", found),
        "tokens_per_step": tokens_per_step,
        "flops_per_token": flops,
    }
    for phase in PHASES:
        if f"{phase}_seconds" in rounds[0]:
            values = [one[f"{phase}_seconds"] for one in rounds]
            row |= _quantiles(f"{phase}_seconds", measurement("", name, values))
    done = flops * row["tokens_per_second"]
    row["flops_per_second"] = done
    row["mfu"] = done / peak_flops if peak_flops else None
    row["rounds"] = list(rounds)
    return row


def _quantiles(key: str, found: Row) -> Row:
    return {f"{key}_{name}": found[f"seconds_{name}"] for name in ("median", "p10", "p90")}


def compare(config: Row, baseline: Row) -> Row:
    """The first side against the second, both rows of side_row with equally many rounds.

    Ratios are those of the medians of the seconds a token, each with its bootstrap interval over
    rounds (training.bench.measure.ratio). With f the FLOPs of a token and t its time, of the first
    side over the second: saved_flops_share is 1 - f, the limit of what saving FLOPs can save;
    saved_time_share 1 - t; share_reached (1 - t) / (1 - f), None where no FLOPs are saved.
    too_few_rounds_for_95_percent: the intervals hold less than they are meant to, see LEAST_ROUNDS.
    """
    own, other = (
        [one["seconds_per_step"] / side["tokens_per_step"] for one in side["rounds"]]
        for side in (config, baseline)
    )
    limit = 1 - config["flops_per_token"] / baseline["flops_per_token"]
    case = f"{config['name']} against {baseline['name']}"
    return {
        "too_few_rounds_for_95_percent": len(own) < LEAST_ROUNDS,
        "time_ratio": ratio(case, "time a token, ratio", own, other),
        "tokens_per_second_ratio": ratio(case, "tokens/s, ratio", other, own),
        "saved_flops_share": limit,
        "saved_time_share": ratio(case, "share of the time saved", own, other, of=lambda t: 1 - t),
        "share_reached": None
        if limit <= 0
        else ratio(
            case,
            "share of the saved FLOPs that is saved time",
            own,
            other,
            of=lambda t: (1 - t) / limit,
        ),
    }
