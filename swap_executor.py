"""The run time of a split: packed weights, slots, and the order of copies and computation.

Knows torch modules, not ComfyUI. ``Pack`` keeps the weights of some modules in one buffer on one
device; ``BlockSwap`` runs a model whose blocks live on several devices by copying swapped blocks
into slots on the compute device, one ahead of the computation.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from . import device_utils
from .device_utils import stream_module, synchronize

logger = logging.getLogger("MultiGPU")

# Offsets in a pack: what CUDA's own allocations guarantee to kernels that load whole vectors.
ALIGNMENT = 256

# From this size on a moved pack has the heap trimmed, which takes milliseconds: glibc would keep
# what the weights had, on a load after the first all of the model.
TRIM_BYTES = 1 << 24

# What pageable homes go through: at 25 GB/s a chunk is on the bus for less than a millisecond.
CHUNK_BYTES = 1 << 24
RING_CHUNKS = 4

_passes = threading.local()


def pass_device() -> torch.device | None:
    """The compute device of the pass that this thread is in; ``None`` outside of any."""
    devices = getattr(_passes, "devices", ())
    return devices[-1] if devices else None


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
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


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a weight in memory of its own, which ``clone`` or ``to`` may not give."""
    with _ordinary_tensors():
        return _builder(tensor)([leaf.clone() for leaf in _leaves_of(tensor)])


@dataclass(frozen=True)
class PassTime:
    """What a timed pass took, in seconds.

    ``total`` from its first to its last computation, ``waiting`` of that for copies to arrive;
    ``copies`` are the donors, bytes and seconds of the copies that were queued in it.
    """

    total: float
    waiting: float
    copies: tuple[tuple[torch.device, int, float], ...]


class _PassTimer:
    """Events around a pass, its waits and its copies; the host waits for none of them."""

    def __init__(self, device: torch.device):
        self._module = stream_module(device)
        self._device = device
        self._waits: list[tuple] = []
        self._copies: list[tuple] = []
        self._start = self._mark()
        self._end = None

    def _mark(self, stream=None):
        event = self._module.Event(enable_timing=True)
        event.record(self._module.current_stream(self._device) if stream is None else stream)
        return event

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Around what makes the computation wait."""
        before = self._mark()
        yield
        self._waits.append((before, self._mark()))

    @contextmanager
    def copy(self, donor: torch.device, nbytes: int, stream) -> Iterator[None]:
        """Around what is queued on the copy stream for one block."""
        before = self._mark(stream)
        yield
        self._copies.append((donor, nbytes, before, self._mark(stream)))

    @property
    def running(self) -> bool:
        return self._end is None

    def stop(self) -> None:
        """The pass is complete."""
        self._end = self._mark()

    def result(self) -> PassTime | None:
        """What it took; ``None`` while that is not over on the device."""
        copies = tuple(self._copies)  # a worker may still add to them
        events = [self._end, *(after for *_, after in copies)]
        if not all(event.query() for event in events):
            return None

        def seconds(before, after) -> float:
            return before.elapsed_time(after) / 1000

        return PassTime(
            seconds(self._start, self._end),
            sum(seconds(*wait) for wait in self._waits),
            tuple((donor, n, seconds(before, after)) for donor, n, before, after in copies),
        )


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
        self._foreign: set[int] = set()  # weights that others hold in another shape, by index
        self._unlock: weakref.finalize | None = None
        self._home: _Buffer | None = None
        self.nbytes = nbytes
        self.flat: torch.Tensor | None = None
        self.views: tuple[torch.Tensor, ...] = ()

    @classmethod
    def layout(cls, modules: Iterable[torch.nn.Module]) -> Pack:
        """Lay out the tensors that hang directly on ``modules``; nothing is allocated or moved."""
        weights: list[_Weight] = []
        offsets: dict[int, int] = {}  # tied tensors share one place
        end = 0
        for module in modules:
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None:
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
        return self._unlock is not None

    @property
    def home_bytes(self) -> int:
        """Bytes of host memory that a pack on an accelerator has as its home."""
        return 0 if self._home is None else self.nbytes

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
        with _ordinary_tensors():
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

    def lock(
        self,
        pin: Callable[[torch.Tensor], bool],
        unpin: Callable[[torch.Tensor], object],
    ) -> bool:
        """Page-lock the buffer in host memory with the host's ``pin``, until it is freed.

        Returns whether it is page-locked; where ``pin`` refuses, copies are correct but slower.
        """
        in_ram = self.flat if self._home is None else self._home.flat
        if self._unlock is None and in_ram.device.type == "cpu" and pin(in_ram):
            self._unlock = weakref.finalize(self, unpin, in_ram)
            self._unlock.atexit = False
        return self.locked

    def unlock(self) -> None:
        """Undo ``lock``."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def views_of(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of the modules as views of ``flat``, a buffer of ``nbytes`` bytes or more."""
        with _ordinary_tensors():
            tied: dict[tuple[_Leaf, ...], torch.Tensor] = {}
            return tuple(
                tied.setdefault(weight.leaves, weight.view_of(flat)) for weight in self._weights
            )

    def point(self, views: Sequence[torch.Tensor]) -> None:
        """Hang ``views`` on the modules."""
        for index, (weight, view) in enumerate(zip(self._weights, views, strict=True)):
            if index not in self._foreign:
                weight.hang(view)

    def absorb(self) -> int:
        """Take over what others have hung on the modules instead: its values belong here now.

        A tensor that does not fit the place (a LoRA may widen a weight) stays where it hangs until
        one that fits takes its turn. Returns the bytes of those.
        """
        with _ordinary_tensors():
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


class _Ring:
    """A small page-locked buffer that pageable homes pass through, chunk by chunk.

    A copy from pageable memory would block the host. Here a worker thread fills one chunk while
    the chunks before it are on the bus, and only the worker waits.
    """

    def __init__(self, buffer: torch.Tensor):
        self._chunks = [[chunk, None] for chunk in buffer.chunk(RING_CHUNKS)]
        self._next = 0
        self._worker = ThreadPoolExecutor(1, "block-swap")
        self._last: Future | None = None

    @classmethod
    def make(cls) -> _Ring | None:
        """A ring, or ``None`` where this machine gives no page-locked memory."""
        with _ordinary_tensors():
            buffer = device_utils.page_locked(CHUNK_BYTES * RING_CHUNKS)
            return None if buffer is None else cls(buffer)

    def submit(self, copy: Callable[[], None], owner: object) -> Future:
        """Have the worker run ``copy``, after what was submitted before; ``owner`` lives on."""
        self._last = self._worker.submit(lambda _: copy(), owner)
        return self._last

    def finish(self) -> None:
        """Wait for all that was submitted.

        Once the owner is dead nothing is left to wait for: a finalizer may run in the worker, or in
        the middle of a ``submit``, and must neither wait there nor submit anything.
        """
        if self._last is not None:
            wait([self._last])

    def copy(self, home: torch.Tensor, target: torch.Tensor, stream, new_event) -> None:
        """Queue the copy of ``home`` to ``target`` on ``stream``, the current one."""
        size = self._chunks[0][0].nbytes
        for start in range(0, home.nbytes, size):
            slice_ = home[start : start + size]
            entry = self._chunks[self._next]
            self._next = (self._next + 1) % len(self._chunks)
            chunk, left = entry
            if left is not None:
                left.synchronize()
            part = chunk[: slice_.nbytes]
            part.copy_(slice_)
            target[start : start + size].copy_(part, non_blocking=True)
            entry[1] = new_event()
            entry[1].record(stream)


class _Link:
    """The way from one donor to the compute device, with a copy stream of its own.

    Between two accelerators that is a stream on each: a peer copy runs after the streams that are
    current on both of its devices, so both have to be the link's.
    """

    def __init__(self, donor: torch.device, compute: torch.device):
        self._module = stream_module(compute)
        self._streams = []
        self._contexts = []
        for device in (donor, compute):
            module = stream_module(device)
            if module is not None:
                self._streams.append(module.Stream(device=device))
                self._contexts.append(module.stream)

    @functools.cached_property
    def _ring(self) -> _Ring | None:
        return _Ring.make()

    def is_staged(self, pack: Pack) -> bool:
        """Whether ``pack`` goes through the ring: it is in host memory that is not page-locked."""
        pageable = pack.device.type == "cpu" and not pack.locked and self._module is not None
        return pageable and self._ring is not None

    def copy(
        self,
        pack: Pack,
        target: torch.Tensor,
        slot: _Slot,
        timer: _PassTimer | None,
        owner: object,
    ) -> None:
        """Queue the copy of ``pack`` to ``target`` in ``slot``, after the slot's last reader.

        ``owner`` outlives it, and with it the slot.
        """
        slot.await_queued()
        if self.is_staged(pack):
            copy = functools.partial(self._queue, pack.flat, target, slot, timer, self._ring)
            slot.queued = self._ring.submit(copy, owner)
        else:
            self._queue(pack.flat, target, slot, timer)

    def _queue(
        self,
        home: torch.Tensor,
        target: torch.Tensor,
        slot: _Slot,
        timer: _PassTimer | None,
        ring: _Ring | None = None,
    ) -> None:
        with _ordinary_tensors(), ExitStack() as stack:
            for context, stream in zip(self._contexts, self._streams, strict=True):
                stack.enter_context(context(stream))
            if slot.released is None:
                target.copy_(home)
                return
            arrival_stream = self._streams[-1]
            # The last block may have come over another link and never have been used.
            arrival_stream.wait_event(slot.arrived)
            arrival_stream.wait_event(slot.released)
            if timer is not None:
                stack.enter_context(timer.copy(home.device, home.nbytes, arrival_stream))
            if ring is None:
                target.copy_(home, non_blocking=True)
            else:
                ring.copy(home, target, arrival_stream, self._module.Event)
            slot.arrived.record(arrival_stream)

    def synchronize(self) -> None:
        """Wait for every copy on its way; what failed in the worker has failed for its slot."""
        ring = vars(self).get("_ring")
        if ring is not None:
            ring.finish()
        for stream in self._streams:
            stream.synchronize()


class _Slot:
    """A buffer on the compute device that swapped blocks are copied into in turn.

    ``arrived`` and ``released`` are the events that order the copy stream and the compute stream;
    ``None`` on a device without streams, where every copy is complete when it returns. ``queued``
    is the work of another thread that queues the copy, where there is one.
    """

    def __init__(self, nbytes: int, device: torch.device):
        with _ordinary_tensors():
            self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.block: int | None = None
        self.queued: Future | None = None
        self.uses: set[_Use] = set()
        self.views: dict[int, tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = {}
        self._module = stream_module(device)
        self._device = device
        self.arrived = self.released = None
        if self._module is not None:
            self.arrived, self.released = self._module.Event(), self._module.Event()
            # The allocator may hand out memory that the compute stream has still to finish with.
            self.record_release()

    def await_queued(self) -> None:
        """Wait until the copy is queued; raises what went wrong with that."""
        if self.queued is not None:
            queued, self.queued = self.queued, None
            try:
                queued.result()
            except BaseException:
                self.block = None
                raise

    def await_arrival(self) -> None:
        """Let the computation wait for the copy."""
        self.await_queued()
        if self.arrived is not None:
            self._module.current_stream(self._device).wait_event(self.arrived)

    def record_release(self) -> None:
        if self.released is not None:
            self.released.record(self._module.current_stream(self._device))


class _Use:
    """One use of a swapped block in a slot, from ``acquire`` to ``release``."""

    __slots__ = ("pack", "slot")

    def __init__(self, pack: Pack, slot: _Slot):
        self.pack = pack
        self.slot = slot


class BlockSwap:
    """Runs the blocks of one model on ``compute_device``, wherever their homes are.

    ``packs`` holds one ``Pack`` per block in execution order, ``lists`` names the model's block
    lists and gives, for each of their modules, the index of its pack. ``embeddings`` names modules
    of the model that run before the blocks and are called as a whole, and gives the index of their
    packs. ``update`` and ``allocate_slots`` come before the first pass.

    Inside a pass the model's own loop drives the swap: the block lists are views that bring a
    block in, yield it, and release it when the loop comes back; so are swapped embeddings, around
    their call. Nothing swapped travels back, and after a pass, however it ends, every tensor is at
    home.

    """

    def __init__(
        self,
        compute_device: torch.device,
        packs: Sequence[Pack],
        lists: Mapping[str, Sequence[int]],
        embeddings: Mapping[str, int] | None = None,
    ):
        self.compute_device = compute_device
        self._slots_wanted = 0
        self._packs = tuple(packs)
        self._lists = dict(lists)
        self._embeddings = dict(embeddings or {})
        self._slots: list[_Slot] = []
        self._links: dict[torch.device, _Link] = {}
        self._swapped: frozenset[int] = frozenset()
        self._order: list[int] = []
        self._trace: list[int] = []
        self._cursor = 0
        self._depth = 0
        self._on_pass_time: Callable[[PassTime], None] | None = None
        self._passes: Counter = Counter()  # by the shape of their inputs
        self._timer: _PassTimer | None = None
        self._views: dict[str, BlockList | _SwappedModule] = {}
        # Slots and homes must outlive the copies that are still on their way.
        finalizer = weakref.finalize(self, _drain, self._links)
        finalizer.atexit = False

    # -- placement ---------------------------------------------------------------------------

    def update(self, slots: int) -> None:
        """Take the packs as they lie now, to be swapped through up to ``slots`` slots.

        To be called after packs were moved, for which the copies had to be settled. Slots that are
        too many, or of another size, are freed.
        """
        self._slots_wanted = slots
        self._timer = None
        first = list(self._embeddings.values())
        execution = first + [i for i in range(len(self._packs)) if i not in first]
        self._order = [i for i in execution if self._packs[i].device != self.compute_device]
        self._swapped = frozenset(self._order)
        if any(slot.buffer.nbytes != self._block_bytes() for slot in self._slots):
            self._slots.clear()
        del self._slots[slots:]

    def allocate_slots(self) -> None:
        """Allocate the slots that are missing; none are needed where every block is resident."""
        while len(self._slots) < min(self._slots_wanted, len(self._swapped)):
            self._slots.append(_Slot(self._block_bytes(), self.compute_device))

    def _block_bytes(self) -> int:
        return max((self._packs[index].nbytes for index in self._swapped), default=0)

    def settle(self) -> None:
        """Wait for every copy on its way and forget what the slots hold.

        To be called before homes are moved: no slot may keep a copy of what they were.
        """
        _drain(self._links)
        for slot in self._slots:
            slot.block = slot.queued = None

    @contextmanager
    def writing_homes(self) -> Iterator[None]:
        """Homes may be written inside: no copy reads them meanwhile, and later ones see it all."""
        self.settle()
        try:
            yield
        finally:
            for device in {pack.device for pack in self._packs} - {None}:
                synchronize(device)

    def count_staged(self) -> int:
        """How many swapped blocks lie in host memory that is not page-locked, and are staged."""
        swapped = [self._packs[index] for index in self._order]
        return sum(self._link(pack).is_staged(pack) for pack in swapped)

    def drop_slots(self) -> int:
        """Free the slots and return their bytes. The next pass allocates them anew."""
        self.settle()
        freed = self.slot_bytes
        self._slots.clear()
        self._links.clear()
        return freed

    @property
    def slot_bytes(self) -> int:
        """Bytes that the slots hold on the compute device now."""
        return sum(slot.buffer.nbytes for slot in self._slots)

    # -- a pass ------------------------------------------------------------------------------

    def drive(self, model: torch.nn.Module) -> Callable[[], None]:
        """Let ``model`` run through this swap; returns the function that undoes it.

        Its ``forward``, and every other method that loops over the block lists, opens a pass.
        The wrappers sit on the instance and hold it weakly: a model that nobody else holds dies.
        """
        _hide_from_dynamo()
        reference = weakref.ref(model)
        names = _entry_points(type(model), {*self._lists, *self._embeddings})
        before = {name: model.__dict__[name] for name in names if name in model.__dict__}
        driving = [True]
        entries = {
            name: self._entry(reference, getattr(type(model), name), before.get(name), driving)
            for name in names
        }
        model.__dict__.update(entries)

        def undo() -> None:
            # What others have put over an entry since is theirs; an entry that they have kept to
            # put back later only calls what it replaced.
            driving.clear()
            instance = reference()
            for name, entry in entries.items():
                if instance is not None and instance.__dict__.get(name) is entry:
                    del instance.__dict__[name]
                    if name in before:
                        instance.__dict__[name] = before[name]

        return undo

    def _entry(
        self,
        reference: weakref.ref,
        method: Callable,
        replaced: Callable | None,
        driving: list[bool],
    ) -> Callable:
        @functools.wraps(method)
        def entry(*args, **kwargs):
            model = reference()
            shape = next((a.shape for a in args if isinstance(a, torch.Tensor)), None)
            with self.forward_pass(model, shape) if driving else nullcontext():
                if replaced is not None:
                    return replaced(*args, **kwargs)
                return method(model, *args, **kwargs)

        return entry

    @contextmanager
    def forward_pass(self, model: torch.nn.Module, shape: object = None) -> Iterator[None]:
        """One forward pass of ``model``. Nested passes belong to the outermost.

        Passes of one ``shape`` take one time.
        """
        if self._depth == 0:
            self._open(model, shape)
        self._depth += 1
        devices = vars(_passes).setdefault("devices", [])
        devices.append(self.compute_device)
        completed = False
        try:
            yield
            completed = True
        finally:
            devices.pop()
            self._depth -= 1
            if self._depth == 0:
                self._close(model, completed)

    def _open(self, model: torch.nn.Module, shape: object) -> None:
        self._report_time()
        self.allocate_slots()
        self._count_pass(shape)
        self._trace = []
        self._cursor = 0
        self._views = {
            name: BlockList(self, model._modules[name], indices)
            for name, indices in self._lists.items()
        }
        for name, index in self._embeddings.items():
            if index in self._swapped:
                self._views[name] = _SwappedModule(self, model._modules[name], index)
        model.__dict__.update(self._views)

    def _close(self, model: torch.nn.Module, completed: bool) -> None:
        for name in self._views:
            model.__dict__.pop(name, None)
        self._views = {}
        for slot in self._slots:
            for use in list(slot.uses):
                self.release(use)
        self._cursor = 0
        if self._running_timer is not None:
            if completed:
                self._timer.stop()
            else:
                self._timer = None
        if completed:
            # A pass that skips blocks keeps the order, one that runs them otherwise teaches it.
            if not _is_subsequence(self._trace, self._order):
                self._order = self._trace
            self._prefetch()

    @property
    def _running_timer(self) -> _PassTimer | None:
        return self._timer if self._timer is not None and self._timer.running else None

    def time_passes(self, on_pass_time: Callable[[PassTime], None] | None) -> None:
        """Call ``on_pass_time`` with what the second pass took, once for every shape of inputs.

        It is called between passes, and may move packs. The first pass of a shape warms up what it
        runs through.
        """
        self._on_pass_time = on_pass_time
        self._passes.clear()
        self._timer = None

    def _count_pass(self, shape: object) -> None:
        self._passes[shape] += 1
        wanted = self._passes[shape] == 2 and self._on_pass_time is not None
        if wanted and self._timer is None and stream_module(self.compute_device) is not None:
            with self._timing():
                self._timer = _PassTimer(self.compute_device)

    def _report_time(self) -> None:
        """Tell what the timed pass took, once that is over on the device too."""
        timer, self._timer = self._timer, None
        if timer is None:
            return
        with self._timing():
            result = timer.result()
            if result is None:
                self._timer = timer
            else:
                self._on_pass_time(result)

    @contextmanager
    def _timing(self) -> Iterator[None]:
        """Inside, an error ends the timing and never the run: not every backend can be timed."""
        try:
            yield
        except Exception as error:
            logger.warning(f"[MultiGPU] block swap: passes are not timed any more: {error!r}")
            self.time_passes(None)

    def acquire(self, index: int) -> _Use | None:
        """Bring block ``index`` in, its copy ordered before the computation that follows.

        Returns what ``release`` takes; ``None`` for a resident block.
        """
        use = None
        if index in self._swapped:
            self._advance(index)
            slot = self._slot_with(index) or self._fetch(index)
            use = _Use(self._packs[index], slot)
            slot.uses.add(use)
        # What comes next is queued first: the arrival of a staged copy is waited for by the host.
        self._prefetch()
        if use is not None:
            try:
                with self._running_timer.wait() if self._running_timer else nullcontext():
                    use.slot.await_arrival()
            except BaseException:
                use.slot.uses.discard(use)
                raise
            use.pack.point(use.slot.views[index][1])
        return use

    def release(self, use: _Use | None) -> None:
        """The computation of the block is queued: free its slot, point its tensors home.

        Releasing twice is harmless, also when the slot has another user by then.
        """
        if use is None or use not in use.slot.uses:
            return
        use.slot.uses.remove(use)
        if not use.slot.uses:
            use.pack.point(use.pack.views)
            use.slot.record_release()

    # -- the order of copies -----------------------------------------------------------------

    def _advance(self, index: int) -> None:
        self._trace.append(index)
        count = len(self._order)
        for step in range(count):
            position = (self._cursor + step) % count
            if self._order[position] == index:
                self._cursor = position + 1
                return

    def _prefetch(self) -> None:
        """Queue the copies of the next swapped blocks into the slots that are free for them."""
        upcoming = self._upcoming(sum(not slot.uses for slot in self._slots))
        for index in upcoming:
            if self._slot_with(index) is None:
                self._fill(self._free_slot(upcoming), index)

    def _fetch(self, index: int) -> _Slot:
        """Queue the copy of a block that is needed now and was not foreseen."""
        free = sum(not slot.uses for slot in self._slots)
        return self._fill(self._free_slot(self._upcoming(free - 1)), index)

    def _upcoming(self, number: int) -> list[int]:
        """The next ``number`` swapped blocks, across the end of the pass."""
        count = len(self._order)
        return [self._order[(self._cursor + step) % count] for step in range(min(number, count))]

    def _slot_with(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.block == index), None)

    def _free_slot(self, keep: Sequence[int]) -> _Slot:
        """A slot without user whose block is not in ``keep``."""
        for slot in self._slots:
            if not slot.uses and slot.block not in keep:
                return slot
        # More blocks at once than planned, which no known model does: rather a slot too many
        # than a run that fails.
        logger.warning("[MultiGPU] block swap: one more slot, the model holds its blocks at once")
        self._slots.append(_Slot(self._block_bytes(), self.compute_device))
        return self._slots[-1]

    def _fill(self, slot: _Slot, index: int) -> _Slot:
        pack = self._packs[index]
        if index not in slot.views:
            with _ordinary_tensors():
                target = slot.buffer[: pack.nbytes]
            slot.views[index] = (target, pack.views_of(target))
        slot.block = None  # until the copy is queued, so that an error leaves no false promise
        self._link(pack).copy(pack, slot.views[index][0], slot, self._running_timer, self)
        slot.block = index
        return slot

    def _link(self, pack: Pack) -> _Link:
        if pack.device not in self._links:
            self._links[pack.device] = _Link(pack.device, self.compute_device)
        return self._links[pack.device]


def _hide_from_dynamo() -> None:
    """Keep ``torch.compile`` from tracing into the swap; blocks are compiled one by one.

    Only where something has imported it already: that takes seconds.
    """
    dynamo = sys.modules.get("torch._dynamo")
    for name in ("acquire", "release", "_open", "_close"):
        method = vars(BlockSwap)[name]
        if dynamo is not None and not hasattr(method, "_torchdynamo_disable"):
            setattr(BlockSwap, name, dynamo.disable(method))


class BlockList:
    """What a model's block list is inside a pass: the same modules, brought in as they are taken.

    A loop holds one block at a time; a block taken by index is held until the next one is.
    """

    def __init__(self, swap: BlockSwap, modules: torch.nn.ModuleList, indices: Sequence[int]):
        self._swap = swap
        self._modules = modules
        self._indices = indices
        self._taken: _Use | None = None

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


class _SwappedModule:
    """What a swapped module is inside a pass: the same, brought in for each call."""

    def __init__(self, swap: BlockSwap, module: torch.nn.Module, index: int):
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


def _drain(links: Mapping[torch.device, _Link]) -> None:
    for link in links.values():
        link.synchronize()


def _is_subsequence(part: Sequence[int], whole: Sequence[int]) -> bool:
    rest = iter(whole)
    return all(item in rest for item in part)


def _entry_points(model_class: type, lists: Iterable[str]) -> list[str]:
    """``forward`` and every method of the class whose code names one of ``lists``."""
    names = {"forward"}
    for cls in model_class.__mro__:
        for name, member in vars(cls).items():
            if name.startswith("__") or not isinstance(member, types.FunctionType):
                continue
            if not set(lists).isdisjoint(member.__code__.co_names):
                names.add(name)
    return sorted(names)
