"""BitFit: the same as training the backbone's own biases."""

import pytest
import torch
from torch import nn

from model.delta import BitFitConfig, Deltas
from tests.model.delta.backbones import IDS, gpt2, logits, ours

# Modules that have a bias of their own on their output.
BACKBONES = {
    "gpt2": (gpt2, "re:.*(c_attn|c_proj|c_fc|ln_1|ln_2|ln_f)"),
    "paper-1": (
        lambda: ours(family="paper-1", dropout=0.0),
        "re:.*(q_proj|v_proj|o_proj|up_proj|down_proj|norm)",
    ),
}


def train(model: nn.Module, parameters: list[nn.Parameter]) -> torch.Tensor:
    """30 steps of AdamW to the ids themselves; the losses."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(logits(model).flatten(0, 1).double(), IDS.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("name", BACKBONES)
def test_it_is_training_the_biases(name):
    make, pattern = BACKBONES[name]
    model, other = make(), make()
    deltas = Deltas(model)
    delta = deltas.add("a", BitFitConfig(targets=[pattern]))
    deltas.double().freeze_backbone()
    losses = train(model, list(deltas.parameters()))
    own = {path: other.get_submodule(path).bias for path, _ in delta.named_layers()}
    start = {path: bias.detach().clone() for path, bias in own.items()}
    other.requires_grad_(False)
    for bias in own.values():
        bias.requires_grad_(True)
    expected = train(other, list(own.values()))
    assert expected[-1] < expected[0] - 0.01
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    for path, bias in own.items():
        moved = delta.layer(path).bias
        # AdamW's first steps divide by |gradient|: rounding counts where a gradient is zero but for
        # it, as that of a bias of keys is, which softmax ignores.
        torch.testing.assert_close(moved, bias - start[path], rtol=1e-6, atol=1e-6)


def test_widths_of_linear_layers_norms_and_sub_layers():
    model = ours(r=6, num_kv_heads=1, qk_norm=True)
    delta = Deltas(model).add("a", BitFitConfig(targets=["k_proj", "k_norm", "attention"]))
    widths = {path.split(".")[-1]: len(layer.bias) for path, layer in delta.named_layers()}
    assert widths == {"k_proj": 12, "k_norm": 12, "attention": 24}
    default = {path for path, _ in Deltas(model).add("a", BitFitConfig()).named_layers()}
    assert {"final_norm", "layers.1.attention.q_proj", "layers.0.attention_norm"} < default
    without = Deltas(ours(family="paper-1")).add("a", BitFitConfig(targets=["re:.*_norm"]))
    assert all(path.startswith("layers.") for path, _ in without.named_layers())
    with pytest.raises(ValueError, match="token_embedding is a Embedding; allowed are linear"):
        Deltas(model).add("a", BitFitConfig(targets=["token_embedding"]))


def test_an_output_that_would_be_broadcast_is_refused():
    model = ours()
    Deltas(model).add("a", BitFitConfig(targets=["lm_head"]))
    model(IDS)
    with pytest.raises(ValueError, match=r"lm_head: its output is \(\), of which a makes \(40,\)"):
        model(IDS, IDS)
