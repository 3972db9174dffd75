"""Which split a model has: what was typed, what ``auto`` finds free, what passes have shown.

Plans and chooses; moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from . import device_utils
from .allocation_parser import Allocation
from .pass_memory import Room
from .pass_schedule import assumed_timing, predict
from .split import ModelSizes, Split
from .split_planner import plan_split, refit_split
from .split_tuner import SplitTuner
from .step_time import WORTH

# Of what a donor has free, ``auto`` leaves this share to others.
DONOR_MARGIN = 0.1

# ``auto`` grows by no less than this many blocks where passes need what they did: what is free is
# never quite the same.
WORTH_BLOCKS = 1.25


def spare_of_donor(name: str, held: int = 0) -> int:
    """What a donor that is ``auto`` has for a model that holds ``held`` bytes there already."""
    return int((1 - DONOR_MARGIN) * (device_utils.free_memory(name) + held))


def is_better(parts: Split, whole: Split) -> bool:
    """Whether blocks in parts are worth it: a pass is faster over a slow link, and never slower.

    Or else they come closer to a quota that whole blocks overrun.
    """
    quotas = {quota.device: quota.nbytes for quota in whole.quotas}
    quota = quotas.get(whole.compute_device)
    if quota is not None and whole.compute_bytes > quota:
        return parts.compute_bytes < whole.compute_bytes

    def seconds(split: Split, ratio: float) -> float:
        return predict(split, assumed_timing(split.sizes, ratio))

    saves = seconds(parts, 0) < (1 - WORTH) * seconds(whole, 0)
    return saves and seconds(parts, 1) < (1 + WORTH) * seconds(whole, 1)


class SplitChooser:
    """Chooses the ``split`` of one model of these ``sizes``.

    ``held`` gives the bytes that the model has on a donor. ``room`` is what the compute device was
    last seen to have for weights.
    """

    def __init__(
        self, sizes: ModelSizes, allocation: Allocation, held: Callable[[torch.device], int]
    ) -> None:
        self.sizes = sizes
        self.tuner = SplitTuner()
        self.room: Room | None = None
        self._held = held
        self.split = self.plan(allocation)

    def plan(
        self,
        allocation: Allocation,
        compute_spare: int | None = None,
        sizes: ModelSizes | None = None,
    ) -> Split:
        """The split for an allocation; ``compute_spare`` is what ``auto`` has to compute with."""
        sizes = sizes or self.sizes
        if compute_spare is None:
            compute_spare = sizes.total_bytes if self.room is None else self.room.nbytes
        spare = {
            device: compute_spare
            if device == allocation.compute_device
            else spare_of_donor(device, self._held(device_utils.torch_device(device)))
            for device in allocation.auto_devices
        }
        memory = device_utils.total_memories(allocation.devices)
        return plan_split(allocation, sizes, memory, spare, self.tuner.timing)

    def divide(self, sizes: ModelSizes) -> bool:
        """Have blocks in parts, of these ``sizes``, if that is worth it; returns whether it is."""
        split = self.plan(self.split.allocation, sizes=sizes)
        if not is_better(split, self.split):
            return False
        self.sizes, self.split = sizes, split
        return True

    @property
    def is_auto(self) -> bool:
        """Whether the compute device has what is free there, instead of a typed quota."""
        return self.split.compute_device in self.split.allocation.auto_devices

    @property
    def wanted_bytes(self) -> int:
        """What the next load would like to have of the compute device."""
        return self.sizes.total_bytes if self.is_auto else self.split.compute_bytes

    @property
    def may_spare(self) -> bool:
        """Whether ``auto`` may hold more than saves time."""
        return self.is_auto and self.tuner.cheapest_bytes is not None

    def follow(self, allocation: Allocation) -> None:
        """Plan anew if the allocation is another; the next load moves what has to move."""
        if allocation != self.split.allocation:
            self._take(self.plan(allocation))

    def leave_out(self, idle: frozenset[int]) -> None:
        """Plan anew where passes have shown that they never run some blocks: those leave first."""
        if idle != self.sizes.idle:
            self.sizes = replace(self.sizes, idle=idle)
            self._take(refit_split(self.split, self.plan(self.split.allocation)))

    def fit(self, room: Room, loaded: bool) -> None:
        """Take what ``room`` there is for weights now, where the compute device is ``auto``.

        Nothing changes where less than a block would, as what is free is never quite the same, nor
        where more on the compute device is known to save no time.
        """
        before, self.room = self.room, room
        if not self.is_auto:
            return
        wanted = self.plan(self.split.allocation)
        if not loaded:
            self.split = wanted
            return
        held, block = self.split.compute_bytes, self.split.sizes.largest_block
        more = min(room.nbytes, self.sizes.total_bytes) - held
        becomes_whole = wanted.bytes_per_pass == 0 < self.split.bytes_per_pass
        same_need = before is not None and before.need == room.need
        worth = WORTH_BLOCKS * block if same_need else block
        if held <= room.nbytes and more < worth and not becomes_whole:
            return
        fitted = refit_split(self.split, wanted)
        if held <= room.nbytes and not self.tuner.is_worth(fitted, self.split, room.latent):
            return
        if (fitted.homes, fitted.slots) != (self.split.homes, self.split.slots):
            self._take(fitted)

    def shrink(self, now: Split, nbytes: int) -> bool:
        """Have what ``nbytes`` of the compute device hold, if that is less than ``now``."""
        wanted = self.plan(now.allocation, nbytes)
        if not wanted.compute_bytes < now.compute_bytes:
            return False
        self._take(refit_split(now, wanted))
        return True

    def _take(self, split: Split) -> None:
        self.split = split
        self.tuner.begin()
