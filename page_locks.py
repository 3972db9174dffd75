"""Page-locked host memory: one budget for the process, and who has what of it.

Page-locked memory cannot be swapped out, and every platform has a limit beyond which somebody
else's copy fails, or the kernel kills. Whoever wants more than is left gets it from those who need
it less: homes of unloaded models first, then homes of what is resident elsewhere.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch

logger = logging.getLogger("MultiGPU")

# Shares of RAM: what may be page-locked at most (Windows itself stops at about half of RAM), and
# what of that is left to those who count for nobody, as PyTorch's own page-locked buffers.
LOCKABLE_WINDOWS = 0.40
LOCKABLE = 0.90
MARGIN = 0.05


def lockable(ram: int, windows: bool) -> int:
    """Bytes that homes may have page-locked on a machine, or in a container, of ``ram`` bytes."""
    return int(ram * ((LOCKABLE_WINDOWS if windows else LOCKABLE) - MARGIN))


class Need(IntEnum):
    """Who needs page-locked memory most, first."""

    TRAVELS = 0  # copied in every pass
    HOME = 1  # copied when its model comes back to the compute device
    UNLOADED = 2  # copied when its model is loaded again


@dataclass(frozen=True)
class Pinning:
    """How the host page-locks memory in place.

    ``pin`` and ``unpin`` take a tensor; ``pin`` returns whether it succeeded. ``room`` gives the
    bytes that the host's own count has left, ``make_room`` asks the host to unlock for so many
    bytes what it can do without. ``allowed`` is False where the user has switched locking off.
    """

    pin: Callable[[torch.Tensor], bool]
    unpin: Callable[[torch.Tensor], object]
    room: Callable[[], int]
    make_room: Callable[[int], object]
    allowed: bool = True


class PageLock:
    """Page-locked memory of one owner, until ``release``."""

    def __init__(self, locks: PageLocks, buffer: torch.Tensor, settle: Callable, need: Need):
        self.need = need
        self._locks = locks
        self._buffer: torch.Tensor | None = buffer
        self._settle = settle

    @property
    def nbytes(self) -> int:
        """Bytes that are page-locked."""
        return 0 if self._buffer is None else self._buffer.nbytes

    @property
    def held(self) -> bool:
        """Whether the memory is still page-locked."""
        return self._buffer is not None

    def release(self) -> None:
        """Unlock the memory, once no copy reads it any more. Releasing twice is harmless."""
        if self._buffer is not None:
            self._settle()
            self._locks.forget(self)

    def take_buffer(self) -> torch.Tensor | None:
        """The buffer, once: whoever gets it unlocks it."""
        buffer, self._buffer = self._buffer, None
        return buffer


class PageLocks:
    """Page-locks buffers within ``limit()`` bytes and what the host has room for.

    ``nbytes`` are the bytes that are page-locked here now.
    """

    def __init__(self, pinning: Pinning, limit: Callable[[], int]):
        self.pinning = pinning
        self.nbytes = 0
        self._limit = limit
        self._held: list[PageLock] = []  # oldest first
        # Reentrant: a finalizer may release a lock while its thread is making another.
        self._mutex = threading.RLock()

    def lock(self, buffer: torch.Tensor, need: Need, settle: Callable[[], None]) -> PageLock | None:
        """Page-lock ``buffer``; ``None`` where the budget or the host refuses.

        ``settle`` waits for the copies that may still read the buffer; it is called before the
        memory is unlocked, and must not keep the buffer's owner alive.
        """
        if not self.pinning.allowed or not self._make_room(buffer.nbytes, need):
            return None
        with self._mutex:
            try:
                pinned = self.pinning.pin(buffer)
            except RuntimeError as error:  # never the reason that a run fails
                logger.warning(f"[MultiGPU] block swap: page-locking failed: {error}")
                pinned = False
            if not pinned:
                return None
            lock = PageLock(self, buffer, settle, need)
            self._held.append(lock)
            self.nbytes += buffer.nbytes
            return lock

    def forget(self, lock: PageLock) -> None:
        """Unlock what ``lock`` has; nothing reads it any more."""
        with self._mutex:
            buffer = lock.take_buffer()
            if buffer is not None:
                self._held.remove(lock)
                self.nbytes -= buffer.nbytes
                self.pinning.unpin(buffer)

    def _room(self) -> int:
        return min(self._limit() - self.nbytes, self.pinning.room())

    def _make_room(self, nbytes: int, need: Need) -> bool:
        """Have ``nbytes`` to lock: from those who need them less than ``need``, or from the host.

        The least needed go first, and none where they would not suffice.
        """
        with self._mutex:
            lesser = [lock for lock in self._held if lock.need > need]
        missing = nbytes - self._room()
        if missing > sum(lock.nbytes for lock in lesser):
            self.pinning.make_room(nbytes)
            missing = nbytes - self._room()
        if missing > sum(lock.nbytes for lock in lesser):
            return False
        for lock in sorted(lesser, key=lambda lock: -lock.need):
            if self._room() >= nbytes:
                break
            lock.release()
        return True
