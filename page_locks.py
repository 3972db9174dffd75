"""Page-locked host memory: one budget for the process, and who has what of it.

Page-locked memory cannot be swapped out, and every platform has a limit beyond which somebody
else's copy fails, or the kernel kills. Whoever wants more than is left gets it from those who need
it less: homes of unloaded models first, then homes of what is resident elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch

logger = logging.getLogger("MultiGPU")

# Shares of RAM: what may be page-locked at most (Windows itself stops at about half of RAM), and
# what of that homes leave to others: staging rings, and buffers that PyTorch page-locks itself.
LOCKABLE_WINDOWS = 0.40
LOCKABLE = 0.90
MARGIN = 0.05


@dataclass(frozen=True)
class Limit:
    """What may be page-locked here, in bytes: ``most`` in all, of which homes leave ``margin``."""

    most: int
    margin: int

    @classmethod
    def of(cls, ram: int, windows: bool) -> Limit:
        """That of a machine, or a container, of ``ram`` bytes."""
        return cls(int(ram * (LOCKABLE_WINDOWS if windows else LOCKABLE)), int(ram * MARGIN))


class Need(IntEnum):
    """Who needs page-locked memory most, first."""

    RING = 0  # what everything goes through that has none
    TRAVELS = 1  # copied in every pass
    HOME = 2  # copied when its model comes back to the compute device
    UNLOADED = 3  # copied when its model is loaded again


@dataclass(frozen=True)
class Pinning:
    """How the host page-locks memory in place.

    ``pin`` and ``unpin`` take a tensor and return whether they succeeded. ``room`` gives the bytes
    that the host's own count has left, ``make_room`` asks the host to unlock for so many bytes what
    it can do without. ``able`` says whether it page-locks at all on this machine; ``allowed`` is
    False where the user has switched that off.
    """

    pin: Callable[[torch.Tensor], bool]
    unpin: Callable[[torch.Tensor], bool]
    room: Callable[[], int]
    make_room: Callable[[int], object]
    able: Callable[[], bool]
    allowed: bool = True


class PageLock:
    """Page-locked memory of one owner, until ``release``."""

    def __init__(self, locks: PageLocks, buffer: torch.Tensor, settle: Callable, need: Need):
        self.need = need
        self.buffer = buffer
        self.nbytes = buffer.nbytes
        self._locks = locks
        self._settle = settle

    @property
    def held(self) -> bool:
        """Whether the memory is still page-locked."""
        return self in self._locks

    def release(self) -> None:
        """Unlock the memory, once no copy reads it any more. Releasing twice is harmless."""
        if self.held:
            self._settle()
            self._locks.unlock(self)


class PageLocks:
    """Page-locks buffers within ``limit()`` and what the host has room for.

    Nothing here waits for another thread, nor holds a mutex: a finalizer may release a lock in any
    thread and at any point, also while that thread is making one.
    """

    def __init__(self, pinning: Pinning, limit: Callable[[], Limit]):
        self.pinning = pinning
        self._limit = limit
        self._held: dict[PageLock, None] = {}  # oldest first

    def __contains__(self, lock: PageLock) -> bool:
        return lock in self._held

    @property
    def nbytes(self) -> int:
        """Bytes that are page-locked here."""
        return sum(lock.nbytes for lock in list(self._held))

    def lock(self, buffer: torch.Tensor, need: Need, settle: Callable[[], None]) -> PageLock | None:
        """Page-lock ``buffer``; ``None`` where the budget or the host refuses.

        ``settle`` waits for the copies that may still read the buffer; it is called before the
        memory is unlocked, and must not keep the buffer's owner alive.
        """
        if not self.pinning.allowed or not self._make_room(buffer.nbytes, need):
            return None
        lock = PageLock(self, buffer, settle, need)
        self._held[lock] = None  # counts from now on, for other threads too
        if self._limit().most < self.nbytes or not self._pin(buffer):
            self._held.pop(lock, None)
            return None
        return lock

    def _pin(self, buffer: torch.Tensor) -> bool:
        try:
            return bool(self.pinning.pin(buffer))
        except RuntimeError as error:  # never the reason that a run fails
            logger.warning(f"[MultiGPU] block swap: page-locking failed: {error}")
            return False

    def unlock(self, lock: PageLock) -> None:
        """Unlock what ``lock`` has; nothing reads it any more."""
        if lock not in self._held:
            return
        if self.pinning.unpin(lock.buffer):
            self._held.pop(lock, None)
        else:
            # Memory that is freed while the driver has it registered is somebody else's crash.
            lock.need = Need.RING
            logger.warning("[MultiGPU] block swap: page-locked memory could not be unlocked: kept")

    def _room(self, need: Need) -> int:
        limit = self._limit()
        room = min(limit.most - self.nbytes, self.pinning.room())
        return room if need is Need.RING else room - limit.margin

    def _make_room(self, nbytes: int, need: Need) -> bool:
        """Have ``nbytes`` to lock: from those who need them less than ``need``, or from the host.

        The least needed go first, and none where they would not suffice.
        """
        lesser = [lock for lock in list(self._held) if lock.need > need]
        missing = nbytes - self._room(need)
        if missing > sum(lock.nbytes for lock in lesser):
            self.pinning.make_room(nbytes + self._limit().margin)
            missing = nbytes - self._room(need)
        if missing > sum(lock.nbytes for lock in lesser):
            return False
        for lock in sorted(lesser, key=lambda lock: -lock.need):
            if self._room(need) >= nbytes:
                break
            lock.release()
        return self._room(need) >= nbytes
