"""The way from a donor to the compute device: links, the staging ring, and slots.

A ``Link`` has a copy stream of its own and copies packs into slots; what lies in pageable host
memory goes through a ``Ring`` of page-locked memory, filled by a worker thread. Order is kept by
events only: ``Slot.arrived`` and ``Slot.released``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

import torch

from . import device_utils
from .device_utils import stream_module
from .packed_weights import Pack, ordinary_tensors
from .pass_timing import PassTimer

# What pageable homes go through: at 25 GB/s a chunk is on the bus for less than a millisecond.
CHUNK_BYTES = 1 << 24

RING_CHUNKS = 4


class Ring:
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
    def make(cls) -> Ring | None:
        """A ring, or ``None`` where this machine gives no page-locked memory."""
        with ordinary_tensors():
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


class Link:
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
    def _ring(self) -> Ring | None:
        return Ring.make()

    def is_staged(self, pack: Pack) -> bool:
        """Whether ``pack`` goes through the ring: it is in host memory that is not page-locked."""
        pageable = pack.device.type == "cpu" and not pack.locked and self._module is not None
        return pageable and self._ring is not None

    def copy(
        self,
        pack: Pack,
        target: torch.Tensor,
        slot: Slot,
        timer: PassTimer | None,
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
        slot: Slot,
        timer: PassTimer | None,
        ring: Ring | None = None,
    ) -> None:
        with ordinary_tensors(), ExitStack() as stack:
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


class Slot:
    """A buffer on the compute device that swapped blocks are copied into in turn.

    ``arrived`` and ``released`` are the events that order the copy stream and the compute stream;
    ``None`` on a device without streams, where every copy is complete when it returns. ``queued``
    is the work of another thread that queues the copy, where there is one.
    """

    def __init__(self, nbytes: int, device: torch.device):
        with ordinary_tensors():
            self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.block: int | None = None
        self.queued: Future | None = None
        self.uses: set[Use] = set()
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


class Use:
    """One use of a swapped block in a slot, from ``acquire`` to ``release``."""

    __slots__ = ("pack", "slot")

    def __init__(self, pack: Pack, slot: Slot):
        self.pack = pack
        self.slot = slot


def drain(links: Mapping[torch.device, Link]) -> None:
    for link in links.values():
        link.synchronize()
