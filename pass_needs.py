"""What passes are seen to need of the compute device beside the weights, by its allocator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import device_utils

# Called with the shape of a pass, the bytes that it needed, whether it failed, and the least that
# a pass of that shape is to have.
OnNeed = Callable[[object, int, bool, int], None]


class PassNeeds:
    """Tells from the allocator's peaks what passes need; the weights are ``held`` bytes there."""

    def __init__(self, device: torch.device, on_need: OnNeed | None) -> None:
        self._device = device
        self._on_need = on_need
        self.others: int | None = None  # bytes on the device that are not of this model
        self._too_little: int | None = None  # bytes that the pass which is repeated has had

    def note(self, held: int) -> None:
        """The model is loaded: what is allocated besides belongs to others."""
        allocated = device_utils.allocated_memory(self._device)
        self.others = None if allocated is None else allocated - held

    def room(self, held: int) -> int | None:
        """Bytes of the device that a pass has beside the weights, if that can be told."""
        allocated = device_utils.allocated_memory(self._device)
        if self.others is None or allocated is None:
            return None
        free = device_utils.free_memory(device_utils.name_of(self._device))
        return free + allocated - self.others - held

    def repeat(self, too_little: int | None) -> None:
        """A pass that has failed with that much room is repeated with more."""
        self._too_little = too_little

    def learn(self, shape: object, peak: int, failed: bool, held: int, block: int) -> None:
        """The allocator's peak in a pass, which shows what it needs.

        ``block`` is the size of a block: what gives way where one more is needed.
        """
        if self.others is None or self._on_need is None:
            return
        too_little = self.room(held) if failed else self._too_little
        self._too_little = None
        # A pass that could have had that much, and failed, is to have a block more or so.
        least = 0 if too_little is None else too_little + block // 2
        self._on_need(shape, max(0, peak - self.others - held), failed, least)
