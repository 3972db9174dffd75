"""The budget of page-locked memory: what it grants, to whom, and that it is given back."""

import pytest
import torch

from block_swap.page_locks import Need, PageLocks, lockable
from rig import page_locking

GIB = 1 << 30


def nothing():
    pass


@pytest.fixture
def cudart():
    return page_locking.Cudart()


def buffers(count, nbytes=100):
    return [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(count)]


def budget(cudart, limit=1 << 60, **pinning):
    functions = page_locking.pinning(cudart)
    vars(functions).update(pinning)
    return PageLocks(functions, lambda: limit)


@pytest.mark.parametrize(
    ("ram", "windows", "most"), [(32, False, 27.2), (32, True, 11.2), (64, False, 54.4)]
)
def test_a_share_of_ram_by_platform(ram, windows, most):
    assert lockable(ram * GIB, windows) == pytest.approx(most * GIB)
    # Less than the host's own: 0.4 of RAM on Windows, where half is the limit, 0.9 elsewhere.
    assert lockable(ram * GIB, windows) < (0.4 if windows else 0.9) * ram * GIB


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
    locks.pinning.unpin = lambda _: order.append("unlocked")
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
