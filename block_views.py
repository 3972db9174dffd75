"""What a model meets in place of its own blocks inside a pass, and where it meets them.

The views bring a block in when the model's own code takes it, and release it afterwards.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from .donor_link import Use


class Swap(Protocol):
    """What brings blocks in, by their index, and releases them."""

    def acquire(self, index: int) -> Use | None: ...

    def release(self, use: Use | None) -> None: ...


class BlockList:
    """What a model's block list is inside a pass: the same modules, brought in as they are taken.

    A loop holds one block at a time; a block taken by index is held until the next one is.
    """

    def __init__(self, swap: Swap, modules: torch.nn.ModuleList, indices: Sequence[int]):
        self._swap = swap
        self._modules = modules
        self._indices = indices
        self._taken: Use | None = None

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[torch.nn.Module]:
        for position, index in enumerate(self._indices):
            use = self._swap.acquire(index)
            try:
                yield self._modules[position]
            finally:
                self._swap.release(use)

    def __getitem__(self, position):
        if isinstance(position, slice):
            return BlockList(self._swap, self._modules[position], self._indices[position])
        module = self._modules[position]
        self._swap.release(self._taken)
        self._taken = self._swap.acquire(self._indices[position])
        return module

    def __getattr__(self, name: str):
        return getattr(self._modules, name)


class SwappedModule:
    """What a swapped module is inside a pass: the same, brought in for each call."""

    def __init__(self, swap: Swap, module: torch.nn.Module, index: int):
        self._swap = swap
        self._module = module
        self._index = index

    def __call__(self, *args, **kwargs):
        use = self._swap.acquire(self._index)
        try:
            return self._module(*args, **kwargs)
        finally:
            self._swap.release(use)

    def __getattr__(self, name: str):
        return getattr(self._module, name)


def entry_points(model_class: type, lists: Iterable[str]) -> list[str]:
    """``forward`` and every method of the class whose code names one of ``lists``."""
    names = {"forward"}
    for cls in model_class.__mro__:
        for name, member in vars(cls).items():
            if name.startswith("__") or not isinstance(member, types.FunctionType):
                continue
            if not set(lists).isdisjoint(member.__code__.co_names):
                names.add(name)
    return sorted(names)
