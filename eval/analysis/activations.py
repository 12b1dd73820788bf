"""Second moments of what flows through a model on a text, in one pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.errors import InputError
from eval.analysis.spectrum import Spectrum
from model import ModelConfig, Transformer
from model.shape import Shape

MICRO_BATCH = 8  # windows in one forward pass


class Site(NamedTuple):
    """A place in a block: what enters or leaves one of its modules ("": the block)."""

    label: str
    module: str
    outgoing: bool


SITES = {
    "attention_input": Site("attention input", "attention.q_proj", False),
    "q": Site("q", "attention.q_proj", True),
    "k": Site("k", "attention.k_proj", True),
    "v": Site("v", "attention.v_proj", True),
    "heads": Site("heads, before o_proj", "attention.o_proj", False),
    "attention_output": Site("attention output", "attention.o_proj", True),
    "ffn_input": Site("FFN input", "feed_forward.up_proj", False),
    "ffn_hidden": Site("FFN hidden", "feed_forward.down_proj", False),
    "ffn_output": Site("FFN output", "feed_forward.down_proj", True),
    "residual": Site("residual stream", "", True),
}


class Moments:
    """First and second moments of vectors (d,), in float64, of batches that come one by one.

    Batches are merged as by Chan, Golub & LeVeque (1983): what is summed are squares around the
    mean, so a mean far from zero costs no digits.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Takes in x (..., d)."""
        rows = x.detach().flatten(0, -2).double()  # (N, d)
        count = self.count + len(rows)
        mean = rows.mean(dim=0)
        apart = mean - self.mean
        rows = rows - mean
        self.scatter += rows.T @ rows
        self.scatter += torch.outer(apart, apart) * (self.count * (count - self.count) / count)
        self.mean += apart * ((count - self.count) / count)
        self.count = count

    def centred(self) -> Tensor:
        """The covariance Σ (x - mean)(x - mean)ᵀ / N, (d, d)."""
        return self.scatter / self.count

    def uncentred(self) -> Tensor:
        """Σ x xᵀ / N, (d, d)."""
        return self.centred() + torch.outer(self.mean, self.mean)


def _moves(shape: Shape) -> bool:
    """Whether a bias is added to the output: that of a dense W is, wherever a product has it."""
    return shape.bias == "output" or (shape.bias == "latent" and shape.rank is None)


def bounds(config: ModelConfig, centred: bool) -> dict[str, int]:
    """The largest rank that the second moment of each site can have, centred (the covariance) or
    not.

    The output of a product B·A stays within the columns of B, whatever stands between the factors.
    A head's output is a weighted mean of its values, in at most min(head_dim, rank of v)
    dimensions; each head has its own weights, so these add up over the heads. A linear o_proj
    cannot have more than its input. A bias on the output of W or B moves all by one vector, which
    is one dimension more unless it is centred away.
    """
    assert config.head_dim is not None
    shapes, d = config.block_projections(), config.hidden_size
    most = {
        name: min(shape.rank or shape.d_in, shape.d_in, shape.d_out)
        for name, shape in shapes.items()
    }
    moved = {name: not centred and _moves(shape) for name, shape in shapes.items()}
    heads, o = config.num_heads * min(config.head_dim, most["v_proj"]), shapes["o_proj"]
    curved = o.rank is not None and o.latent_silu
    output = most["o_proj"] if curved else min(most["o_proj"], heads)
    width = config.num_heads * config.head_dim
    return {
        "attention_input": d,
        **{
            n: min(most[f"{n}_proj"] + moved[f"{n}_proj"], shapes[f"{n}_proj"].d_out) for n in "qkv"
        },
        "heads": min(heads + moved["v_proj"], width),
        "attention_output": min(output + (moved["v_proj"] or moved["o_proj"]), d),
        "ffn_input": d,
        "ffn_hidden": config.intermediate_size,
        "ffn_output": min(most["down_proj"] + moved["down_proj"], d),
        "residual": d,
    }


@contextmanager
def watch(model: Transformer) -> Iterator[list[dict[str, Moments]]]:
    """Moments of every site of each layer, of all forward passes inside the `with`."""
    found: list[dict[str, Moments]] = []
    handles: list[RemovableHandle] = []
    try:
        for block in model.layers:
            moments: dict[str, Moments] = {}
            found.append(moments)
            for name, site in SITES.items():
                handles.append(_hook(block.get_submodule(site.module), site, name, moments))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, site: Site, name: str, moments: dict[str, Moments]) -> RemovableHandle:
    def take(x: Tensor) -> None:
        if name not in moments:
            moments[name] = Moments(x.size(-1), x.device)
        moments[name].add(x)

    def after(_: nn.Module, __: Any, output: Tensor) -> None:
        take(output)

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        take(inputs[0])

    if site.outgoing:
        return module.register_forward_hook(after)
    return module.register_forward_pre_hook(before)


@torch.no_grad()
def activation_moments(
    model: Transformer, tokens: Tensor, seq_len: int
) -> list[dict[str, Moments]]:
    """Moments of every site of each layer over tokens (N,), in windows of seq_len one after the
    other, the last one shorter. A model whose blocks are computed by modules is expected
    (Execution.kernels "reference"). InputError where an activation is not finite.
    """
    device = model.token_embedding.weight.device
    whole = len(tokens) // seq_len * seq_len
    batches = list(tokens[:whole].view(-1, seq_len).split(MICRO_BATCH)) if whole else []
    if whole < len(tokens):
        batches.append(tokens[None, whole:])
    with watch(model) as found:
        for batch in batches:
            inputs = batch.to(device)
            model(inputs, inputs)  # a loss: the logits of a whole batch never exist
    for number, layer in enumerate(found):
        for name, moments in layer.items():
            if not bool(moments.scatter.isfinite().all()):
                raise InputError(f"layer {number + 1}: {SITES[name].label} is not finite")
    return found


def activation_spectra(
    model: Transformer, tokens: Tensor, seq_len: int
) -> dict[str, list[dict[str, Spectrum]]]:
    """ "centred" and "uncentred": for each layer the spectrum of each site's second moment."""
    most = {kind: bounds(model.config, kind == "centred") for kind in ("centred", "uncentred")}
    found: dict[str, list[dict[str, Spectrum]]] = {"centred": [], "uncentred": []}
    for layer in activation_moments(model, tokens, seq_len):
        centred = {name: layer[name].centred() for name in SITES}
        uncentred = {name: layer[name].uncentred() for name in SITES}
        for kind, moments in (("centred", centred), ("uncentred", uncentred)):
            found[kind].append(
                {name: Spectrum.of_moment(one, most[kind][name]) for name, one in moments.items()}
            )
    return found
