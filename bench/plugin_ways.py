"""This plugin, as it runs in ComfyUI: it places, page-locks, times passes and follows from them."""

from __future__ import annotations

from dataclasses import replace

import torch
from way import Way

from block_swap.host_memory import page_locks
from block_swap.page_locks import Limit, PageLocks
from block_swap.swapped_model import SwappedModel

# What may be locked where homes leave all of it to the ring.
ENOUGH = 1 << 50


class PluginWay(Way):
    """Homes in page-locked RAM, slots, one copy ahead of the computation.

    The first pass shows the order of the blocks, the second is timed; another one of the split that
    follows is timed, too, and may bring the first split back.
    """

    name = "this plugin"
    warm_up = 5

    def does_not_take(self, point):
        return None

    def locks(self) -> PageLocks:
        """What page-locks the homes."""
        return page_locks()

    def load(self, model, point):
        self._swapped = SwappedModel(model, point.split.allocation, self.locks())
        self._swapped.load(model)
        return model

    def split(self, point):
        return self._swapped.split

    def remark(self):
        staged = self._swapped.swap.count_staged()
        if self.machine.real and staged:
            return f"{staged} of {len(self._swapped.split.swapped)} homes are not page-locked"
        return None

    def unload(self):
        swapped = self.__dict__.pop("_swapped", None)
        if swapped is not None:
            swapped.unload(torch.device("cpu"), donors_too=True)


class PageablePluginWay(PluginWay):
    name = "this plugin, pageable RAM"

    def locks(self):
        return PageLocks(page_locks().pinning, lambda: Limit(ENOUGH, ENOUGH))


class OneSlotPluginWay(PluginWay):
    """Slots that no timed pass exchanges for resident blocks."""

    name = "this plugin, one slot"

    def load(self, model, point):
        self._swapped = SwappedModel(model, point.split.allocation, self.locks())
        self._swapped.split = replace(self._swapped.split, slots=1)
        self._swapped.load(model)
        self._swapped.swap.watch.time_passes(None)
        return model
