"""Small backbones for the tests of deltas: ours, transformers' and a plain one."""

from typing import Any

import torch
from torch import Tensor, nn

from model import ModelConfig, Transformer, init_weights
from model.config import Ranks

SHAPE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_layers": 2, "num_heads": 2,
    "max_seq_len": 32, "init_std": 0.2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "lpa": {"r": 6},
    "low everywhere": {"r": Ranks(6, 5, 7, 6, 9)},
    "paper-1 lpa": {"family": "paper-1", "r": 6, "dropout": 0.0},
}
IDS = torch.randint(0, 40, (3, 10), generator=torch.Generator().manual_seed(1))


def ours(dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    """A Transformer of ours with random weights."""
    model = Transformer(ModelConfig(**(SHAPE | changes)))
    init_weights(model, seed=3)
    return model.to(dtype)


def llama() -> nn.Module:
    """A Llama of transformers, of the same sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def gpt2() -> nn.Module:
    """A GPT-2 of transformers, whose weights are Conv1D's."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    config = GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config).double().eval()


class Plain(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., 12) -> (..., 6)."""
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def plain() -> Plain:
    """A Plain in float64."""
    torch.manual_seed(7)
    return Plain().double()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Logits of any of the language models above."""
    found = model(ids)
    result: Tensor = found if isinstance(found, Tensor) else found.logits
    return result


def randomise(module: nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Random values for all parameters, so that a delta adds something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, std, generator=generator)
