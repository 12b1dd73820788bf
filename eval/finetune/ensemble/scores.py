"""The five scores of Lv et al. 2023 of each source on a new task, under a head of the task.

Their model writes its answers, so all sources share the output head of pre-training. A classifier's
head is of its task, and means nothing to another one. So each source is scored under a head that
was trained for the new task on what the backbone makes with this source's delta, the delta frozen;
all from the same start for the same steps. Classes go through model.delta.ensemble. For numbers,
where there is no softmax, the head's output is the mean of a normal distribution of variance 1 over
the standardised label y, which is what squared error fits:

loss    mean (ŷ - y)², the loss that is trained
el2n    mean |ŷ - y|, the norm of the error
cosine  of all ŷ and all y, over the examples
kl      mean (ŷ_target - ŷ)² / 2, KL of two normal distributions of variance 1
grand   the norm of the gradient of the loss by the delta's parameters, mean over batches
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.finetune.backbones import Backbone
from eval.finetune.heads import TaskModel, run
from eval.finetune.tasks import Task
from eval.finetune.texts import Batch
from model.delta import Deltas
from model.delta.ensemble import Method, Outputs, score
from model.delta.files import load_delta

TARGET = "target"  # the delta that was tuned on the new task alone, for kl


class Probes:
    """A backbone with the deltas of several folders, each with the head that is saved with it."""

    def __init__(self, backbone: Backbone, task: Task, folders: Mapping[str, Path]) -> None:
        self.model, self.task = TaskModel(backbone, task, 0), task
        self.model.requires_grad_(False)
        self.deltas = Deltas(self.model.backbone)
        self.heads: dict[str, Tensor] = {}
        device = next(self.model.backbone.parameters()).device
        for name, folder in folders.items():
            loaded = load_delta(folder, self.model.backbone)
            self.deltas.insert(name, loaded.delta, activate=False)
            self.heads[name] = loaded.extra["head.weight"].to(device)

    def outputs(self, batch: Batch) -> Tensor:
        """What the active delta and its head make of a batch, (B, outputs)."""
        (name,) = self.deltas.active
        assert self.model.head is not None
        self.model.head.weight = nn.Parameter(self.heads[name], requires_grad=False)
        return run(self.model, batch)


def scores_of(
    probes: Probes, names: Sequence[str], batches: Sequence[Batch], methods: Sequence[Method]
) -> dict[Method, dict[str, float]]:
    """Each score of each named delta; kl against the one that is called TARGET."""
    if probes.task.kind == "regression":
        return {method: _of_numbers(probes, names, batches, method) for method in methods}

    def model(batch: object) -> Outputs:
        assert isinstance(batch, Batch)
        assert batch.labels is not None
        return Outputs(probes.outputs(batch), batch.labels)

    return {
        method: score(probes.deltas, names, model, batches, method, TARGET) for method in methods
    }


def _of_numbers(
    probes: Probes, names: Sequence[str], batches: Sequence[Batch], method: Method
) -> dict[str, float]:
    """A score of each named delta on a task of numbers."""
    probes.model.eval()
    found = {}
    labels = torch.cat([_labels(batch) for batch in batches])
    for name in names:
        if method == "grand":
            norms = [_gradient_norm(probes, name, batch) for batch in batches]
            found[name] = sum(norms) / len(norms)
            continue
        y = _predicted(probes, name, batches)
        if method == "cosine":
            found[name] = float(F.cosine_similarity(y, labels, dim=0))
            continue
        wanted = _predicted(probes, TARGET, batches) if method == "kl" else labels
        error = (y - wanted).abs()
        found[name] = float({"loss": error**2, "el2n": error, "kl": error**2 / 2}[method].mean())
    return found


def _labels(batch: Batch) -> Tensor:
    assert batch.labels is not None
    return batch.labels.double()


@torch.no_grad()
def _predicted(probes: Probes, name: str, batches: Sequence[Batch]) -> Tensor:
    """ŷ of all examples, (n,), float64."""
    probes.deltas.activate(name)
    return torch.cat([probes.outputs(batch)[:, 0].double() for batch in batches])


def _gradient_norm(probes: Probes, name: str, batch: Batch) -> float:
    """‖∂ mean squared error / ∂ parameters of the delta‖₂ on a batch."""
    probes.deltas.activate(name)
    parameters = list(probes.deltas[name].parameters())
    loss = (probes.outputs(batch)[:, 0].double() - _labels(batch)).square().mean()
    gradients = torch.autograd.grad(loss, parameters)
    return float(torch.stack([one.norm() for one in gradients]).norm())
