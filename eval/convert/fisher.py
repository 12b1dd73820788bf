"""The empirical Fisher information of a model's projections, by input."""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from data.errors import InputError
from data.shards import TokenStream
from eval.convert.source import Dense
from model import Transformer


def fisher_of_inputs(
    model: Transformer, windows: Iterator[Tensor], count: int, device: torch.device
) -> dict[str, Tensor]:
    """For each projection of a block the information of its inputs (d_in,), float64 on the CPU, by
    the name of its weight W (d_out, d_in).

    Of one weight it is the mean over the windows of (∂L/∂W_ij)², L the mean cross-entropy of a
    window in nats (Hsu et al. 2022, section 3: one text, one gradient); of input j it is their sum
    over the outputs i, the row sum of the paper's (d_in, d_out) matrix.
    """
    weights = {
        f"layers.{number}.{path}.weight": block.get_submodule(path).get_parameter("weight")
        for number, block in enumerate(model.layers)
        for path in projections(model)
    }
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    sums = {
        name: torch.zeros(weight.size(1), dtype=torch.float64, device=device)
        for name, weight in weights.items()
    }
    for tokens in tqdm(windows, total=count, unit="window", disable=None, leave=False):
        ids = tokens.to(device)[None]  # (1, seq_len + 1)
        loss = model(ids[:, :-1], ids[:, 1:])
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient.square().sum(dim=0, dtype=torch.float64)
    model.requires_grad_(True)
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise InputError(f"{name}: a gradient of the calibration text is not finite")
    return {name: (total / count).cpu() for name, total in sums.items()}


def projections(model: Transformer) -> list[str]:
    """Paths of the projections in a block."""
    attention = [f"attention.{name}" for name in model.config.attention_projections()]
    return attention + [f"feed_forward.{name}" for name in model.config.feed_forward_projections()]


def calibration_windows(
    stream: TokenStream, dense: Dense, tokens: int
) -> tuple[Iterator[Tensor], int]:
    """Windows of seq_len + 1 ids from the start of a stream, one behind the other, and how many:
    those that `tokens` pays for, at least one. InputError where the stream has none.
    """
    length = dense.seq_len
    there = (len(stream) - 1) // length
    if there < 1:
        raise InputError(
            f"--calibration_split: it has {len(stream)} tokens, a window needs {length + 1}; use "
            "more text or a smaller --seq_len"
        )
    count = min(there, max(1, tokens // length))
    starts = range(0, count * length, length)
    return (torch.from_numpy(stream.read(start, length + 1)) for start in starts), count
