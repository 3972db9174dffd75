"""What code that others have put in place of a model's forward meets instead of its block lists.

The model's own code calls its blocks. Others may take them from the list and use their parts and
weights, without calling them: so a block is brought in as it is taken, and kept until the next one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch


class Swap(Protocol):
    """What brings blocks in, by the indices of their parts."""

    def enter_block(self, *indices: int) -> None: ...

    def leave_block(self, *indices: int) -> None: ...


class BlockList:
    """A block list whose members are brought in as they are taken."""

    def __init__(self, swap: Swap, modules: torch.nn.ModuleList, parts: Sequence[Sequence[int]]):
        self._swap = swap
        self._modules = modules
        self._parts = parts

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[torch.nn.Module]:
        for module, indices in zip(self._modules, self._parts, strict=True):
            self._swap.enter_block(*indices)
            try:
                yield module
            finally:
                self._swap.leave_block(*indices)

    def __getitem__(self, position):
        if isinstance(position, slice):
            return BlockList(self._swap, self._modules[position], self._parts[position])
        module, indices = self._modules[position], self._parts[position]
        self._swap.enter_block(*indices)
        self._swap.leave_block(*indices)
        return module

    def __getattr__(self, name: str):
        return getattr(self._modules, name)


class ListSite:
    """One block list of a model, which is a ``BlockList`` in passes that are ``foreign``.

    ``parts`` gives the indices that belong to each of its members, by their keys.
    """

    def __init__(
        self,
        swap: Swap,
        model: torch.nn.Module,
        path: str,
        parts: Mapping[str, Sequence[int]],
        foreign: Callable[[], bool],
    ):
        above, _, self._key = path.rpartition(".")
        self._swap = weakref.ref(swap)
        self._holder = weakref.ref(model.get_submodule(above))
        self._parts = dict(parts)
        self._foreign = foreign

    def enter(self) -> None:
        """A pass begins."""
        holder = self._holder()
        if holder is not None and self._foreign():
            modules = holder._modules[self._key]
            parts = [tuple(self._parts.get(key, ())) for key in modules._modules]
            holder.__dict__[self._key] = BlockList(self._swap(), modules, parts)

    def leave(self) -> None:
        """The pass is over."""
        holder = self._holder()
        if holder is not None and isinstance(holder.__dict__.get(self._key), BlockList):
            del holder.__dict__[self._key]
