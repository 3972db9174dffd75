"""What drives a swap: hooks that turn the calls of a model's own modules into passes and blocks.

A call of what holds blocks is a pass, a call of a block brings it in, a lookup in a table goes to
where the table is.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from .block_views import ListSite
from .module_calls import (
    CallSite,
    DividedSite,
    Site,
    Wrap,
    entry_methods,
    has_forward,
    methods_called_by,
)
from .packed_weights import Pack


class Swap(Protocol):
    """What is driven. ``calls`` names, for every block, the modules whose calls want it."""

    compute_device: torch.device
    repeats: bool
    calls: Sequence[Sequence[str]]
    tables: Mapping[str, Pack]
    wholes: Mapping[str, Sequence[int]]

    @property
    def in_pass(self) -> bool: ...

    def forward_pass(self, entry: str, shape: object = None) -> AbstractContextManager: ...

    def is_running(self, index: int) -> bool: ...

    def enter_block(self, *indices: int) -> None: ...

    def leave_block(self, *indices: int) -> None: ...

    def find_room(
        self, error: Exception, may_repeat: bool, untouched: Callable[[], bool]
    ) -> bool: ...


# Of a swap: what ``torch.compile`` has to keep out of.
_HIDDEN = ("enter_block", "leave_block", "_open", "_close")


def drive(
    swap: Swap, model: torch.nn.Module
) -> tuple[Callable[[], None], list[Site], list[ListSite]]:
    """Let ``model`` run through ``swap``.

    Returns the function that undoes it, where blocks are called, and where they are listed. Hooks
    are on instances, and hold them weakly: a model that nobody else holds dies.
    """
    _hide_from_dynamo(type(swap))
    driving = [True]  # empty once this is undone: an entry that others have kept only calls on
    holders = _holders(model, [*swap.wholes, *(name for names in swap.calls for name in names)])

    def site_of(name: str, *indices: int) -> CallSite:
        above = {type(model.get_submodule(path)) for path in holders if holds(path, name)}
        methods = methods_called_by(above, type(model.get_submodule(name)))
        return CallSite(model, name, methods, _wrap(_wanting, swap, driving, indices))

    sites = [[site_of(name, index) for name in names] for index, names in enumerate(swap.calls)]
    in_parts = {index for indices in swap.wholes.values() for index in indices}
    blocks: list[Site] = [
        s for index, own in enumerate(sites) if index not in in_parts for s in own
    ]
    for name, indices in swap.wholes.items():
        parts = [site for index in indices for site in sites[index]]
        blocks.append(DividedSite(parts, site_of(name, *indices)))
    entries: list[CallSite] = []

    def is_plain() -> bool:
        """Whether all of it is the model's own code: others may keep state across passes."""
        return all(site.is_plain for site in entries)

    for path, children in holders.items():
        methods = entry_methods(type(model.get_submodule(path)), children)
        wrap = _wrap(_opening, swap, driving, path, is_plain)
        entries.append(CallSite(model, path, methods, wrap))
    lookups = [
        CallSite(model, name, ["forward"], _wrap(_looking_up, swap, driving, pack))
        for name, pack in swap.tables.items()
    ]

    for site in (*blocks, *entries, *lookups):
        site.follow()

    def undo() -> None:
        driving.clear()
        for site in (*blocks, *entries, *lookups):
            site.detach()

    lists = [
        ListSite(swap, model, path, parts, lambda: not is_plain())
        for path, parts in _lists(swap, model).items()
    ]
    return undo, blocks, lists


def _lists(swap: Swap, model: torch.nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """The flat lists of blocks by name; for each the indices that belong to its members, by key."""
    names = {own[0]: (index,) for index, own in enumerate(swap.calls)} | dict(swap.wholes)
    lists: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, indices in names.items():
        path, _, key = name.rpartition(".")
        if isinstance(model.get_submodule(path), torch.nn.ModuleList):
            lists.setdefault(path, {})[key] = tuple(indices)
    return {
        path: parts
        for path, parts in lists.items()
        if path
        and not isinstance(model.get_submodule(path.rpartition(".")[0]), torch.nn.ModuleList)
    }


def _wrap(hook: Callable, swap: Swap, *args) -> Wrap:
    """Makes ``hook`` of a call. Sites belong to the swap, and must not hold it."""
    reference = weakref.ref(swap)
    return lambda call: functools.wraps(call)(hook(reference(), *args, call))


def _wanting(swap: Swap, driving: list[bool], indices: tuple[int, ...], call: Callable) -> Callable:
    """``call``, which wants a block, or all parts of one; outside of a pass it is one."""
    first = indices[0]

    def wanting(*args, **kwargs):
        if not driving or swap.is_running(first):
            return call(*args, **kwargs)
        with nullcontext() if swap.in_pass else swap.forward_pass(swap.calls[first][0]):
            swap.enter_block(*indices)
            try:
                return call(*args, **kwargs)
            finally:
                swap.leave_block(*indices)

    return wanting


def _looking_up(swap: Swap, driving: list[bool], table: Pack, call: Callable) -> Callable:
    """``call`` where its table is: rows travel, not the table."""

    def looking_up(*args, **kwargs):
        if not driving or table.device == swap.compute_device:
            return call(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(table.device), (args, kwargs))
        return call(*args, **kwargs).to(swap.compute_device)

    return looking_up


def _opening(
    swap: Swap, driving: list[bool], entry: str, is_plain: Callable[[], bool], call: Callable
) -> Callable:
    """``call`` as a pass, which runs again where it runs out of memory and room is made."""

    def opening(*args, **kwargs):
        if not driving:
            return call(*args, **kwargs)
        tensors = (a for a in (*args, kwargs.get("x")) if isinstance(a, torch.Tensor))
        shape = next((tensor.shape for tensor in tensors), None)
        eager = not torch.compiler.is_compiling()  # what is compiled as a whole fails as a whole
        given, begun = None, False
        while True:
            try:
                if given is None and swap.repeats and eager:
                    given = Contents(args, kwargs)
                begun = True
                with swap.forward_pass(entry, shape):
                    return call(*args, **kwargs)
            except Exception as error:
                # What the method computes is a function of its inputs: it can run again.
                own = is_plain() and not keeps_state(args, kwargs, not swap.in_pass)
                untouched = given.are_as_before if given else functools.partial(bool, not begun)
                if not swap.find_room(error, own and swap.repeats, untouched):
                    raise

    return opening


class Contents:
    """What the tensors of a call hold: some models write into them (Hunyuan-DiT, T5).

    Tensors of ``torch.inference_mode`` count no versions, and a copy of them all may not fit: so a
    hash of each is kept, which is computed behind what the device has to do, and read only where a
    call has failed. Tensors in objects, as in caches of keys and values, are looked at as well.
    """

    def __init__(self, args: tuple, kwargs: dict):
        options = kwargs.get("transformer_options")
        leaves = tree_leaves((args, kwargs))
        objects = tree_leaves((args, {k: v for k, v in kwargs.items() if v is not options}))
        inner = tree_leaves([vars(o) for o in objects if _may_hold_tensors(o)])
        self._tensors = [leaf for leaf in (*leaves, *inner) if isinstance(leaf, torch.Tensor)]
        self._before = [hash_of(tensor) for tensor in self._tensors]

    def are_as_before(self) -> bool:
        """Whether nothing was written; where that cannot be told, something may have been."""
        try:
            now = [hash_of(tensor) for tensor in self._tensors]
        except RuntimeError:  # no memory for it, or the device has more to complain of
            return False
        return all(map(torch.equal, now, self._before))


def _may_hold_tensors(argument: object) -> bool:
    """Whether an argument is an object of others, whose attributes a call may write into."""
    return hasattr(argument, "__dict__") and not isinstance(argument, (torch.nn.Module, type))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hash_of(tensor: torch.Tensor) -> torch.Tensor:
    """A number that tells of any change in the bits of a tensor: sums, weighted by position.

    Along the last dimension and across it, so that nothing as large as the tensor is allocated.
    """
    bits = tensor.detach()
    if bits.element_size() in _BITS:
        bits = bits.view(_BITS[bits.element_size()])
    else:
        bits = torch.view_as_real(bits).view(torch.int64)
    if bits.dim() < 2:
        bits = bits.reshape(1, -1)
    rows = bits.sum(dim=-1, dtype=torch.int64).flatten()
    columns = bits.sum(dim=tuple(range(bits.dim() - 1)), dtype=torch.int64)
    sums = torch.cat([rows, columns])
    return (sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum()


def keeps_state(args: tuple, kwargs: dict, outermost: bool) -> bool:
    """Whether a call writes into what it is given, or into what others wrap it with.

    Autoregressive models fill caches, a dictionary for every block, as they go; what wraps a
    forward (ComfyUI's ``wrappers`` of a diffusion model) counts the outermost calls; its wrappers
    of other things, EasyCache's and context windows' among them, lie above.
    """
    options = kwargs.get("transformer_options") or {}
    caches = (a for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple)))
    if any(isinstance(entry, dict) for cache in caches for entry in cache):
        return True
    wraps = (options.get("wrappers") or {}).get("diffusion_model")
    return "ar_state" in options or (outermost and bool(wraps))


def holds(path: str, name: str) -> bool:
    """Whether the module at ``path`` holds the one called ``name``, or is it."""
    return not path or name == path or name.startswith(f"{path}.")


def _holders(model: torch.nn.Module, names: Iterable[str]) -> dict[str, set[str]]:
    """The modules that hold those called ``names`` and can be called themselves, by their names.

    For each the names of those children whose calls, or loops over them, are parts of its pass.
    """
    holders: dict[str, set[str]] = {}
    wanted = set(names)
    for name in wanted:
        keys = name.split(".")
        for depth in range(len(keys)):
            path, child = ".".join(keys[:depth]), ".".join(keys[: depth + 1])
            if path in wanted or not has_forward(model.get_submodule(path)):
                continue
            children = holders.setdefault(path, set())
            if child in wanted or not has_forward(model.get_submodule(child)):
                children.add(keys[depth])
    return dict(sorted(holders.items()))


def _hide_from_dynamo(kind: type) -> None:
    """Keep ``torch.compile`` from tracing into the swap; blocks are compiled one by one.

    Only where something has imported it already: that takes seconds.
    """
    dynamo = sys.modules.get("torch._dynamo")
    for name in _HIDDEN:
        method = vars(kind)[name]
        if dynamo is not None and not hasattr(method, "_torchdynamo_disable"):
            setattr(kind, name, dynamo.disable(method))
