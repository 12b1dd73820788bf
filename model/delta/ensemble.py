"""Weighted ensembles of trained deltas, to begin a new task with (Lv et al. 2023, ACL, "Parameter-
efficient weight ensembling facilitates task-level knowledge transfer").

A score of each delta on data of the new task, weights from the scores by a softmax, and one delta
of all by the weights. The scores are means where the authors' code has sums over the first batch,
so that a temperature means the same at any amount of data; their signs are those of the paper.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.delta.base import Delta, DeltaLayer
from model.delta.deltas import Deltas
from model.delta.merge import low_rank
from model.delta.methods.lora import LoraConfig, LoraLayer

Method = Literal["loss", "kl", "el2n", "cosine", "grand"]
HIGHER_IS_BETTER: dict[Method, bool] = {
    "loss": False, "kl": False, "el2n": False, "cosine": True, "grand": False,
}  # fmt: skip


class Outputs(NamedTuple):
    """What a model says of a batch: logits (N, C) of N tokens or examples, and labels (N,)."""

    logits: Tensor
    labels: Tensor


Model = Callable[[object], Outputs]


def loss_sum(outputs: Outputs) -> Tensor:
    """Cross-entropy in nats, summed: lower is better."""
    return F.cross_entropy(outputs.logits.float(), outputs.labels, reduction="sum")


def el2n_sum(outputs: Outputs) -> Tensor:
    """‖softmax(logits) - onehot(label)‖₂ (Paul et al. 2021), summed: lower is better."""
    return _error(outputs).norm(dim=-1).sum()


def cosine_sum(outputs: Outputs) -> Tensor:
    """Cosine of softmax(logits) and onehot(label), summed: higher is better."""
    probabilities = outputs.logits.float().softmax(-1)
    own = probabilities.gather(-1, outputs.labels[:, None]).squeeze(-1)
    return (own / probabilities.norm(dim=-1)).sum()


def kl_sum(outputs: Outputs, target: Outputs) -> Tensor:
    """KL(P_target ‖ P_source), summed, of a delta tuned on the new task alone: lower is better."""
    source, wanted = (one.logits.float().log_softmax(-1) for one in (outputs, target))
    return (wanted.exp() * (wanted - source)).sum()


def _error(outputs: Outputs) -> Tensor:
    probabilities = outputs.logits.float().softmax(-1)
    return probabilities - F.one_hot(outputs.labels, probabilities.size(-1))


def score(
    deltas: Deltas,
    names: Sequence[str],
    model: Model,
    batches: Iterable[object],
    method: Method,
    target: str | None = None,
) -> dict[str, float]:
    """The score of each named delta, alone on the backbone, on batches of the new task.

    model: runs the backbone on a batch. target: for "kl" the delta that was tuned on the new task.
    Means over tokens or examples; grand, the norm of the loss's gradient by the delta's parameters
    (Paul et al. 2021), is a mean over batches. Dropout is off, and what was active is active again
    afterwards. ValueError where there is no batch, or kl has no target.
    """
    if method == "kl" and target is None:
        raise ValueError("kl: it compares with a delta tuned on the new task; name it as target")
    kept = list(batches)
    if not kept:
        raise ValueError("batches: there is none to score the deltas on")
    before, modes = deltas.active, {m: m.training for m in deltas.backbone.modules()}
    deltas.backbone.eval()
    try:
        return {name: _score(deltas, name, model, kept, method, target) for name in names}
    finally:
        deltas.activate(*before)
        for module, mode in modes.items():
            module.training = mode


def _score(
    deltas: Deltas,
    name: str,
    model: Model,
    batches: Sequence[object],
    method: Method,
    target: str | None,
) -> float:
    total, count = 0.0, 0
    for batch in batches:
        if method == "grand":
            total, count = total + _gradient_norm(deltas, name, model, batch), count + 1
            continue
        with torch.no_grad():
            found = _outputs(deltas, name, model, batch)
            if method == "kl":
                assert target is not None
                value = kl_sum(found, _outputs(deltas, target, model, batch))
            else:
                sums = {"loss": loss_sum, "el2n": el2n_sum, "cosine": cosine_sum}
                value = sums[method](found)
        total, count = total + float(value), count + len(found.labels)
    return total / count


def _outputs(deltas: Deltas, name: str, model: Model, batch: object) -> Outputs:
    deltas.activate(name)
    return model(batch)


def _gradient_norm(deltas: Deltas, name: str, model: Model, batch: object) -> float:
    """‖∂ mean loss / ∂ parameters of the delta‖₂ on a batch."""
    parameters = [p for p in deltas[name].parameters() if p.requires_grad]
    with torch.enable_grad():
        found = _outputs(deltas, name, model, batch)
        loss = loss_sum(found) / len(found.labels)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return float(torch.stack([g.norm() for g in gradients if g is not None]).norm())


def weights(
    scores: Mapping[str, float], temperature: float, higher_is_better: bool = False
) -> dict[str, float]:
    """softmax(±score / temperature): the better a delta's score, the larger its weight.

    ValueError where the temperature is not over 0, or there is no score.
    """
    if not temperature > 0 or not scores:
        raise ValueError(f"temperature: {temperature} for {len(scores)} scores; it must be over 0")
    sign = 1 if higher_is_better else -1
    values = torch.tensor(list(scores.values()), dtype=torch.float64) * (sign / temperature)
    return dict(zip(scores, values.softmax(0).tolist(), strict=True))


@torch.no_grad()
def combine(parts: Mapping[str, Delta], by: Mapping[str, float], rank: int | None = None) -> Delta:
    """A LoRA whose ΔW is exactly Σ weight · ΔW of the parts: their factors side by side.

    parts: of methods that add a low-rank matrix, on any targets. rank: the best approximation of
    that rank in its place (singular value decomposition). Outputs, and only they, are averaged this
    way; `average` averages parameters. ValueError where a part has no weight, or no rank is left.
    """
    _require_weights(parts, by)
    if rank is not None and rank < 1:
        raise ValueError(f"rank: {rank}; allowed is at least 1")
    products = {name: low_rank(delta) for name, delta in parts.items()}
    paths = list(dict.fromkeys(path for found in products.values() for path in found))
    layers = {}
    for path in paths:
        found = [(by[name], *products[name][path]) for name in parts if path in products[name]]
        up = torch.cat([weight * b for weight, b, _ in found], dim=1)
        down = torch.cat([a for _, _, a in found])
        # A product has no more rank than its widths, and a LoRA of more could not be read again.
        most = min(len(up), down.size(1)) if rank is None else rank
        if rank is not None or len(down) > most:
            up, down = truncated(up, down, most)
        layer = LoraLayer(down.size(1), up.size(0), len(down), 1.0)
        layer.to(down.device, down.dtype)
        layer.A.copy_(down)
        layer.B.copy_(up)
        layers[path] = layer
    ranks = {path: layer.rank for path, layer in layers.items()}
    config = LoraConfig(
        targets=paths, r=max(ranks.values()), ranks=ranks, scales=dict.fromkeys(paths, 1.0)
    )
    return Delta.of(config, layers)


def truncated(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of `rank` to up @ down in the Frobenius norm (Eckart and Young 1936), its
    singular values shared between the factors. up (d_out, k), down (k, d_in).
    """
    left, middle = torch.linalg.qr(up.double())
    right, other = torch.linalg.qr(down.double().T)
    u, s, v = torch.linalg.svd(middle @ other.T)
    root = s[:rank].sqrt()
    return (left @ u[:, :rank] * root).to(up.dtype), (root[:, None] * v[:rank] @ right.T).to(
        down.dtype
    )


@torch.no_grad()
def average(parts: Mapping[str, Delta], by: Mapping[str, float]) -> Delta:
    """The paper's ensemble: every parameter the weighted sum of the parts' parameters.

    For deltas of any method that have one configuration. For LoRA A and B are averaged each, so ΔW
    is not the average of the parts' (combine has that). ValueError where configurations differ.
    """
    _require_weights(parts, by)
    (first_name, first), *others = parts.items()
    for name, delta in others:
        shapes = [{k: v.shape for k, v in one.state_dict().items()} for one in (first, delta)]
        if delta.config != first.config or shapes[0] != shapes[1]:
            raise ValueError(
                f"{name}: its configuration or shapes are not those of {first_name}; parameters "
                "can be averaged of like deltas alone"
            )
    result = copy.deepcopy(first)
    states = {name: delta.state_dict() for name, delta in parts.items()}
    state = {
        key: torch.stack([by[name] * states[name][key] for name in parts]).sum(0)
        for key in result.state_dict()
    }
    result.load_state_dict(state)
    return result


def _require_weights(parts: Mapping[str, Delta], by: Mapping[str, float]) -> None:
    for name, weight in by.items():
        if not math.isfinite(weight):
            raise ValueError(f"weights: {weight} of {name}; allowed are finite numbers")
    if not parts or set(parts) != set(by):
        raise ValueError(
            f"weights: of {', '.join(by) or 'none'}, and the deltas are "
            f"{', '.join(parts) or 'none'}"
        )


class Mixture(Delta):
    """Deltas with learned weights: ΔW = Σ w_k ΔW_k, the parts frozen, w trained.

    Attributes:
        part_names: The parts, in the order of the weights.
        weights: (parts,), trained; not bound to sum to 1.
    """

    described_by = "save what combined() returns"

    def __init__(self, parts: Mapping[str, Delta], by: Mapping[str, float]) -> None:
        _require_weights(parts, by)
        learned = nn.Parameter(torch.tensor([float(by[name]) for name in parts]))
        paths = list(dict.fromkeys(path for d in parts.values() for path, _ in d.named_layers()))
        layers: dict[str, DeltaLayer] = {}
        for path in paths:
            own = [(i, d.layer(path)) for i, d in enumerate(parts.values())]
            layers[path] = _MixtureLayer([(i, layer) for i, layer in own if layer], learned)
        super().__init__(LoraConfig(targets=paths), (), lambda _: DeltaLayer())
        self.layers.update({path.replace(".", "/"): layer for path, layer in layers.items()})
        self.part_names = list(parts)
        self.weights = learned
        self._parts = dict(parts)

    def combined(self, rank: int | None = None) -> Delta:
        """The LoRA that the mixture comes to (combine)."""
        values = self.weights.detach().tolist()
        return combine(self._parts, dict(zip(self.part_names, values, strict=True)), rank)


class _MixtureLayer(DeltaLayer):
    """y + Σ w_k (layer_k(x, y) - y)."""

    def __init__(self, parts: list[tuple[int, DeltaLayer]], shared: nn.Parameter) -> None:
        super().__init__()
        self.indices = [index for index, _ in parts]
        self.parts = nn.ModuleList(layer for _, layer in parts).requires_grad_(False)
        self.weights = shared

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., d_in), y (..., d_out) -> (..., d_out)."""
        total = y
        for index, layer in zip(self.indices, self.parts, strict=True):
            total = total + self.weights[index].to(y.dtype) * (layer(x, y) - y)
        return total
