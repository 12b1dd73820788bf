"""What every tuning method has: a configuration, layers for its targets, a delta of them."""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model.delta.target import Target, find_targets


@dataclass
class DeltaConfig:
    """What all methods have in common.

    Attributes:
        targets: The modules to adapt: ends of their paths, such as "v_proj" or "attention.v_proj",
            or regular expressions over the whole path, after "re:".
        layers: Only those in these layers, such as "0-3,8"; null: in all.
        exclude: Modules to leave out, with what is inside them, named as targets are.
    """

    method: ClassVar[str]
    needs_matrix: ClassVar[bool] = True

    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    layers: str | None = None
    exclude: list[str] = field(default_factory=list)

    def find(self, backbone: nn.Module) -> list[Target]:
        """The modules that this adapts. ValueError where a pattern names none."""
        return find_targets(
            backbone,
            self.targets,
            layers=self.layers,
            exclude=self.exclude,
            need_matrix=self.needs_matrix,
        )

    def build(self, backbone: nn.Module, targets: Sequence[Target]) -> "Delta":
        """New parameters for these targets. Methods define it."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the method's name."""
        return {"method": self.method, **dataclasses.asdict(self)}

    def _require(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"{name}: {getattr(self, name)!r}; allowed is {allowed}")


Config = TypeVar("Config", bound=type[DeltaConfig])
METHODS: dict[str, type[DeltaConfig]] = {}


def register(config: Config) -> Config:
    """Makes a method known by its name. A class decorator."""
    METHODS[config.method] = config
    return config


def config_from_dict(fields: dict[str, Any]) -> DeltaConfig:
    """The inverse of DeltaConfig.to_dict. ValueError on unknown methods, keys and types."""
    fields = dict(fields)
    method = fields.pop("method", None)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: {method!r}; allowed are {', '.join(sorted(METHODS))}")
    cls = METHODS[method]
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key, value in fields.items():
        if key not in known:
            raise ValueError(f"{method}: unknown key {key!r}; known are {', '.join(sorted(known))}")
        check_type(f"{method}: {key}", value, hints[key])
    return cls(**fields)


def check_type(name: str, value: Any, hint: Any) -> None:
    """ValueError where a value read from JSON or YAML has not the type of its field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        fits = value in arguments
    elif origin in (typing.Union, types.UnionType):
        fits = any(_fits(value, one) for one in arguments)
    else:
        fits = _fits(value, hint)
    if not fits:
        raise ValueError(f"{name}: {value!r}; allowed is {hint}")


def _fits(value: Any, hint: Any) -> bool:
    kind = typing.get_origin(hint) or hint
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is typing.Literal:
        return value in typing.get_args(hint)
    if not isinstance(value, kind):
        return False
    inner = typing.get_args(hint)
    if kind is list:
        return all(_fits(one, inner[0]) for one in value)
    if kind is dict:
        return all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    return True


class DeltaLayer(nn.Module):
    """What a delta adds to one target: forward(x, y) gets the target's input and output and returns
    the output that takes its place, of y's shape and dtype.
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., d_in), y (..., d_out) -> (..., d_out)."""
        raise NotImplementedError


class Delta(nn.Module):
    """The parameters of one delta: a layer for each of its targets, by the target's path.

    Attributes:
        described_by: None where `config` says all that it takes to build it again; else what to
            save in its place.
    """

    described_by: ClassVar[str | None] = None

    def __init__(
        self, config: DeltaConfig, targets: Sequence[Target], make: Callable[[Target], DeltaLayer]
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict({_key(one.name): make(one) for one in targets})

    @classmethod
    def of(cls, config: DeltaConfig, layers: Mapping[str, DeltaLayer]) -> "Delta":
        """A delta of layers that exist, by their targets' paths."""
        delta = cls(config, (), lambda _: DeltaLayer())
        delta.layers.update({_key(name): layer for name, layer in layers.items()})
        return delta

    def layer(self, name: str) -> DeltaLayer | None:
        """The layer of a target; None where this delta has none for it."""
        key = _key(name)
        if key not in self.layers:
            return None
        layer = self.layers[key]
        assert isinstance(layer, DeltaLayer)
        return layer

    def named_layers(self) -> Iterator[tuple[str, DeltaLayer]]:
        """Paths of targets and their layers."""
        for key, layer in self.layers.items():
            assert isinstance(layer, DeltaLayer)
            yield key.replace("/", "."), layer

    def hooks(self, owner: Any, name: str) -> list[RemovableHandle]:
        """Hooks beside those on the outputs of targets; a method that needs some defines it. owner:
        the Deltas, whose acting() says when `name` acts, and on what.
        """
        return []

    def num_parameters(self, trained: bool = False) -> int:
        """Elements of its parameters, those that are shared once; trained: only those that are."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trained)


def _key(name: str) -> str:
    """A path as a key of nn.ModuleDict, in which dots are not allowed."""
    return name.replace(".", "/")
