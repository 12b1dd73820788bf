"""The tree that explains a delta: counts, shares, modules that are alike."""

import pytest
import torch
from rich.console import Console

from model.delta import Deltas, LoraConfig, TiedLoraConfig
from model.delta.explain import Node, explain, planned, to_json, tree
from tests.model.delta.backbones import gpt2, llama, ours


def find(node: Node, name: str) -> Node:
    """The first node of a name."""
    found = [node] if node.name == name else []
    for child in node.children:
        try:
            found.append(find(child, name))
        except LookupError:
            continue
    if not found:
        raise LookupError(name)
    return found[0]


@pytest.mark.parametrize("make", [ours, lambda: ours(r=6), llama, gpt2])
def test_counts_are_those_of_torch(make):
    model = make()
    root = explain(model)
    assert root.parameters >= sum(p.numel() for p in model.parameters())  # tied ones twice
    names = {name for name, _ in model.named_children()}
    assert {child.name for child in root.children} == names
    assert root.delta_parameters == 0


def test_layers_that_are_alike_are_one():
    model = ours(r=6, num_layers=4)
    delta = planned(model, LoraConfig(targets=["q_proj", "down_proj"], r=3, layers="1-3"))
    root = explain(model, delta)
    layers = find(root, "layers")
    assert [(node.name, node.times) for node in layers.children] == [("0", 1), ("1-3", 3)]
    alike = layers.children[1]
    assert alike.parameters == 3 * sum(p.numel() for p in model.layers[1].parameters())
    each = 3 * (24 + 24) + 3 * (32 + 24)
    assert alike.delta_parameters == 3 * each == root.delta_parameters == delta.num_parameters()
    q = find(alike, "q_proj")
    assert (q.adapted, q.shape, q.delta_parameters) == (True, "24 -> 24, r 6", 144)
    assert not find(layers.children[0], "q_proj").adapted


def test_a_plan_needs_no_memory_and_counts_as_the_delta_itself():
    for config in (
        LoraConfig(targets=["q_proj"], r=3),
        TiedLoraConfig(targets=["q_proj", "v_proj"], r=3),
    ):
        model = ours()
        plan = planned(model, config)
        assert {p.device.type for p in plan.parameters()} == {"meta"}
        assert plan.num_parameters() == Deltas(model).add("a", config).num_parameters()


def test_what_is_printed_says_what_is_adapted():
    model = ours(r=6)
    root = explain(model, planned(model, LoraConfig(targets=["q_proj"], r=3)))
    console = Console(width=200)
    with console.capture() as captured:
        console.print(tree(root, "lora"))
    text = captured.get()
    assert "q_proj LowDim (24 -> 24, r 6) 288 + lora 144" in text
    assert "0-1 Block × 2" in text
    assert to_json(root)["children"][0]["name"] == "token_embedding"


def test_parameters_on_the_meta_device_are_counted():
    with torch.device("meta"):
        model = llama()
    assert explain(model).parameters == explain(llama()).parameters
