"""What a forward pass really keeps, and what it really calls."""

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Storages(TorchDispatchMode):
    """Remembers the storage of every tensor that an operation makes, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                ref = storage_of(tensor)
                if ref not in given:  # else a view of something older, a parameter perhaps
                    self.made[ref] = tensor.untyped_storage().nbytes()
        return result


def storage_of(tensor: Tensor) -> StorageWeakRef:
    """The identity of a tensor's memory, which does not keep it alive."""
    return StorageWeakRef(tensor.untyped_storage())


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of floating-point tensors that live only because the result may be differentiated;
    without the result itself, and views counted once.
    """
    with _Storages() as storages:
        result = forward()
    gc.collect()
    own = storage_of(result)
    return sum(size for ref, size in storages.made.items() if not ref.expired() and ref != own)


class Calls(TorchDispatchMode):
    """Counts operators by name, as "lpa::norm_down"."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))
