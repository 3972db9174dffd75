"""A loaded model: its packs, its split, and the swap that runs it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from . import device_utils, step_time
from .allocation_parser import CPU, Allocation
from .model_blocks import modules_beside, root_of
from .model_layout import Layout
from .packed_weights import Pack
from .page_locks import Need, PageLocks
from .pass_memory import Room
from .pass_needs import OnNeed, PassNeeds
from .pass_timing import PassTime
from .split import ModelSizes, Split, format_bytes
from .split_chooser import SplitChooser
from .split_tuner import SplitTuner
from .swap_executor import BlockSwap

logger = logging.getLogger("MultiGPU")

# Resident blocks keep homes in RAM while this share of all RAM stays available; not so on devices
# whose memory is RAM.
AVAILABLE_RAM = 0.2

SHARE_RAM = (CPU, "mps")


def has_room_for_homes(nbytes: int, available: int, total: int) -> bool:
    """Whether RAM has room for ``nbytes`` of homes; ``available`` and ``total`` RAM in bytes."""
    return available - nbytes >= AVAILABLE_RAM * total


class SwappedModel:
    """The weights of one model, packed, and the swap that runs it.

    Lives on the inner model and holds no reference back to it, so that a model which ComfyUI lets
    go is freed at once.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        allocation: Allocation,
        locks: PageLocks,
        on_need: OnNeed | None = None,
        whole: bool = False,
    ):
        """``whole``: blocks are not to move in parts, as when something compiles them."""
        self._model = weakref.ref(model)
        self._locks = locks
        self._whole = whole
        self.layout = Layout.of(model)
        held = weakref.WeakMethod(self._held)
        self.choice = SplitChooser(self.layout.sizes, allocation, lambda device: held()(device))
        self.needs = PassNeeds(device_utils.torch_device(self.split.compute_device), on_need)
        self._told: set[object] = set()  # what the user was told of, before the first step
        self._placed: Split | None = None
        self._undrive: Callable[[], None] | None = None
        self._foreign_bytes = 0
        self._use(self.layout)
        self._divide()

    def _use(self, layout: Layout) -> None:
        """Have the model packed like this; nothing of it is packed yet."""
        self.layout = layout
        first, travel = len(layout.sizes.blocks), len(layout.travelling)
        tables = zip(layout.sizes.tables, layout.tables, strict=True)
        self.swap = BlockSwap(
            device_utils.torch_device(self.split.compute_device),
            layout.travelling,
            layout.calls[:travel],
            leading=range(first, travel),
            tables={table.name: pack for table, pack in tables},
            wholes=layout.wholes,
            locks=self._locks,
            beside=[layout.non_block],
        )

    def _divide(self) -> None:
        """Have blocks move in parts where that is worth it; once they are packed, they are."""
        if self._whole or self.layout.wholes or any(p.device for p in self.all_packs()):
            return
        layout = Layout.of(self._model(), in_parts=True)
        if layout.wholes and self.choice.divide(layout.sizes):
            self._use(layout)

    def _held(self, device: torch.device) -> int:
        """Bytes of parts on a device."""
        return sum(pack.nbytes for pack in self.packs if pack.device == device)

    def __reduce__(self):
        """A copy of a model has ``None`` for a state: nothing drives it."""
        return type(None), ()

    @property
    def packs(self) -> tuple[Pack, ...]:
        """The packs of all parts, in the order of a split's homes."""
        return self.layout.packs

    @property
    def split(self) -> Split:
        """The split that the model has, or is to have from the next load on."""
        return self.choice.split

    @split.setter
    def split(self, split: Split) -> None:
        self.choice.split = split

    @property
    def sizes(self) -> ModelSizes:
        """What the model is made of."""
        return self.choice.sizes

    @property
    def tuner(self) -> SplitTuner:
        """What timed passes say of the split."""
        return self.choice.tuner

    def fit(self, room: Room) -> None:
        """Take what ``room`` there is for weights now, where the compute device is ``auto``."""
        self.choice.fit(room, self.loaded)
        self._divide()

    def _make_room(self, missing: int) -> bool:
        """A pass has run out of memory: give ``missing`` bytes, or a block, back, and go on.

        Returns whether that was possible: not at the floor, nor with a typed quota.
        """
        now, too_little = self._placed_now(), self.needs.room(self.compute_bytes())
        fewer = now.compute_bytes - max(missing, now.sizes.largest_block)
        if not self.choice.is_auto or not self._shrink(now, max(0, fewer)):
            return False
        self.needs.repeat(too_little)
        logger.warning(
            f"[MultiGPU] block swap: out of memory in a pass, which is repeated with "
            f"{format_bytes(self.split.compute_bytes)} of weights on {self.split.compute_device} "
            f"instead of {format_bytes(now.compute_bytes)}"
        )
        return True

    def _placed_now(self) -> Split:
        """The split as the blocks lie now: some may have been given back."""
        homes = tuple(device_utils.name_of(pack.device) for pack in self.packs)
        return replace(self.split, homes=homes)

    def _shrink(self, now: Split, nbytes: int) -> bool:
        """Have what ``nbytes`` of the compute device hold, if that is less than ``now``."""
        if not self.choice.shrink(now, nbytes):
            return False
        self._place()
        self.swap.allocate_slots()
        return True

    def _learn(self, shape: object, peak: int, failed: bool) -> None:
        self.needs.learn(shape, peak, failed, self.compute_bytes(), self.sizes.largest_block)

    @property
    def loaded(self) -> bool:
        """Whether the model is placed by a split, and driven."""
        return self._placed is not None

    def all_packs(self) -> list[Pack]:
        """The packs of all parts, and that of the other non-block weights."""
        return [*self.packs, self.layout.non_block]

    @contextmanager
    def undriven(self) -> Iterator[None]:
        """Inside, the model has its own methods: ComfyUI swaps them by object patches."""
        self._stop_driving()
        try:
            yield
        finally:
            if self.loaded:
                self._start_driving()

    def _start_driving(self) -> None:
        if self._undrive is None:
            self._undrive = self.swap.drive(root_of(self._model()))

    def _stop_driving(self) -> None:
        if self._undrive is not None:
            self._undrive()
            self._undrive = None

    def absorb(self) -> None:
        """Take over the weights that ComfyUI has hung on the modules."""
        # A copy of a patched model is unpatched before its first load, when nothing is packed.
        packed = (pack for pack in self.all_packs() if pack.device is not None)
        self._foreign_bytes = sum(pack.absorb() for pack in packed)

    def compute_bytes(self) -> int:
        """Bytes of weights on the compute device now."""
        here = self.swap.compute_device
        placed = sum(p.nbytes for p in self.all_packs() if p.device == here)
        beside = (
            self.split.sizes.non_block_bytes - self.layout.non_block.nbytes if self.loaded else 0
        )
        return placed + beside + self._foreign_bytes + self.swap.slot_bytes

    def homeless_bytes(self) -> int:
        """Bytes of weights that have no place of their own yet, as before the first load."""
        return sum(pack.nbytes for pack in self.all_packs() if pack.device is None)

    def ram_to_come(self) -> int:
        """Bytes of RAM that homes of what is swapped take beyond what the weights have there."""
        if self.swap.compute_device.type in SHARE_RAM:
            return 0
        homes = zip(self.packs, self._homes(), strict=True)
        return sum(pack.missing_ram() for pack, home in homes if home.type == CPU)

    def is_news(self, cause: object) -> bool:
        """Whether the user was not told of ``cause`` yet; they are, from now on."""
        told, self._told = self._told, self._told | {cause}
        return cause not in told

    def load(self, model: torch.nn.Module) -> None:
        """Put every block where the split wants it, straight, one at a time, and print the split.

        Where everything is in place already, nothing is touched: what the slots hold stays good.
        """
        self.choice.leave_out(self.swap.idle)
        if self._placed is self.split and self._is_at_home():
            self._page_lock()  # there may be room for it now
            return
        for module in modules_beside(model):
            module.to(self.swap.compute_device)
        self._place()
        timed = weakref.WeakMethod(self._timed)
        self.swap.watch.time_passes(lambda pass_time: timed()(pass_time))
        learn, make_room = weakref.WeakMethod(self._learn), weakref.WeakMethod(self._make_room)
        self.swap.watch.take_peaks(lambda *peak, failed: learn()(*peak, failed))
        self.swap.repeats = self.choice.is_auto
        self.swap.on_missing = lambda nbytes: make_room()(nbytes)
        logger.info("\n".join([self.split.table(), *self._remarks()]))
        self._start_driving()

    def _is_at_home(self) -> bool:
        """Whether every pack is where the split wants it."""
        at_home = [pack.device for pack in self.packs] == self._homes()
        return at_home and all(pack.is_hung for pack in self.all_packs())

    def _homes(self) -> list[torch.device]:
        return [device_utils.torch_device(home) for home in self.split.homes]

    def _place(self) -> None:
        """Move what is not where the split wants it."""
        compute = self.swap.compute_device
        self.swap.drop_slots()
        targets = [*zip(self.packs, self._homes(), strict=True), (self.layout.non_block, compute)]
        keep_homes = self._has_room_for_homes([p for p, home in targets if home == compute])
        try:
            for pack in self.all_packs():
                if pack.device is not None and not pack.is_hung:
                    pack.hang_again()
            # What leaves a device goes first: none ever holds more than the split says.
            order = {torch.device(CPU): 0, compute: 2}
            for pack, home in sorted(targets, key=lambda target: order.get(target[1], 1)):
                pack.place(home, keep_home=keep_homes and home == compute)
                pack.move_foreign(compute)
            self._page_lock()
            self._placed = self.split
        finally:
            # A split without slots needs some once ``give_back`` has taken resident blocks away.
            self.swap.update(self.split.slots or 2)

    def _page_lock(self) -> None:
        """Page-lock homes while that is granted: of what travels, then of what is resident."""
        compute, links = self.swap.compute_device, self.swap.links
        travels = [p for p in self._swapped_packs() if p.device.type == CPU]
        at_home = [p for p in self.all_packs() if p.device == compute and p.home_bytes]
        needs = [(p, Need.TRAVELS) for p in travels] + [(p, Need.HOME) for p in at_home]
        for pack, need in needs:
            pack.need(need)
        if any(not pack.locked for pack in travels):
            links.reserve_ring()  # or there may be nothing left for it
        for pack, need in needs:
            # A host that has refused once is not asked for every block.
            if links.ring_is_refused or not pack.lock(self._locks, need, links.synchronize):
                break
        if all(pack.locked for pack in travels):
            links.release_ring()

    def _swapped_packs(self) -> list[Pack]:
        """The packs that travel."""
        return [pack for pack in self.layout.travelling if pack.device != self.swap.compute_device]

    def _has_room_for_homes(self, resident: list[Pack]) -> bool:
        """Whether what is to be resident keeps homes in RAM."""
        if self.swap.compute_device.type in SHARE_RAM:
            return False
        in_ram = torch.device(CPU)
        added = sum(p.nbytes for p in resident if p.device != in_ram and not p.home_bytes)
        return has_room_for_homes(added, *device_utils.ram())

    def _timed(self, pass_time: PassTime) -> None:
        """Say what the split costs now that it is known, and have the one that follows from it."""
        # What was given back to other models is not taken again before the next load.
        before, placed = self.split, self._is_at_home()
        self.split = self.tuner.decide(pass_time, before, may_change=placed)
        if self.split is not before and placed:
            try:
                self._place()
                logger.info(self.split.table())
            except RuntimeError as error:  # no memory for what should have fitted
                logger.warning(f"[MultiGPU] block swap: the split stays as it was: {error}")
                self.tuner.give_up()
                self.split = before
                self._place()
        if self.tuner.on_trial is not None:
            self.swap.watch.time_again(self.tuner.on_trial)
        if self.tuner.given_up:
            self.swap.watch.time_passes(None)
        line = self.tuner.report(self.split)
        if line is not None:
            logger.info(f"[MultiGPU] block swap: {line}")

    def _remarks(self) -> Iterator[str]:
        """Lines for the table: what a pass will take, what there is in RAM, and how."""
        if self.choice.is_auto and self.choice.room is not None:
            yield f"  {self.split.compute_device}: auto is {self.choice.room}"
        if self.layout.wholes:
            yield f"  blocks move in parts, which count as blocks here: {self.layout.part_names}"
        line = self.tuner.report(self.split)
        if line is not None:
            yield f"  {line}"
        elif self.split.bytes_per_pass:
            yield step_time.transfer_line(self.split)
        compute = self.swap.compute_device
        swapped = [pack for pack in self._swapped_packs() if pack.device.type == CPU]
        if swapped:
            locked, staged = sum(pack.locked for pack in swapped), self.swap.count_staged()
            yield (
                f"  RAM: of {len(swapped)} homes {locked} are page-locked, {staged} staged through "
                f"page-locked memory, {len(swapped) - locked - staged} pageable"
            )
        homes = sum(pack.home_bytes for pack in self.all_packs())
        if homes:
            yield f"  RAM: {format_bytes(homes)} of homes for what is resident: unloading is free"
        elif compute.type not in SHARE_RAM:
            yield (
                f"  RAM: no homes for what is resident, {AVAILABLE_RAM:.0%} of all RAM is to stay "
                f"available"
            )

    def forget_homes(self) -> None:
        """Free the homes of what is resident: RAM is short, or they no longer hold what it does."""
        for pack in self.all_packs():
            pack.forget_home()

    def give_back(self, nbytes: int, offload_device: torch.device) -> int:
        """Free at least ``nbytes`` of the compute device if possible; returns the bytes freed.

        The slots go first, then tables and resident blocks move to ``offload_device`` one by one.
        The model still runs, in slots allocated when it does, and the next load restores the split.
        """
        before = self.compute_bytes()
        self.swap.drop_slots()
        for pack in (*self.layout.tables, *self.layout.travelling):
            if before - self.compute_bytes() >= nbytes:
                break
            if pack.device == self.swap.compute_device:
                pack.place(self._storage(offload_device))
        if self.loaded:
            self._page_lock()  # they travel now
        self.swap.update(self.split.slots or 2)
        return before - self.compute_bytes()

    def give_way(self, nbytes: int, least: int = 0) -> None:
        """Free up to ``nbytes`` of what ``auto`` has taken, down to ``least`` bytes or the floor.

        The split has less from now on: the next load does not take back what is worth nothing.
        """
        before, now = self.compute_bytes(), self._placed_now()
        if self._shrink(now, max(least, now.compute_bytes - nbytes)):
            logger.info(
                f"[MultiGPU] block swap: {format_bytes(before - self.compute_bytes())} of weights "
                f"leave {self.split.compute_device}, where others need room"
            )

    def unload(self, device: torch.device, donors_too: bool) -> torch.device:
        """Take the weights off the compute device; nothing is swapped any more.

        Blocks on other accelerators stay there unless ``donors_too``. Returns where the weights
        went: ``device``, or the CPU if that is the compute device.
        """
        storage = self._storage(device)
        self.swap.drop_slots()
        for pack in self.all_packs():
            if donors_too or pack.device in (None, self.swap.compute_device):
                pack.place(storage)
            pack.move_foreign(storage)
            if donors_too:
                pack.unlock()
            pack.need(Need.UNLOADED)
        self._stop_driving()
        self._placed = None
        return storage

    def _storage(self, device: torch.device) -> torch.device:
        """Where to put what leaves the compute device, which --highvram names itself."""
        return torch.device(CPU) if device == self.swap.compute_device else device
