"""Packed weights: the tensors of some modules in one buffer on one device.

``Pack`` lays them out, moves them as a whole and hangs views of the buffer on the modules, tensor
subclasses that wrap others (fp8, nvfp4) or carry attributes (GGUF) included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import device_utils
from .device_utils import synchronize
from .page_locks import Need, PageLock, PageLocks

# Offsets in a pack: what CUDA's own allocations guarantee to kernels that load whole vectors.
ALIGNMENT = 256

# From this size on a moved pack has the heap trimmed, which takes milliseconds: glibc would keep
# what the weights had, on a load after the first all of the model.
TRIM_BYTES = 1 << 24


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Tensors made inside are no inference tensors, whatever mode the host runs in.

    ComfyUI loads and samples under ``torch.inference_mode()``; a tensor made there could be neither
    viewed nor wrapped in a ``Parameter`` by code outside of it.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True)
class _Leaf:
    """One plain tensor inside a weight, and where it lies in the pack."""

    offset: int  # bytes
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size

    def view_of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, eq=False)
class _Weight:
    """One tensor of a module: where it hangs, what it is made of, how to make it again."""

    table: dict[str, torch.Tensor | None]  # the module's _parameters or _buffers
    name: str
    leaves: tuple[_Leaf, ...]
    build: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    attributes: tuple[str, ...]  # what goes with the weight, whichever view of it hangs

    @classmethod
    def of(cls, table: dict[str, torch.Tensor | None], name: str, offset: int) -> _Weight:
        """Lay out ``table[name]`` from ``offset`` on, every leaf aligned."""
        tensor = table[name]
        leaves = []
        for leaf in _leaves_of(tensor):
            leaves.append(_Leaf(offset, leaf.nbytes, leaf.dtype, leaf.shape))
            offset += -(-leaf.nbytes // ALIGNMENT) * ALIGNMENT
        attributes = tuple(vars(tensor)) if _carries_attributes(tensor) else ()
        return cls(table, name, tuple(leaves), _builder(tensor), attributes)

    @property
    def end(self) -> int:
        """The first aligned offset behind this weight."""
        return max(-(-(leaf.offset + leaf.nbytes) // ALIGNMENT) for leaf in self.leaves) * ALIGNMENT

    def view_of(self, flat: torch.Tensor) -> torch.Tensor:
        """This weight in ``flat``, a buffer laid out like the pack."""
        return self.build([leaf.view_of(flat) for leaf in self.leaves])

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` has the layout of this weight."""
        layout = [(leaf.dtype, leaf.shape) for leaf in self.leaves]
        return [(leaf.dtype, leaf.shape) for leaf in _leaves_of(tensor)] == layout

    def write(self, tensor: torch.Tensor, flat: torch.Tensor) -> None:
        """Copy ``tensor``, of this weight's kind, into ``flat``."""
        for leaf, source in zip(self.leaves, _leaves_of(tensor), strict=True):
            leaf.view_of(flat).copy_(source)

    def hang(self, view: torch.Tensor) -> None:
        """Put ``view`` in the module's table, with the attributes of what hung there."""
        if self.attributes:
            source = vars(self.table[self.name])
            vars(view).update((name, source[name]) for name in self.attributes if name in source)
        self.table[self.name] = view


def _is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor wraps others, as ComfyUI's ``QuantizedTensor`` does its data and scales."""
    return hasattr(type(tensor), "__tensor_flatten__")


def _carries_attributes(tensor: torch.Tensor) -> bool:
    """Whether a tensor is plain memory of a class of its own, as ComfyUI-GGUF's ``GGMLTensor``."""
    plain = (torch.Tensor, torch.nn.Parameter, type(torch.empty(0, device=tensor.device)))
    return type(tensor) not in plain and not _is_wrapper(tensor)


def _leaves_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor consists of."""
    if _is_wrapper(tensor):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [tensor.as_subclass(torch.Tensor)] if _carries_attributes(tensor) else [tensor]


def _builder(tensor: torch.Tensor) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """The function that makes a tensor like ``tensor`` of other leaves."""
    kind, is_parameter = type(tensor), isinstance(tensor, torch.nn.Parameter)

    if _is_wrapper(tensor):
        names, context = tensor.__tensor_flatten__()
        size, stride = tensor.size(), tensor.stride()
        # Its own operations make further wrappers in the mode they run in, so it has to be of the
        # mode that the host made it in; the tensors inside are ordinary all the same.
        inference = tensor.is_inference()

        def build(leaves):
            inner = dict(zip(names, leaves, strict=True))
            with torch.inference_mode(inference):
                view = kind.__tensor_unflatten__(inner, context, size, stride)
            if is_parameter:
                # Parameter() would detach it, and so clone the scales out of the buffer.
                view._is_param = True
            return view

    elif _carries_attributes(tensor):
        attributes = dict(vars(tensor))  # being a Parameter is one of them

        def build(leaves):
            view = leaves[0].as_subclass(kind)
            vars(view).update(attributes)
            return view

    else:

        def build(leaves):
            return torch.nn.Parameter(leaves[0], requires_grad=False) if is_parameter else leaves[0]

    return build


def _has_own_ram(leaf: torch.Tensor) -> bool:
    """Whether a plain tensor lies in memory that this process has allocated, not in a file's."""
    return leaf.device.type == "cpu" and leaf.untyped_storage().resizable()


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a weight in memory of its own, which ``clone`` or ``to`` may not give."""
    with ordinary_tensors():
        return _builder(tensor)([leaf.clone() for leaf in _leaves_of(tensor)])


@dataclass(frozen=True, eq=False)
class _Buffer:
    """A packed buffer, and the weights as views of it."""

    flat: torch.Tensor
    views: tuple[torch.Tensor, ...]


class Pack:
    """All parameters and buffers of some modules in one contiguous buffer on one device.

    The modules' tensors are views of the buffer, so one copy moves them all. ``nbytes`` includes
    the padding between tensors; ``flat`` is the uint8 buffer and ``views`` are the tensors in it,
    both empty before the first ``place``. A pack on an accelerator may keep a copy in host memory,
    its home, which it goes back to without copying anything.
    """

    def __init__(self, weights: Sequence[_Weight], nbytes: int):
        self._weights = tuple(weights)
        self._foreign: set[int] = set()  # weights that others hold in another tensor, by index
        self._hung: tuple[torch.Tensor, ...] = ()  # the views that hang on the modules
        self._lock: PageLock | None = None
        self._unlock: weakref.finalize | None = None
        self._home: _Buffer | None = None
        self.nbytes = nbytes
        self.flat: torch.Tensor | None = None
        self.views: tuple[torch.Tensor, ...] = ()

    @classmethod
    def layout(
        cls,
        modules: Iterable[torch.nn.Module],
        wanted: Callable[[torch.Tensor], bool] = lambda _: True,
    ) -> Pack:
        """Lay out the ``wanted`` tensors that hang directly on ``modules``.

        Nothing is allocated or moved.
        """
        weights: list[_Weight] = []
        offsets: dict[int, int] = {}  # tied tensors share one place
        end = 0
        for module in modules:
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None or not wanted(tensor):
                        continue
                    offset = offsets.setdefault(id(tensor), end)
                    weights.append(_Weight.of(table, name, offset))
                    end = max(end, weights[-1].end)
        return cls(weights, end)

    @property
    def device(self) -> torch.device | None:
        """Where the packed weights live; ``None`` before the first ``place``."""
        return None if self.flat is None else self.flat.device

    @property
    def locked(self) -> bool:
        """Whether what there is of it in host memory is page-locked."""
        return self._lock is not None and self._lock.held

    @property
    def home_bytes(self) -> int:
        """Bytes of host memory that a pack on an accelerator has as its home."""
        return 0 if self._home is None else self.nbytes

    def missing_ram(self) -> int:
        """Bytes of RAM that it takes to have it there: none where its weights are there already.

        Weights that are still pages of a file (GGUF, quantised layers) are copied.
        """
        if self._home is not None or (self.flat is not None and self.flat.device.type == "cpu"):
            return 0
        if self.flat is not None:
            return self.nbytes
        weights = (weight.table[weight.name] for weight in self._weights)
        leaves = (leaf for weight in weights for leaf in _leaves_of(weight))
        return sum(leaf.nbytes for leaf in leaves if not _has_own_ram(leaf))

    def place(self, device: torch.device, keep_home: bool = False) -> None:
        """Move the weights to ``device``, packing them if they are not yet packed.

        The memory they had is free afterwards, but for the home that ``keep_home`` asks for, and
        the copy is complete when this returns.
        """
        if self.device == device:
            return
        if self._home is not None and self._home.flat.device == device:
            self.flat, self.views = self._home.flat, self._home.views
            self._home = None
            self.point(self.views)
            return
        if keep_home and self.flat is None:
            self.place(torch.device("cpu"))
        home = self._home
        if home is None and keep_home and self.flat.device.type == "cpu":
            home = _Buffer(self.flat, self.views)
        with ordinary_tensors():
            flat = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
            views = self.views_of(flat)
            if self.flat is not None:
                flat.copy_(self.flat)
            else:
                for weight in self._weights:
                    weight.write(weight.table[weight.name], flat)
        # From one donor to another, the copy is ordered before no stream that will read it.
        synchronize(device)
        if home is None or not keep_home:
            self.unlock()
            home = None
        self.flat, self.views, self._home = flat, views, home
        self.point(views)
        if self.nbytes >= TRIM_BYTES:
            device_utils.trim_host_heap()

    def forget_home(self) -> None:
        """Free the home of a pack on an accelerator, which others are about to write to."""
        if self._home is not None:
            self.unlock()
            self._home = None

    def lock(self, locks: PageLocks, need: Need, settle: Callable[[], None]) -> bool:
        """Page-lock what there is of it in host memory, until it is freed or unlocked.

        Returns whether it is page-locked; where it is not, copies are correct but slower.
        ``settle`` waits for the copies that may read it, without holding this pack.
        """
        in_ram = self.flat if self._home is None else self._home.flat
        if self.locked:
            self._lock.need = need
        elif in_ram.device.type == "cpu":
            self.unlock()
            self._lock = locks.lock(in_ram, need, settle)
            if self._lock is not None:
                self._unlock = weakref.finalize(self, self._lock.release)
                self._unlock.atexit = False
        return self.locked

    def need(self, need: Need) -> None:
        """Say how much the page-lock is needed, where there is one."""
        if self._lock is not None:
            self._lock.need = need

    def unlock(self) -> None:
        """Undo ``lock``."""
        if self._unlock is not None:
            self._unlock()
        self._lock = self._unlock = None

    def views_of(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of the modules as views of ``flat``, a buffer of ``nbytes`` bytes or more."""
        with ordinary_tensors():
            tied: dict[tuple[_Leaf, ...], torch.Tensor] = {}
            return tuple(
                tied.setdefault(weight.leaves, weight.view_of(flat)) for weight in self._weights
            )

    def point(self, views: Sequence[torch.Tensor]) -> None:
        """Hang ``views`` on the modules.

        What a model has hung there itself, as a buffer that grows with its inputs, stays.
        """
        hung = self._hung or (None,) * len(self._weights)
        for index, (weight, view) in enumerate(zip(self._weights, views, strict=True)):
            if hung[index] is not None and weight.table[weight.name] is not hung[index]:
                self._foreign.add(index)
            if index not in self._foreign:
                weight.hang(view)
        self._hung = tuple(views)

    @property
    def is_hung(self) -> bool:
        """Whether the modules have the packed weights, where these lie."""
        return all(
            index in self._foreign or weight.table[weight.name].device == self.device
            for index, weight in enumerate(self._weights)
        )

    def hang_again(self) -> None:
        """Hang the packed weights on the modules, which others have moved away."""
        self.views = self.views_of(self.flat)
        for index, (weight, view) in enumerate(zip(self._weights, self.views, strict=True)):
            if index not in self._foreign:
                weight.hang(view)
        self._hung = self.views

    def move_foreign(self, device: torch.device) -> None:
        """Move what hangs on the modules and is not packed."""
        for index in self._foreign:
            table, name = self._weights[index].table, self._weights[index].name
            tensor = table[name]
            if tensor is not None and tensor.device != device:
                moved = tensor.detach().to(device)
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                table[name] = torch.nn.Parameter(moved, False) if is_parameter else moved

    def absorb(self) -> int:
        """Take over what others have hung on the modules instead: its values belong here now.

        A tensor that does not fit the place (a LoRA may widen a weight) stays where it hangs until
        one that fits takes its turn. Returns the bytes of those.
        """
        with ordinary_tensors():
            for index, (weight, view) in enumerate(zip(self._weights, self.views, strict=True)):
                tensor = weight.table[weight.name]
                if tensor is view:
                    continue
                if weight.fits(tensor):
                    weight.write(tensor, self.flat)
                    if self._home is not None:
                        weight.write(tensor, self._home.flat)
                    weight.hang(view)
                    self._foreign.discard(index)
                else:
                    self._foreign.add(index)
        return sum(self._weights[i].table[self._weights[i].name].nbytes for i in self._foreign)
