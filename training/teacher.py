"""The teacher of a distilled run: found, checked and loaded beside the engine."""

import torch
from torch import Tensor, nn

from data.errors import InputError
from model import Transformer
from training import checkpoint
from training.config import RunConfig
from training.distillation import autocasts
from training.execution import apply_execution
from training.init_from import WEIGHTS, GivenWeights, find


def find_teacher(
    run: RunConfig, tokenizer_sha256: str | None = None, verify: bool = True
) -> GivenWeights | None:
    """The teacher of a run; None where it has none. InputError, naming the key, where its features
    cannot be those of this model.
    """
    path = run.distillation.teacher
    if path is None:
        return None
    found = find(path, "distillation.teacher", tokenizer_sha256)
    for key in ("num_layers", "hidden_size", "vocab_size"):
        theirs, ours = getattr(found.config, key), getattr(run.model, key)
        if theirs != ours:
            raise InputError(
                f"distillation.teacher: {found.folder}: model.{key} is {theirs} there, {ours} in "
                "this configuration; they must be the same"
            )
    if found.config.max_seq_len < run.training.seq_len:
        raise InputError(
            f"distillation.teacher: {found.folder}: model.max_seq_len is "
            f"{found.config.max_seq_len}, training.seq_len {run.training.seq_len}; it must be at "
            "least that"
        )
    if verify:
        checkpoint.verify(found.folder, ("model.json", WEIGHTS))
    return found


class _NoHead(nn.Module):
    """Stands where the teacher's head was: nobody reads its logits."""

    def forward(self, x: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        return x[..., :1]


def load_teacher(run: RunConfig, teacher: GivenWeights, device: torch.device) -> Transformer:
    """The teacher, frozen, in evaluation mode and without its head, whole on this rank: it is no
    part of the module that DeepSpeed has, so no ZeRO stage shards it. It computes as the run does.
    """
    dtype = torch.float32 if autocasts(run) else run.training.torch_dtype
    model = checkpoint.load_model(teacher.folder, device, dtype).requires_grad_(False)
    model.final_norm, model.lm_head = nn.Identity(), _NoHead()  # type: ignore[assignment]
    apply_execution(model, run.execution, device, run.training.torch_dtype, training=True)
    return model.eval()
