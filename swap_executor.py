"""The order of a pass: which block is copied into which slot, when, and what waits for it.

Knows torch modules, not ComfyUI. ``BlockSwap`` runs a model whose blocks live on several devices by
copying swapped blocks into slots on the compute device, one ahead of the computation.
"""

from __future__ import annotations

import functools
import logging
import sys
import traceback
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch

from . import device_utils
from .block_order import BlockOrders
from .block_views import ListSite
from .device_utils import running_on, synchronize
from .donor_link import Links, Slot, Use
from .module_calls import DividedSite, Site
from .packed_weights import Pack, ordinary_tensors
from .page_locks import PageLocks
from .pass_watch import PassWatch
from .swap_hooks import drive, holds

logger = logging.getLogger("MultiGPU")

# On an error: memory was given back for what has failed.
ROOM_MADE = "_distorch2_room_made"


class BlockSwap:
    """Runs the blocks of one model on ``compute_device``, wherever their homes are.

    ``packs`` holds one ``Pack`` per block, ``calls`` the names of the modules whose calls want it,
    and ``leading`` the indices of those that run before the blocks proper; both are in the order
    that is likely until a pass has shown it. ``tables`` are packs of which a pass needs a few rows,
    by the names of the modules that look them up; ``beside`` are others that are not swapped.
    ``wholes`` names blocks that move in parts, and gives the indices of these.
    ``update`` and ``allocate_slots`` come before the first pass.

    The model's own forward drives the swap: a block is brought in when it is called, and kept until
    another one is called or the pass ends. A pass is the outermost call of whatever holds blocks.
    Nothing swapped travels back, and after a pass, however it ends, every tensor is at home.

    """

    def __init__(
        self,
        compute_device: torch.device,
        packs: Sequence[Pack],
        calls: Sequence[Sequence[str]],
        leading: Collection[int] = (),
        tables: Mapping[str, Pack] | None = None,
        wholes: Mapping[str, Sequence[int]] | None = None,
        locks: PageLocks | None = None,
        beside: Sequence[Pack] = (),
    ):
        self.compute_device = compute_device
        self._slots_wanted = 0
        self._packs = tuple(packs)
        # Lives as long as copies may be on their way: what dies unlocks its homes, after those.
        self._beside = tuple(beside)
        self.calls = tuple(tuple(names) for names in calls)
        self._leading = frozenset(leading)
        self.tables = dict(tables or {})
        self.wholes = dict(wholes or {})
        self._slots: list[Slot] = []
        self.links = Links(compute_device, locks)
        self._swapped: frozenset[int] = frozenset()
        self._entry = ""  # of the pass that runs, or was the last
        self._blocks_of = functools.partial(_blocks_of, self.calls, self._leading)
        self._order = BlockOrders(self._blocks_of)
        self._sites: list[Site] = []
        self._lists: list[ListSite] = []
        self._taken: set[int] = set()  # in the pass that runs
        self._ran: set[int] = set()  # in passes that were completed
        self._held: set[int] = set()  # by what these were passes of
        self._running: dict[int, Use | None] = {}  # blocks whose calls have not returned
        self._kept: list[Use | None] = []  # of those whose calls have
        self._depth = 0
        self.watch = PassWatch(compute_device)
        self._last_slot: dict[int, Slot] = {}
        self._said = False
        # Gets the bytes that a pass could not have, and says whether it has made room for them:
        # what ran out of memory is then run again, if it ``repeats`` at all.
        self.repeats = False
        self.on_missing: Callable[[int], bool] | None = None
        self._inside = ExitStack()
        # Slots and homes must outlive the copies that are still on their way.
        finalizer = weakref.finalize(self, self.links.close)
        finalizer.atexit = False

    # -- placement ---------------------------------------------------------------------------

    def update(self, slots: int) -> None:
        """Take the packs as they lie now, to be swapped through up to ``slots`` slots.

        To be called after packs were moved, for which the copies had to be settled. Slots that are
        too many, or of another size, are freed.
        """
        self._slots_wanted = slots
        self.watch.drop_timer()
        self._swapped = frozenset(
            i for i, pack in enumerate(self._packs) if pack.device != self.compute_device
        )
        if any(slot.buffer.nbytes != self._block_bytes() for slot in self._slots):
            self._slots.clear()
        del self._slots[slots:]
        self._last_slot.clear()

    def allocate_slots(self) -> None:
        """Allocate the slots that are missing; none are needed where every block is resident."""
        while len(self._slots) < min(self._slots_wanted, len(self._swapped)):
            self._slots.append(Slot(self._block_bytes(), self.compute_device))

    def _block_bytes(self) -> int:
        return max((self._packs[index].nbytes for index in self._swapped), default=0)

    def settle(self) -> None:
        """Wait for every copy on its way and forget what the slots hold.

        To be called before homes are moved: no slot may keep a copy of what they were.
        """
        self.links.synchronize()
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

    @property
    def idle(self) -> frozenset[int]:
        """Blocks that passes of what holds them have not called until now."""
        return frozenset(self._held - self._ran)

    def count_staged(self) -> int:
        """How many swapped blocks lie in host memory that is not page-locked, and are staged."""
        return sum(self.links.is_staged(self._packs[index]) for index in self._swapped)

    def drop_slots(self) -> int:
        """Free the slots and return their bytes. The next pass allocates them anew."""
        self.settle()
        freed = self.slot_bytes
        self._slots.clear()
        self._last_slot.clear()
        self.links.close()
        return freed

    @property
    def slot_bytes(self) -> int:
        """Bytes that the slots hold on the compute device now."""
        return sum(slot.buffer.nbytes for slot in self._slots)

    # -- a pass ------------------------------------------------------------------------------

    def drive(self, model: torch.nn.Module) -> Callable[[], None]:
        """Let ``model`` run through this swap; returns the function that undoes it."""
        undo, self._sites, self._lists = drive(self, model)
        return undo

    def find_room(self, error: Exception, may_repeat: bool, untouched: Callable[[], bool]) -> bool:
        """Whether ``error`` is the allocator's and room was made: what failed may run again.

        That is, if its inputs are ``untouched``; to look at them takes some room, too.
        """
        missing = device_utils.missing_memory(error)
        if missing is None or self.on_missing is None:
            return False
        if not may_repeat:
            self.watch.report_missing(missing)
            return False
        self._release_slots()
        self.watch.drop_timer()
        # A call inside of this one may have had room made, and not have been able to use it.
        if not (hasattr(error, ROOM_MADE) or self.on_missing(missing)):
            self.watch.report_missing(missing)
            return False
        if not untouched():
            setattr(error, ROOM_MADE, True)
            if not self.in_pass:
                logger.warning("[MultiGPU] block swap: it has written into its inputs: it fails")
            return False
        # The frames of what failed hold its tensors.
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = error.__context__ = None
        self.watch.restart()
        self._order.restart()
        return True

    @contextmanager
    def forward_pass(self, entry: str = "", shape: object = None) -> Iterator[None]:
        """One pass, of what is called ``entry``. Nested passes belong to the outermost.

        Passes of one ``shape`` take one time.
        """
        if self._depth == 0:
            self._open(entry, shape)
        self._depth += 1
        completed = False
        try:
            yield
            completed = True
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._close(completed)

    def _open(self, entry: str, shape: object) -> None:
        with ExitStack() as inside:
            inside.enter_context(running_on(self.compute_device))
            self.watch.before_pass()
            self.allocate_slots()
            # What is called beside the model itself takes no time worth knowing.
            self.watch.begin(shape if entry == "" else None)
            self._entry = entry
            self._taken.clear()
            self._order.begin(entry)
            for site in self._sites:
                site.follow()
            for blocks in self._lists:
                inside.callback(blocks.leave)
                blocks.enter()
            self._inside = inside.pop_all()

    def _close(self, completed: bool) -> None:
        with self._inside:
            self.watch.end(completed)
            self._release_slots()
            self.watch.report_peak(completed)
            self._order.end(completed)
            if completed:
                if self._taken:
                    self._ran |= self._taken
                    self._held.update(self._blocks_of(self._entry))
                self._prefetch()

    def _release_slots(self) -> None:
        self._running.clear()
        self._kept.clear()
        for slot in self._slots:
            for use in list(slot.uses):
                self.release(use)

    @property
    def in_pass(self) -> bool:
        """Whether a pass runs."""
        return self._depth > 0

    def is_running(self, index: int) -> bool:
        """Whether block ``index`` has been called, and has not returned."""
        return index in self._running

    @property
    def meets_compiled(self) -> bool:
        """Whether blocks that move in parts have turned out to be compiled as a whole."""
        return any(isinstance(site, DividedSite) and site.is_compiled for site in self._sites)

    def enter_block(self, *indices: int) -> None:
        """A block is called: bring it in, and let go of those whose calls have returned.

        It is more than one, where it moves in parts and was compiled as a whole.
        """
        while self._kept:
            self.release(self._kept.pop())
        for index in indices:
            self._running[index] = self.acquire(index)

    def leave_block(self, *indices: int) -> None:
        """The call returns; what comes before the next one may still use the block."""
        for index in indices:
            if self.watch.timer is not None:
                self.watch.timer.block_ends(index)
            if index in self._running:
                self._kept.append(self._running.pop(index))

    def acquire(self, index: int) -> Use | None:
        """Bring block ``index`` in, its copy ordered before the computation that follows.

        Returns what ``release`` takes; ``None`` for a resident block.
        """
        use = None
        self._taken.add(index)
        self._order.take(index)
        if index in self._swapped:
            slot = self._slot_with(index) or self._fetch(index)
            use = Use(self._packs[index], slot)
            slot.uses.add(use)
        # What comes next is queued first: the arrival of a staged copy is waited for by the host.
        self._prefetch()
        if use is not None:
            try:
                with self.watch.wait():
                    use.slot.await_arrival()
            except BaseException:
                use.slot.uses.discard(use)
                raise
            use.pack.point(use.slot.views[index][1])
        if self.watch.timer is not None and index not in self._leading:
            self.watch.timer.block_begins(index)
        return use

    def release(self, use: Use | None) -> None:
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

    def _prefetch(self) -> None:
        """Queue the copies of the next swapped blocks into the slots that are free for them."""
        upcoming = self._upcoming(sum(not slot.uses for slot in self._slots))
        for index in upcoming:
            if self._slot_with(index) is None:
                self._fill(self._free_slot(upcoming, index), index)

    def _fetch(self, index: int) -> Slot:
        """Queue the copy of a block that is needed now and was not foreseen."""
        free = sum(not slot.uses for slot in self._slots)
        return self._fill(self._free_slot(self._upcoming(free - 1), index), index)

    def _upcoming(self, number: int) -> list[int]:
        """The next ``number`` swapped blocks, across the end of the pass."""
        return self._order.upcoming(number, self._swapped)

    def _slot_with(self, index: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.block == index), None)

    def _free_slot(self, keep: Sequence[int], index: int) -> Slot:
        """A slot for block ``index``: without user, its block not in ``keep``, the last one it had.

        A CUDA graph is recorded for the addresses it ran with.
        """
        free = [slot for slot in self._slots if not slot.uses and slot.block not in keep]
        if not free:
            # More blocks at once than planned, which no known model does: rather a slot too many
            # than a run that fails.
            logger.warning("[MultiGPU] block swap: one more slot, the model holds blocks at once")
            self._slots.append(Slot(self._block_bytes(), self.compute_device))
            free = self._slots[-1:]
        last = self._last_slot.get(index)
        if last in free:
            return last
        if last in self._slots:
            self._say_if_graphs_are_recorded()
        self._last_slot[index] = free[0]
        return free[0]

    def _say_if_graphs_are_recorded(self) -> None:
        """Once, where blocks change slots although CUDA graphs would have them keep theirs."""
        if not self._said and _records_cuda_graphs():
            self._said = True
            logger.warning(
                f"[MultiGPU] block swap: {len(self._swapped)} swapped blocks take turns in "
                f"{len(self._slots)} slots, so a CUDA graph is recorded for every pair: compile "
                f"without CUDA graphs, or let the number of swapped blocks be a multiple of slots"
            )

    def _fill(self, slot: Slot, index: int) -> Slot:
        pack = self._packs[index]
        if index not in slot.views:
            with ordinary_tensors():
                target = slot.buffer[: pack.nbytes]
            slot.views[index] = (target, pack.views_of(target))
        slot.block = None  # until the copy is queued, so that an error leaves no false promise
        self.links.copy(pack, slot.views[index][0], slot, self.watch.timer, self)
        slot.block = index
        return slot


def _blocks_of(calls: Sequence[Sequence[str]], leading: Collection[int], entry: str) -> list[int]:
    """The blocks that the module ``entry`` holds, in the order that is likely."""
    held = [index for index, names in enumerate(calls) if holds(entry, names[0])]
    return sorted(held, key=lambda index: index not in leading)


def _records_cuda_graphs() -> bool:
    """Whether ``torch.compile`` has made CUDA graphs in this process."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    return bool(getattr(getattr(trees, "local", None), "tree_manager_containers", None))
