"""What a delta can be attached to, and how a target is named in a configuration."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["linear", "transposed", "factorised", "other"]
REGEX = "re:"  # what a pattern begins with that is a regular expression


@dataclass(frozen=True)
class Target:
    """A module of a backbone.

    Attributes:
        name: Its path from the backbone's root.
        module: The module.
        kind: "linear" (weight (d_out, d_in)), "transposed" (weight (d_in, d_out), as in
            transformers' Conv1D), "factorised" (y = B (A x), A (r, d_in), B (d_out, r)), or
            "other", which has no matrix.
        d_in: Width of its input; None for other.
        d_out: Width of its output; None for other.
        rank: Rank of a factorised one.
    """

    name: str
    module: nn.Module
    kind: Kind
    d_in: int | None = None
    d_out: int | None = None
    rank: int | None = None

    @property
    def widths(self) -> tuple[int, int]:
        """d_in and d_out of a target that has a matrix."""
        assert self.d_in is not None
        assert self.d_out is not None
        return self.d_in, self.d_out


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, also where DeepSpeed's ZeRO stage 3 has taken it apart."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def as_target(name: str, module: nn.Module) -> Target:
    """A module as a target. Factorised is what has 2-D parameters A and B whose shapes fit."""
    A, B = getattr(module, "A", None), getattr(module, "B", None)
    if isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter):
        a, b = whole_shape(A), whole_shape(B)
        if len(a) == len(b) == 2 and a[0] == b[1]:
            return Target(name, module, "factorised", a[1], b[0], a[0])
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and len(whole_shape(weight)) == 2:
        rows, columns = whole_shape(weight)
        if isinstance(module, nn.Linear):
            return Target(name, module, "linear", columns, rows)
        if type(module).__name__ == "Conv1D":  # of transformers, which need not be installed
            return Target(name, module, "transposed", rows, columns)
    return Target(name, module, "other")


def outer_widths(target: Target) -> tuple[int, int] | None:
    """Widths of a target's input and output, also of one that is no matrix itself: of a norm those
    of its weight, of a sub-layer those of the first and of the last matrix inside, in the order in
    which it registers them. None where they cannot be told.
    """
    if target.kind != "other":
        return target.widths
    weight = getattr(target.module, "weight", None)
    if isinstance(weight, nn.Parameter) and len(whole_shape(weight)) == 1:
        size = whole_shape(weight)[0]
        return size, size
    inside = [as_target(name, module) for name, module in target.module.named_modules()]
    matrices = [one for one in inside if one.kind != "other"]
    return (matrices[0].widths[0], matrices[-1].widths[1]) if matrices else None


def layer_index(name: str) -> int | None:
    """The number of the layer that a module is in: the first part of its path that is a number."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def parse_layers(layers: str) -> set[int]:
    """The layers of a text such as "0-3,8". ValueError where it is none."""
    found: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"layers: {layers!r}; allowed are numbers and ranges such as 0-3,8")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a module: a regular expression after "re:" that fits its whole path,
    or the path's last parts (so "v_proj" fits "layers.0.v_proj" and not "layers.0.kv_proj").
    """
    if pattern.startswith(REGEX):
        try:
            return re.fullmatch(pattern.removeprefix(REGEX), name) is not None
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return name == pattern or name.endswith("." + pattern)


def find_targets(
    backbone: nn.Module,
    patterns: Sequence[str],
    *,
    layers: str | None = None,
    exclude: Sequence[str] = (),
    need_matrix: bool = True,
) -> list[Target]:
    """The targets that patterns name, in the order of the backbone's modules.

    layers: only those of these layers, as parse_layers reads them. exclude: patterns of modules to
    leave out, with what is inside them. need_matrix: ValueError where a named module has none.
    ValueError, with names that come near, where a pattern names nothing.
    """
    names = dict(backbone.named_modules())
    require_named("targets", patterns, names)
    require_named("exclude", exclude, names)
    kept = parse_layers(layers) if layers is not None else None
    found = []
    for name, module in names.items():
        if not name or not any(matches(name, pattern) for pattern in patterns):
            continue
        if kept is not None and layer_index(name) not in kept:
            continue
        if any(matches(part, pattern) for part in _prefixes(name) for pattern in exclude):
            continue
        target = as_target(name, module)
        if need_matrix and target.kind == "other":
            raise ValueError(
                f"targets: {name} is a {type(module).__name__}, which is no matrix; allowed are "
                "nn.Linear, Conv1D and modules with factors A and B"
            )
        found.append(target)
    if not found:
        raise ValueError(
            f"targets: {', '.join(patterns)} name modules, but layers {layers} and exclude "
            f"{', '.join(exclude) or 'nothing'} leave none of them"
        )
    return found


def require_named(key: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """ValueError, with names that come near, where one of a field's patterns names none of them."""
    every = list(names)
    for pattern in patterns:
        try:
            found = any(matches(name, pattern) for name in every)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if not found:
            raise ValueError(f"{key}: {_no_match(pattern, every)}")


def _prefixes(name: str) -> Iterator[str]:
    """A path and those of the modules around it."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _no_match(pattern: str, names: list[str]) -> str:
    """An error with names that come near."""
    ends = sorted({name.rpartition(".")[2] for name in names if name} - {""})
    words = [end for end in ends if not end.isdigit()]
    wanted = pattern.removeprefix(REGEX)
    near = difflib.get_close_matches(wanted, words + names, n=3, cutoff=0.5)
    near += [word for word in words if wanted.lower() in word.lower() and word not in near][:3]
    hint = f"near it: {', '.join(near)}" if near else f"names are {', '.join(words[:12])}"
    return f"{pattern!r} names no module; {hint}"


def dense_weight(target: Target) -> Tensor:
    """The matrix (d_out, d_in) that a target applies, in float32; of factors their product."""
    module = target.module
    if target.kind == "factorised":
        A, B = _tensor(module, "A"), _tensor(module, "B")
        return B.float() @ A.float()
    weight = _tensor(module, "weight").float()
    return weight.T if target.kind == "transposed" else weight


def _tensor(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    assert isinstance(value, torch.Tensor)
    return value
