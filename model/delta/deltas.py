"""Deltas: what is attached to a backbone, by forward hooks that leave its code and keys alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model.delta.base import Delta, DeltaConfig, DeltaLayer
from model.delta.target import matches, require_named


class Deltas(nn.Module):
    """The deltas of a backbone. Its parameters are theirs alone: the backbone is no submodule.

    Any number of deltas can be held; those that are active act in the order of activation. Attached
    or not, active or not, the backbone's modules, parameters and state-dict keys stay what they
    are; with none active it computes what it computed before, bit by bit.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self._backbone = (backbone,)  # in a tuple: nn.Module would register it as its own
        self.deltas = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        # For each target the layers that act on it now, so that a hook has nothing to look up.
        self._acting: dict[str, list[tuple[str, DeltaLayer]]] = {}
        self._rows: dict[str, Tensor] | None = None
        self._batch: int | None = None
        self._handles: list[RemovableHandle] = []
        self._frozen: list[nn.Parameter] = []
        self.attached = True

    @property
    def backbone(self) -> nn.Module:
        """What the deltas act on."""
        return self._backbone[0]

    def __getitem__(self, name: str) -> Delta:
        """A delta by its name."""
        self._require(name)
        found = self.deltas[name]
        assert isinstance(found, Delta)
        return found

    def names(self) -> list[str]:
        """Names of all deltas, in the order in which they were added."""
        return list(self.deltas)

    def add(self, name: str, config: DeltaConfig, activate: bool = True) -> Delta:
        """Builds a delta with new parameters, on the device of each target, in float32.

        ValueError where the name is taken or has a dot, a pattern of the configuration names no
        module, or nothing would be adapted.
        """
        delta = config.build(self.backbone, config.find(self.backbone))
        if not delta.layers:
            raise ValueError("ranks: all are 0, so that no target is left; allowed is one over 0")
        return self.insert(name, delta, activate)

    def insert(self, name: str, delta: Delta, activate: bool = True) -> Delta:
        """Adds a delta that exists. ValueError as in `add`."""
        if name in self.deltas or not name or "." in name:
            raise ValueError(
                f"name: {name!r}; allowed is one without a dot, other than {', '.join(self.deltas)}"
            )
        modules = dict(self.backbone.named_modules())
        for path, layer in delta.named_layers():
            if path not in modules:
                raise ValueError(f"{name}: the backbone has no module {path}")
            device = next((p.device for p in modules[path].parameters()), None)
            layer.to(device)
        self.deltas[name] = delta
        if activate:
            self.active = (*self.active, name)
        self._hook()
        return delta

    def remove(self, name: str) -> None:
        """Drops a delta and its parameters."""
        self._require(name)
        self.active = tuple(one for one in self.active if one != name)
        del self.deltas[name]
        self._hook()

    def activate(self, *names: str) -> None:
        """Makes exactly these deltas act, in this order; none without arguments."""
        for name in names:
            self._require(name)
        if len(set(names)) < len(names):
            raise ValueError(f"names: {', '.join(names)}; each is allowed once")
        self.active = names
        self._list_acting()

    def _list_acting(self) -> None:
        self._acting = {}
        for name in self.active:
            for path, layer in self[name].named_layers():
                self._acting.setdefault(path, []).append((name, layer))

    def _require(self, name: str) -> None:
        if name not in self.deltas:
            raise ValueError(f"delta {name!r}: there are {', '.join(self.deltas) or 'none'}")

    def attach(self) -> None:
        """Puts the hooks back after `detach`."""
        self.attached = True
        self._hook()

    def detach(self) -> None:
        """Takes all hooks off the backbone. The deltas stay."""
        self.attached = False
        self._hook()

    @contextmanager
    def detached(self) -> Iterator[None]:
        """The backbone alone, for a while."""
        before = self.attached
        self.detach()
        try:
            yield
        finally:
            if before:
                self.attach()

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """A delta of its own for each row of a batch, for a while, whatever is active.

        names: for each row the delta that acts on it; None: the backbone alone. Inputs and outputs
        of the targets must have the batch first. ValueError, from the forward pass, where a batch
        has another number of rows.
        """
        for name in {one for one in names if one is not None}:
            self._require(name)
        before = self._rows, self._batch
        self._rows = {
            name: torch.tensor([row for row, one in enumerate(names) if one == name])
            for name in dict.fromkeys(one for one in names if one is not None)
        }
        self._batch = len(names)
        try:
            yield
        finally:
            self._rows, self._batch = before

    def freeze_backbone(self, keep: Sequence[str] = ()) -> None:
        """Stops the training of the backbone's parameters, but for those of modules that `keep`
        names as targets are named. `unfreeze_backbone` undoes it. ValueError where a pattern names
        none.
        """
        require_named("keep", keep, [name for name, _ in self.backbone.named_modules()])
        self.unfreeze_backbone()
        for name, parameter in self.backbone.named_parameters():
            owner = name.rpartition(".")[0].split(".")
            paths = [".".join(owner[:end]) for end in range(1, len(owner) + 1)]
            kept = any(matches(path, pattern) for path in paths for pattern in keep)
            if parameter.requires_grad and not kept:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def unfreeze_backbone(self) -> None:
        """Lets those parameters be trained again whose training `freeze_backbone` stopped."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def _hook(self) -> None:
        """One hook on each target of any delta, and those of methods that need other ones."""
        self._list_acting()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if not self.attached:
            return
        modules = dict(self.backbone.named_modules())
        paths = {path for name in self.names() for path, _ in self[name].named_layers()}
        for path in sorted(paths):
            handle = modules[path].register_forward_hook(_Hook(self, path), with_kwargs=True)
            self._handles.append(handle)
        for name in self.names():
            self._handles += self[name].hooks(self, name)

    def acting(self) -> list[tuple[str, Tensor | None]]:
        """Names of the deltas that act now, each with the rows on which it does (None: all)."""
        if self._rows is None:
            return [(name, None) for name in self.active]
        return list(self._rows.items())

    def act(self, path: str, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """A target's output y as the deltas make it, of its input x. training: whether the target
        is in training mode, which its layers take over: model.eval() does not reach them.
        """
        if self._rows is not None:
            return self._act_on_rows(path, x, y, training)
        for name, layer in self._acting.get(path, ()):
            if layer.training != training:
                layer.train(training)
            changed = layer(x, y)
            if changed.shape != y.shape:
                raise _wrong_shape(path, name, y, changed)
            y = changed
        return y

    def _act_on_rows(self, path: str, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """`act` where each row has its own delta."""
        for name, rows in self.acting():
            layer = self[name].layer(path)
            if layer is None:
                continue
            layer.train(training)
            if x.size(0) != self._batch:
                raise ValueError(
                    f"{path}: {x.size(0)} rows in the batch, and rows() was given {self._batch}"
                )
            assert rows is not None
            rows = rows.to(x.device)
            changed = layer(x[rows], y[rows])
            if changed.shape[1:] != y.shape[1:]:
                raise _wrong_shape(path, name, y, changed)
            y = y.index_copy(0, rows, changed)
        return y

    def extra_repr(self) -> str:
        """The active deltas, for print()."""
        return f"active={', '.join(self.active) or 'none'}"


def _wrong_shape(path: str, name: str, y: Tensor, changed: Tensor) -> ValueError:
    """The error where an output was broadcast, as a loss (our head's output when it is given
    targets) would be.
    """
    return ValueError(
        f"{path}: its output is {tuple(y.shape)}, of which {name} makes {tuple(changed.shape)}"
    )


class _Hook:
    """The forward hook of one target."""

    def __init__(self, owner: Deltas, path: str) -> None:
        self.owner, self.path = owner, path

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(output, tuple):  # as attention modules of transformers return it
            return (self.owner.act(self.path, x, output[0], module.training), *output[1:])
        return self.owner.act(self.path, x, output, module.training)


class Tuned(nn.Module):
    """A backbone and its deltas as one module, for an optimizer or an engine that wants one."""

    def __init__(self, backbone: nn.Module, deltas: Deltas) -> None:
        super().__init__()
        self.backbone, self.deltas = backbone, deltas

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the backbone returns."""
        return self.backbone(*args, **kwargs)
