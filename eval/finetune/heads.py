"""The module that is trained: backbone, deltas, and the head of a task."""

from typing import Any

import torch
from torch import Tensor, nn

from eval.finetune.backbones import Backbone
from eval.finetune.tasks import Task
from eval.finetune.texts import Batch
from model.delta import Delta, Deltas

HEAD_STD = 0.02


class TaskHead(nn.Linear):
    """Linear, without bias, in float32 whatever autocast says. weight (outputs, d)."""

    def __init__(self, hidden_size: int, outputs: int, seed: int) -> None:
        super().__init__(hidden_size, outputs, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.weight.normal_(0, HEAD_STD, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, d) -> (B, outputs), float32."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class TaskModel(nn.Module):
    """What the engine and the optimizer are given."""

    def __init__(self, backbone: Backbone, task: Task, seed: int) -> None:
        super().__init__()
        self._source = (backbone,)  # in a tuple: it is no part of the module
        self.task = task.name
        self.backbone = backbone.module
        self.deltas: Deltas | None = None
        self.head: TaskHead | None = None
        if task.kind != "lm":
            backbone.without_head()
            device = next(backbone.module.parameters()).device
            self.head = TaskHead(backbone.hidden_size, task.outputs, seed).to(device)

    @property
    def source(self) -> Backbone:
        """The backbone with its tokenizer."""
        return self._source[0]

    @property
    def delta(self) -> Delta | None:
        """The one that is trained; None where it is none of model.delta."""
        return self.deltas[self.deltas.names()[0]] if self.deltas is not None else None

    def forward(
        self, ids: Tensor, lengths: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """With a head its outputs (B, outputs) for the hidden state of each row's last real token;
        without, the losses of targets (B, T).
        """
        call: Any = self.backbone
        if self.head is None:
            assert targets is not None
            return self.source.token_losses(call, ids, targets)
        assert lengths is not None
        states = self.source.states(call, ids)  # (B, T, d)
        rows = torch.arange(ids.size(0), device=ids.device)
        outputs: Tensor = self.head(states[rows, lengths - 1])
        return outputs


def run(module: Any, batch: Batch) -> Tensor:
    """What a TaskModel, or an engine around it, returns for a batch."""
    if batch.targets is not None:
        found: Tensor = module(batch.ids, targets=batch.targets)
    else:
        found = module(batch.ids, batch.lengths)
    return found
