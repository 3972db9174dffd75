"""The instruments themselves: a card tells of what is known to have happened."""

import pytest
import torch

from rig.card import MIB


@pytest.fixture(autouse=True)
def empty(bench):
    """Nothing of an earlier test is on the card."""


def bytes_on(device, number):
    return torch.empty(number, dtype=torch.uint8, device=device)


def test_memory_is_counted_by_the_allocator_and_by_the_driver(card):
    device = card.compute
    allocated, used = card.allocated(device), card.used(device)
    tensor = bytes_on(device, 64 * MIB)
    assert card.allocated(device) - allocated == 64 * MIB
    assert 0 <= card.used(device) - used - 64 * MIB <= card.segments
    del tensor
    assert card.peak(device) - allocated == 64 * MIB
    card.reset()
    assert card.allocated(device) == card.peak(device) == allocated
    assert card.used(device) == used


def test_copies_are_told_apart_by_their_ends_and_their_streams(card):
    device, module = card.compute, card.module
    pinned = torch.empty(8 * MIB, dtype=torch.uint8, pin_memory=True)
    target, pageable = bytes_on(device, pinned.nbytes), torch.ones(2 * MIB)
    stream = module.Stream(device=device)
    stream.wait_stream(module.current_stream(device))
    with card.traffic() as traffic:
        with module.stream(stream):
            target.copy_(pinned, non_blocking=True)
        module.current_stream(device).wait_stream(stream)
        up = pageable.to(device)
        down = (up[: up.numel() // 2] + 1).cpu()
    (swapped,) = traffic.swapped()
    assert (swapped.source, swapped.destination) == ("cpu", device)
    assert (swapped.nbytes, swapped.pinned) == (pinned.nbytes, True)
    others = {(c.source, c.destination, c.nbytes, c.pinned) for c in traffic.others()}
    assert others == {
        ("cpu", device, pageable.nbytes, False),
        (device, "cpu", down.nbytes, False),
    }


def test_a_delay_takes_its_time_in_its_stream_alone(card):
    streams = [card.module.Stream(device=card.compute) for _ in range(2)]
    start, end = (card.module.Event(enable_timing=True) for _ in range(2))
    start.record(streams[0])
    card.delay(streams[0], 0.05)
    end.record(streams[0])
    streams[1].synchronize()
    end.synchronize()
    assert 40 < start.elapsed_time(end) < 200


def test_page_locks_are_counted_and_can_be_refused(card):
    runtime, before = torch.cuda.cudart(), dict(card.locks.held)
    buffer = torch.zeros(3 * MIB, dtype=torch.uint8)
    with card.locks.refusing(buffer.nbytes):
        assert runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1) != 0
    assert card.locks.held == before
    assert runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 1) == 0
    assert card.locks.held == {**before, buffer.data_ptr(): buffer.nbytes}
    assert runtime.cudaHostUnregister(buffer.data_ptr()) == 0
    assert card.locks.held == before


def test_a_card_can_run_out_of_memory_and_be_nearly_full(card):
    with pytest.raises(torch.OutOfMemoryError):
        card.exhaust()
    used = card.used(card.compute)
    ballast = card.ballast(left=512 * MIB)
    total = card.module.mem_get_info(card.compute)[1]
    assert 0 <= card.used(card.compute) - (total - 512 * MIB) <= card.segments
    del ballast
    card.reset()
    assert card.used(card.compute) == used
