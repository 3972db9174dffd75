"""The budget of page-locked memory: what it grants, to whom, and that it is given back."""

import gc
import weakref

import pytest
import torch

from block_swap.page_locks import Limit, Need, PageLocks
from rig import page_locking

GIB = 1 << 30


def nothing():
    pass


@pytest.fixture
def cudart():
    return page_locking.Cudart()


def buffers(count, nbytes=100):
    return [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(count)]


def budget(cudart, limit=1 << 60, margin=0, **pinning):
    functions = page_locking.pinning(cudart)
    vars(functions).update(pinning)
    return PageLocks(functions, lambda: Limit(limit, margin))


@pytest.mark.parametrize(
    ("ram", "windows", "most"), [(32, False, 27.2), (32, True, 11.2), (64, False, 54.4)]
)
def test_a_share_of_ram_by_platform(ram, windows, most):
    limit = Limit.of(ram * GIB, windows)
    assert limit.most - limit.margin == pytest.approx(most * GIB, rel=1e-6)
    assert limit.most <= (0.4 if windows else 0.9) * ram * GIB  # ComfyUI's own


def test_homes_leave_a_margin_that_rings_may_take(cudart):
    """Of the host's room, too: others page-lock without asking anybody."""
    for room in (lambda: 1 << 60, lambda: 350 - cudart.nbytes):
        locks = budget(cudart, limit=350, margin=100, room=room)
        held = [locks.lock(b, Need.TRAVELS, nothing) for b in buffers(3)]
        assert [lock is not None for lock in held] == [True, True, False]
        ring = locks.lock(buffers(1)[0], Need.RING, nothing)
        assert ring is not None
        for lock in (*held[:2], ring):
            lock.release()


def test_no_more_than_the_limit(cudart):
    locks = budget(cudart, limit=350)
    held = [locks.lock(b, Need.TRAVELS, nothing) for b in buffers(5)]
    assert [lock is not None for lock in held] == [True, True, True, False, False]
    assert locks.nbytes == cudart.nbytes == cudart.peak == 300
    assert cudart.calls == 3  # what is over the budget is not tried


def test_no_more_than_the_host_has_left(cudart):
    """ComfyUI counts the pins of its own models too."""
    locks = budget(cudart, room=lambda: 250 - cudart.nbytes)
    held = [locks.lock(b, Need.TRAVELS, nothing) for b in buffers(4)]
    assert [lock is not None for lock in held] == [True, True, False, False]


def test_the_host_is_asked_to_make_room_once_nothing_else_helps(cudart):
    asked, left = [], [150]

    def make_room(nbytes):
        asked.append(nbytes)
        left[0] = 350

    locks = budget(cudart, room=lambda: left[0] - cudart.nbytes, make_room=make_room)
    assert locks.lock(buffers(1)[0], Need.UNLOADED, nothing) is not None
    assert locks.lock(buffers(1)[0], Need.TRAVELS, nothing) is not None
    assert asked == []  # the lesser need gave way
    assert locks.lock(buffers(1)[0], Need.TRAVELS, nothing) is not None
    assert asked == [100]


def test_what_was_locked_is_given_back_exactly(cudart):
    locks = budget(cudart, limit=1000)
    held = [locks.lock(b, Need.HOME, nothing) for b in buffers(5)]
    for lock in held[::2]:
        lock.release()
        lock.release()
    assert locks.nbytes == cudart.nbytes == 200
    assert [lock.held for lock in held] == [False, True, False, True, False]
    for lock in held:
        lock.release()
    assert locks.nbytes == cudart.nbytes == 0


def test_whoever_needs_it_most_gets_it(cudart):
    locks = budget(cudart, limit=300)
    home, travels, unloaded = (
        locks.lock(b, need, nothing)
        for b, need in zip(buffers(3), (Need.HOME, Need.TRAVELS, Need.UNLOADED), strict=True)
    )
    assert locks.lock(buffers(1)[0], Need.HOME, nothing) is not None
    assert (unloaded.held, home.held, travels.held) == (False, True, True)
    assert locks.lock(buffers(1)[0], Need.HOME, nothing) is None
    assert locks.lock(buffers(1)[0], Need.TRAVELS, nothing) is not None
    assert (home.held, travels.held) == (False, True)


def test_nobody_gives_way_where_that_does_not_suffice(cudart):
    locks = budget(cudart, limit=300)
    unloaded = locks.lock(buffers(1)[0], Need.UNLOADED, nothing)
    assert locks.lock(buffers(1, 301)[0], Need.TRAVELS, nothing) is None
    assert unloaded.held


def test_a_buffer_is_unlocked_when_no_copy_reads_it_any_more(cudart):
    locks = budget(cudart)
    (buffer,) = buffers(1)
    order = []
    locks.pinning.unpin = lambda _: order.append("unlocked") or True
    locks.lock(buffer, Need.TRAVELS, lambda: order.append("settled")).release()
    assert order == ["settled", "unlocked"]


@pytest.mark.parametrize("refusal", ["returns", "raises"])
def test_a_host_that_refuses_is_no_error(cudart, refusal):
    def pin(_):
        if refusal == "raises":
            raise RuntimeError("CUDA error: out of memory")
        return False

    locks = budget(cudart, pin=pin)
    assert locks.lock(buffers(1)[0], Need.TRAVELS, nothing) is None
    assert locks.nbytes == 0


def test_a_user_who_has_switched_it_off_is_respected(cudart):
    locks = budget(cudart, allowed=False)
    assert locks.lock(buffers(1)[0], Need.TRAVELS, nothing) is None
    assert cudart.calls == 0


def test_memory_that_cannot_be_unlocked_is_kept_and_counted(cudart):
    """Freed while the driver has it registered, it would be somebody else's crash."""
    locks = budget(cudart, unpin=lambda _: False)
    (buffer,) = buffers(1)
    lock = locks.lock(buffer, Need.UNLOADED, nothing)
    dead = weakref.ref(buffer)
    lock.release()
    del buffer, lock
    gc.collect()
    assert dead() is not None
    assert locks.nbytes == 100


def test_a_finalizer_may_release_a_lock_while_another_is_made(cudart):
    locks = budget(cudart, limit=250)
    first = locks.lock(buffers(1)[0], Need.TRAVELS, nothing)
    pin = locks.pinning.pin

    def collected_meanwhile(tensor):
        first.release()
        return pin(tensor)

    locks.pinning.pin = collected_meanwhile
    second = locks.lock(buffers(1)[0], Need.TRAVELS, nothing)
    assert (first.held, second.held) == (False, True)
    assert locks.nbytes == cudart.nbytes == 100
