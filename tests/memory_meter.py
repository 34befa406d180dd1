"""Counts the bytes of all tensors that PyTorch makes, real or fake, as they come and go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """While entered: `live` bytes of the storages that operations have made and that still are,
    and the `peak` that this has reached."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        before = {id(each) for each in _storages((args, kwargs or {}))}
        found = func(*args, **kwargs or {})
        for storage in _storages(found):
            if id(storage) not in before:
                self._count(storage)
        return found

    def _count(self, storage: Any) -> None:
        key = id(storage)
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storages(values: Any) -> Iterator[Any]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            yield value.untyped_storage()


class Saved(saved_tensors_hooks):
    """While entered: what the graph keeps for its backward pass beside the model's own tensors, in
    `bytes`, each storage once."""

    def __init__(self, model: nn.Module) -> None:
        own = [*model.parameters(), *model.buffers()]
        self._sizes = {each.untyped_storage().data_ptr(): 0 for each in own}
        self._kept: list[Tensor] = []  # lest a storage be freed and its address given to another
        super().__init__(self._note, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._sizes.setdefault(storage.data_ptr(), storage.nbytes())
        self._kept.append(tensor)
        return tensor
