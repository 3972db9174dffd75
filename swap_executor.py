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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch

from . import device_utils
from .block_views import BlockList, SwappedModule, entry_points
from .device_utils import running_on, synchronize
from .donor_link import Links, Slot, Use
from .packed_weights import Pack, ordinary_tensors
from .page_locks import PageLocks
from .pass_watch import PassWatch

logger = logging.getLogger("MultiGPU")


class BlockSwap:
    """Runs the blocks of one model on ``compute_device``, wherever their homes are.

    ``packs`` holds one ``Pack`` per block in execution order, ``lists`` names the model's block
    lists and gives, for each of their modules, the index of its pack. ``embeddings`` names modules
    of the model that run before the blocks and are called as a whole, and gives the index of their
    packs, ``beside`` the packs that are not swapped. ``update`` and ``allocate_slots`` come before
    the first pass.

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
        locks: PageLocks | None = None,
        beside: Sequence[Pack] = (),
    ):
        self.compute_device = compute_device
        self._slots_wanted = 0
        self._packs = tuple(packs)
        # Lives as long as copies may be on their way: what dies unlocks its homes, after those.
        self._beside = tuple(beside)
        self._lists = dict(lists)
        self._embeddings = dict(embeddings or {})
        self._slots: list[Slot] = []
        self.links = Links(compute_device, locks)
        self._swapped: frozenset[int] = frozenset()
        self._order: list[int] = []
        self._trace: list[int] = []
        self._cursor = 0
        self._depth = 0
        self.watch = PassWatch(compute_device)
        self._last_slot: dict[int, Slot] = {}
        self._said = False
        # Gets the bytes that a pass could not have, and says whether it has made room for them:
        # what ran out of memory is then run again.
        self.on_missing: Callable[[int], bool] | None = None
        self._views: dict[str, BlockList | SwappedModule] = {}
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
        first = list(self._embeddings.values())
        execution = first + [i for i in range(len(self._packs)) if i not in first]
        self._order = [i for i in execution if self._packs[i].device != self.compute_device]
        self._swapped = frozenset(self._order)
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

    def count_staged(self) -> int:
        """How many swapped blocks lie in host memory that is not page-locked, and are staged."""
        return sum(self.links.is_staged(self._packs[index]) for index in self._order)

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
        """Let ``model`` run through this swap; returns the function that undoes it.

        Its ``forward``, and every other method that loops over the block lists, opens a pass.
        The wrappers sit on the instance and hold it weakly: a model that nobody else holds dies.
        """
        _hide_from_dynamo()
        reference = weakref.ref(model)
        names = entry_points(type(model), {*self._lists, *self._embeddings})
        before = {name: model.__dict__[name] for name in names if name in model.__dict__}
        driving = [True]
        entries: dict[str, Callable] = {}

        def may_repeat() -> bool:
            """Whether all of it is the model's own code: others may keep state across passes."""
            own = reference().__dict__
            ours = (getattr(own.get(name), "driving", None) is driving for name in names)
            return not before and all(ours)

        for name in names:
            method, replaced = getattr(type(model), name), before.get(name)
            entries[name] = self._entry(reference, method, replaced, driving, may_repeat)
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
        may_repeat: Callable[[], bool],
    ) -> Callable:
        @functools.wraps(method)
        def entry(*args, **kwargs):
            model = reference()
            tensors = (a for a in (*args, kwargs.get("x")) if isinstance(a, torch.Tensor))
            shape = next((tensor.shape for tensor in tensors), None)
            while True:
                try:
                    with self.forward_pass(model, shape) if driving else nullcontext():
                        if replaced is not None:
                            return replaced(*args, **kwargs)
                        return method(model, *args, **kwargs)
                except Exception as error:
                    # What the method computes is a function of its inputs: it can run again.
                    repeat = may_repeat() and not _keeps_state(args, kwargs, self._depth == 0)
                    if not self._find_room(model, error, repeat):
                        raise

        entry.driving = driving
        return entry

    def _find_room(self, model: torch.nn.Module, error: Exception, may_repeat: bool) -> bool:
        """Whether ``error`` is the allocator's and room was made: what failed may run again."""
        missing = device_utils.missing_memory(error)
        if missing is None or self.on_missing is None:
            return False
        if not may_repeat:
            self.watch.report_missing(missing)
            return False
        self._release_slots()
        self.watch.drop_timer()
        self._trace, self._cursor = [], 0
        if not self.on_missing(missing):
            self.watch.report_missing(missing)
            return False
        # The frames of what failed hold its tensors.
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = error.__context__ = None
        self.watch.restart()
        if self._depth:
            self._hang_views(model)
        return True

    @contextmanager
    def forward_pass(self, model: torch.nn.Module, shape: object = None) -> Iterator[None]:
        """One forward pass of ``model``. Nested passes belong to the outermost.

        Passes of one ``shape`` take one time.
        """
        if self._depth == 0:
            self._open(model, shape)
        self._depth += 1
        completed = False
        try:
            yield
            completed = True
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._close(model, completed)

    def _open(self, model: torch.nn.Module, shape: object) -> None:
        with ExitStack() as inside:
            inside.enter_context(running_on(self.compute_device))
            self.watch.before_pass()
            self.allocate_slots()
            self.watch.begin(shape)
            self._trace = []
            self._cursor = 0
            self._hang_views(model)
            self._inside = inside.pop_all()

    def _hang_views(self, model: torch.nn.Module) -> None:
        """Let the model's own code meet views that bring blocks and swapped embeddings in."""
        for name in self._views:
            model.__dict__.pop(name, None)
        self._views = {
            name: BlockList(self, model._modules[name], indices)
            for name, indices in self._lists.items()
        }
        for name, index in self._embeddings.items():
            if index in self._swapped:
                self._views[name] = SwappedModule(self, model._modules[name], index)
        model.__dict__.update(self._views)

    def _close(self, model: torch.nn.Module, completed: bool) -> None:
        with self._inside:
            for name in self._views:
                model.__dict__.pop(name, None)
            self._views = {}
            self.watch.end(completed)
            self._release_slots()
            self._cursor = 0
            self.watch.report_peak(completed)
            if completed:
                # A pass that skips blocks keeps the order, one that runs them otherwise teaches it.
                if not _is_subsequence(self._trace, self._order):
                    self._order = self._trace
                self._prefetch()

    def _release_slots(self) -> None:
        for slot in self._slots:
            for use in list(slot.uses):
                self.release(use)

    def acquire(self, index: int) -> Use | None:
        """Bring block ``index`` in, its copy ordered before the computation that follows.

        Returns what ``release`` takes; ``None`` for a resident block.
        """
        use = None
        if index in self._swapped:
            self._advance(index)
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
        if self.watch.timer is not None and index not in self._embeddings.values():
            self.watch.timer.block_begins()
        return use

    def release(self, use: Use | None) -> None:
        """The computation of the block is queued: free its slot, point its tensors home.

        Releasing twice is harmless, also when the slot has another user by then.
        """
        if self.watch.timer is not None:
            self.watch.timer.block_ends()
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
                self._fill(self._free_slot(upcoming, index), index)

    def _fetch(self, index: int) -> Slot:
        """Queue the copy of a block that is needed now and was not foreseen."""
        free = sum(not slot.uses for slot in self._slots)
        return self._fill(self._free_slot(self._upcoming(free - 1), index), index)

    def _upcoming(self, number: int) -> list[int]:
        """The next ``number`` swapped blocks, across the end of the pass."""
        count = len(self._order)
        return [self._order[(self._cursor + step) % count] for step in range(min(number, count))]

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


def _hide_from_dynamo() -> None:
    """Keep ``torch.compile`` from tracing into the swap; blocks are compiled one by one.

    Only where something has imported it already: that takes seconds.
    """
    dynamo = sys.modules.get("torch._dynamo")
    for name in ("acquire", "release", "_open", "_close"):
        method = vars(BlockSwap)[name]
        if dynamo is not None and not hasattr(method, "_torchdynamo_disable"):
            setattr(BlockSwap, name, dynamo.disable(method))


def _keeps_state(args: tuple, kwargs: dict, outermost: bool) -> bool:
    """Whether a call writes into what it is given, or into what others wrap it with.

    Autoregressive models fill caches, a dictionary for every block, as they go; what wraps a
    forward (ComfyUI's ``wrappers``: EasyCache and the like) counts the outermost calls.
    """
    options = kwargs.get("transformer_options") or {}
    caches = (a for a in (*args, *kwargs.values()) if isinstance(a, (list, tuple)))
    if any(isinstance(entry, dict) for cache in caches for entry in cache):
        return True
    return "ar_state" in options or (outermost and bool(options.get("wrappers")))


def _records_cuda_graphs() -> bool:
    """Whether ``torch.compile`` has made CUDA graphs in this process."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    return bool(getattr(getattr(trees, "local", None), "tree_manager_containers", None))


def _is_subsequence(part: Sequence[int], whole: Sequence[int]) -> bool:
    rest = iter(whole)
    return all(item in rest for item in part)
