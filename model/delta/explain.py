"""The module tree of a backbone, with what a delta would adapt: sizes and shares."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.text import Text
from rich.tree import Tree
from torch import nn

from model.delta.base import Delta, DeltaConfig
from model.delta.target import as_target, whole_shape


@dataclass
class Node:
    """A module, or several that are alike.

    Attributes:
        name: The last part of its path; "0-11" where it stands for twelve that are alike.
        kind: Its class.
        shape: "24 -> 48", with the rank where it is factorised; empty where it has no matrix.
        times: How many modules it stands for.
        parameters: Of all of them, what is inside included.
        delta_parameters: What the delta adds to all of them, what is inside included.
        adapted: The delta has a layer on it.
        children: The modules inside one of them.
    """

    name: str
    kind: str
    shape: str
    times: int
    parameters: int
    delta_parameters: int
    adapted: bool
    children: list["Node"] = field(default_factory=list)

    def alike(self, other: "Node") -> bool:
        """Whether two differ in their name alone."""
        return {**asdict(self), "name": ""} == {**asdict(other), "name": ""}


def planned(backbone: nn.Module, config: DeltaConfig) -> Delta:
    """The delta that a configuration comes to, without memory for its parameters. ValueError as
    Deltas.add has it.
    """
    targets = config.find(backbone)
    with torch.device("meta"):
        return config.build(backbone, targets)


def explain(backbone: nn.Module, delta: Delta | None = None) -> Node:
    """The tree of a backbone, modules that are alike put together. Parameters that several modules
    share are counted in each of them.
    """
    added = (
        {name: _size(layer.parameters()) for name, layer in delta.named_layers()} if delta else {}
    )
    return _node("", backbone, "", added)


def _size(parameters: Iterable[torch.Tensor]) -> int:
    total = 0
    for parameter in parameters:
        size = 1
        for width in whole_shape(parameter):
            size *= width
        total += size
    return total


def _node(name: str, module: nn.Module, path: str, added: dict[str, int]) -> Node:
    children = [
        _node(child, inner, f"{path}.{child}" if path else child, added)
        for child, inner in module.named_children()
    ]
    target = as_target(path, module)
    shape = ""
    if target.kind != "other":
        rank = f", r {target.rank}" if target.rank is not None else ""
        shape = f"{target.d_in} -> {target.d_out}{rank}"
    inside = sum(size for key, size in added.items() if key == path or _within(key, path))
    return Node(
        name=name,
        kind=type(module).__name__,
        shape=shape,
        times=1,
        parameters=_size(module.parameters()),
        delta_parameters=inside,
        adapted=path in added,
        children=_folded(children),
    )


def _within(key: str, path: str) -> bool:
    return not path or key.startswith(path + ".")


def _folded(nodes: list[Node]) -> list[Node]:
    """Numbered neighbours that are alike as one."""
    groups: list[list[Node]] = []
    for node in nodes:
        if groups and node.name.isdigit() and groups[-1][0].alike(node):
            groups[-1].append(node)
        else:
            groups.append([node])
    return [_together(group) if len(group) > 1 else group[0] for group in groups]


def _together(group: list[Node]) -> Node:
    first = group[0]
    return Node(
        name=f"{first.name}-{group[-1].name}",
        kind=first.kind,
        shape=first.shape,
        times=len(group),
        parameters=sum(node.parameters for node in group),
        delta_parameters=sum(node.delta_parameters for node in group),
        adapted=first.adapted,
        children=first.children,
    )


def to_json(node: Node) -> dict[str, Any]:
    """The tree as dictionaries and lists."""
    return asdict(node)


def tree(node: Node, method: str = "delta") -> Tree:
    """The tree as rich prints it: what is adapted in green, sizes, and shares of the backbone."""
    root = Tree(_label(node, node.parameters, method), guide_style="dim")
    _grow(root, node, node.parameters, method)
    return root


def _grow(branch: Tree, node: Node, whole: int, method: str) -> None:
    for child in node.children:
        _grow(branch.add(_label(child, whole, method)), child, whole, method)


def _label(node: Node, whole: int, method: str) -> Text:
    text = Text()
    text.append(node.name or "backbone", style="bold green" if node.adapted else "bold")
    times = f" × {node.times}" if node.times > 1 else ""
    text.append(f" {node.kind}{times}", style="cyan")
    if node.shape:
        text.append(f" ({node.shape})")
    text.append(f" {node.parameters:,}", style="dim")
    if node.delta_parameters:
        share = node.delta_parameters / whole if whole else 0.0
        what = f"{method} " if node.adapted else ""
        text.append(f" + {what}{node.delta_parameters:,} ({share:.3%})", style="green")
    return text
