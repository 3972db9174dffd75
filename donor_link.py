"""The way from a donor to the compute device: links, the staging ring, and slots.

``Links`` copies packs into slots, a copy stream for each donor; what lies in pageable host memory
goes through a ``Ring`` of page-locked memory, filled by a worker thread. Order is kept by events
only: ``Slot.arrived`` and ``Slot.released``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

import torch

from . import device_utils
from .device_utils import stream_module
from .packed_weights import Pack, ordinary_tensors
from .page_locks import Need, PageLocks
from .pass_timing import PassTimer

# What pageable homes go through. The worker needs the interpreter's lock some four times a chunk,
# and may wait 5 ms (``sys.getswitchinterval``) for it each time that the sampler computes in
# Python, so chunks are large: with 64 MiB that costs the least (bench/results/staging.md), and four
# of them keep a bus of 25 GB/s busy for two such waits.
CHUNK_BYTES = 1 << 26
RING_CHUNKS = 4


def _nothing_reads_it() -> None:
    """A ring is released by its ``Links``, after the copies through it are over."""


class Ring:
    """A page-locked buffer that pageable homes pass through, chunk by chunk.

    A copy from pageable memory would block the host. Here a worker thread fills one chunk while
    the chunks before it are on the bus, and only the worker waits, asleep.
    """

    def __init__(self, buffer: torch.Tensor, device: torch.device, release: Callable[[], None]):
        self._device = device
        self._chunks = buffer.chunk(RING_CHUNKS)
        self._left = [device_utils.blocking_event(device) for _ in self._chunks]
        self._on_the_bus = [False] * len(self._chunks)
        self._next = 0
        self._release = release
        self._worker = ThreadPoolExecutor(1, "block-swap")
        self._last: Future | None = None
        self._thread: int | None = None  # the worker's

    @classmethod
    def make(cls, device: torch.device, locks: PageLocks | None) -> Ring | None:
        """A ring for copies to ``device``, or ``None`` where there is no page-locked memory.

        Its memory comes out of ``locks``, or from torch for devices that the host page-locks no
        memory for.
        """
        nbytes = CHUNK_BYTES * RING_CHUNKS
        with ordinary_tensors():
            if locks is None or (locks.pinning.allowed and not locks.pinning.able()):
                buffer = device_utils.page_locked(nbytes)
                return None if buffer is None else cls(buffer, device, lambda: None)
            buffer = torch.empty(nbytes, dtype=torch.uint8)
            lock = locks.lock(buffer, Need.RING, _nothing_reads_it)
            return None if lock is None else cls(buffer, device, lock.release)

    def submit(self, copy: Callable[[], None], owner: object) -> Future:
        """Have the worker run ``copy``, after what was submitted before; ``owner`` lives on."""
        queued = Future()

        def work(_owner):
            nonlocal queued
            self._thread = threading.get_ident()
            try:
                with device_utils.on_device(self._device):
                    copy()
                queued.set_result(None)
            except BaseException as error:
                queued.set_exception(error)
            finally:
                queued = None  # the error's traceback holds this frame

        # What the ring keeps knows of no error: that would hold the frames it went through.
        result, self._last = queued, self._worker.submit(work, owner)
        return result

    def finish(self) -> None:
        """Wait for all that was submitted; in the worker itself, where a finalizer may run, do not.

        What it works on holds its swap, and that holds all packs: none of them can be what dies.
        """
        if self._last is not None and threading.get_ident() != self._thread:
            wait([self._last])

    def release(self) -> None:
        """Give the memory back; every copy through it is over."""
        self._worker.shutdown(wait=False)
        self._release()

    def copy(self, home: torch.Tensor, target: torch.Tensor, stream) -> None:
        """Queue the copy of ``home`` to ``target`` on ``stream``, the current one."""
        size = self._chunks[0].nbytes
        # Every operation on tensors gives up the interpreter's lock, and has to get it back.
        for part, place in zip(home.split(size), target.split(size), strict=True):
            n = self._next
            self._next = (n + 1) % len(self._chunks)
            if self._on_the_bus[n]:
                self._left[n].synchronize()
            chunk = self._chunks[n]
            if part.nbytes < size:
                chunk = chunk[: part.nbytes]
            chunk.copy_(part)
            place.copy_(chunk, non_blocking=True)
            self._left[n].record(stream)
            self._on_the_bus[n] = True


class Link:
    """The way from one donor to the compute device, with a copy stream of its own.

    Between two accelerators that is a stream on each: a peer copy runs after the streams that are
    current on both of its devices, so both have to be the link's.
    """

    def __init__(self, donor: torch.device, compute: torch.device):
        self._streams = []
        self._contexts = []
        for device in (donor, compute):
            module = stream_module(device)
            if module is not None:
                self._streams.append(module.Stream(device=device))
                self._contexts.append(module.stream)

    def queue(
        self,
        home: torch.Tensor,
        target: torch.Tensor,
        slot: Slot,
        timer: PassTimer | None,
        ring: Ring | None,
    ) -> None:
        """Queue the copy of ``home`` to ``target`` in ``slot``, after the slot's last reader."""
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
                ring.copy(home, target, arrival_stream)
            slot.arrived.record(arrival_stream)

    def synchronize(self) -> None:
        """Wait for every copy on its way."""
        for stream in self._streams:
            stream.synchronize()


class Links:
    """The links from all donors to one compute device, and the ring that those from RAM share.

    Holds neither packs nor slots: it outlives its swap until their last copy is over.
    """

    def __init__(self, compute: torch.device, locks: PageLocks | None = None):
        self._compute = compute
        self._locks = locks
        self._links: dict[torch.device, Link] = {}
        self._ring: Ring | None = None
        self._refused = False

    def reserve_ring(self) -> None:
        """Have the ring's memory, before homes take what there is to page-lock."""
        if self._ring is None and stream_module(self._compute) is not None:
            self._ring = Ring.make(self._compute, self._locks)
            self._refused = self._ring is None

    @property
    def ring_is_refused(self) -> bool:
        """Whether there was no memory for the ring when it was last asked for."""
        return self._refused

    def release_ring(self) -> None:
        """Give the ring's memory back."""
        if self._ring is not None:
            self.synchronize()
            self._ring.release()
        self._ring, self._refused = None, False

    def _ring_for(self, pack: Pack) -> Ring | None:
        if pack.device.type != "cpu" or pack.locked:
            return None
        if not self._refused:
            self.reserve_ring()
        return self._ring

    def is_staged(self, pack: Pack) -> bool:
        """Whether ``pack`` goes through the ring: it is in host memory that is not page-locked."""
        return self._ring_for(pack) is not None

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
        if pack.device not in self._links:
            self._links[pack.device] = Link(pack.device, self._compute)
        link, ring = self._links[pack.device], self._ring_for(pack)
        queue = functools.partial(link.queue, pack.flat, target, slot, timer, ring)
        if ring is None:
            queue()
        else:
            slot.queued = ring.submit(queue, owner)

    def synchronize(self) -> None:
        """Wait for every copy on its way; what failed in the worker has failed for its slot."""
        if self._ring is not None:
            self._ring.finish()
        for link in list(self._links.values()):
            link.synchronize()

    def close(self) -> None:
        """Wait for every copy, and give back what the links have. They may be used again."""
        self.synchronize()
        self._links.clear()
        self.release_ring()


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
