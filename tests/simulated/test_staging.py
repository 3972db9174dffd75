"""Homes that the host cannot page-lock: staged through a page-locked ring by a worker thread."""

import gc
import threading
import weakref

import pytest
import torch

from block_swap import device_utils, donor_link
from block_swap.packed_weights import Pack
from block_swap.page_locks import Limit, Need, PageLocks
from rig import page_locking as page_locking_rig
from rig import simulator
from toy import COMPUTE, Model, at_home, swap_of

BANDWIDTH = 1e6  # bytes per virtual second


@pytest.fixture(autouse=True)
def page_locking(monkeypatch):
    """Homes are pageable, copies from pageable memory block the host, and a ring can be had."""
    rings = []

    def page_locked(nbytes):
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        rings.append(buffer)
        simulator.page_locking.lock(buffer)
        return buffer

    monkeypatch.setattr(device_utils, "page_locked", page_locked)
    monkeypatch.setattr(donor_link, "CHUNK_BYTES", 1 << 10)
    simulator.page_locking.enforced = True
    yield rings
    gc.collect()
    join_workers()  # which hold a model until they are done with it
    simulator.page_locking.enforced = False
    for buffer in rings:
        simulator.page_locking.unlock(buffer)


def join_workers():
    for thread in threading.enumerate():
        if thread.name.startswith("block-swap"):
            thread.join(10)
            assert not thread.is_alive()


def inputs():
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).to(COMPUTE)


@pytest.mark.parametrize("inference", [False, True])  # ComfyUI loads and samples in it
def test_the_result_is_that_of_the_unswapped_model(page_locking, inference):
    x = inputs()
    expected = Model()(x.cpu())
    with torch.inference_mode(inference):
        model = Model()
        swap = swap_of(model, ["cpu"] * 8)
        assert swap.count_staged() == 8
        for _ in range(4):
            assert torch.equal(model(x).cpu(), expected)
    assert at_home(swap, model)
    assert swap.count_staged() == 8
    (ring,) = page_locking
    assert ring.nbytes == donor_link.RING_CHUNKS * donor_link.CHUNK_BYTES
    # A block is more than a chunk, so that the ring has gone round many times.
    assert swap._packs[0].nbytes > 4 * donor_link.CHUNK_BYTES


def step(model, x):
    """Virtual seconds of a pass in the steady state."""
    simulator.clock.flops = float("inf")
    simulator.clock.inline_bytes = 0
    simulator.clock.set_bandwidth(BANDWIDTH)
    for _ in range(2):
        model(x)
    start, end = (torch.acc.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        model(x)
    end.record()
    simulator.clock.reset_rates()
    return start.elapsed_time(end) / 1000 / 3


class Slow(torch.nn.Module):
    """A block that computes for as long as its copy takes."""

    def __init__(self, block, seconds):
        super().__init__()
        self.block = block
        self.seconds = seconds

    def forward(self, x):
        simulator.clock.charge(x.device, self.seconds)
        return self.block(x)


def slow_model():
    model = Model()
    seconds = Pack.layout(model.blocks[0].modules()).nbytes / BANDWIDTH
    model.blocks = torch.nn.ModuleList(Slow(block, seconds) for block in model.blocks)
    return model, seconds


def test_staged_copies_overlap_with_the_computation():
    x = inputs()
    model, seconds = slow_model()
    swap = swap_of(model, ["cpu"] * 8)
    bound = 8 * seconds
    assert step(model, x) <= 1.05 * bound
    assert swap.count_staged() == 8


def test_without_page_locked_memory_copies_are_correct_and_do_not_overlap(monkeypatch):
    x = inputs()
    monkeypatch.setattr(device_utils, "page_locked", lambda nbytes: None)
    expected = Model()(x.cpu())
    model, seconds = slow_model()
    swap = swap_of(model, ["cpu"] * 8)
    assert torch.equal(model(x).cpu(), expected)
    assert step(model, x) > 1.5 * 8 * seconds
    assert swap.count_staged() == 0


def test_page_locked_homes_are_not_staged(page_locking):
    x = inputs()
    model = Model()
    swap = swap_of(model, ["cpu"] * 8)
    functions = page_locking_rig.pinning(page_locking_rig.Cudart())
    functions.pin = simulator.page_locking.lock
    functions.unpin = lambda tensor: simulator.page_locking.unlock(tensor) is None
    locks = PageLocks(functions, lambda: Limit(1 << 40, 0))
    for pack in swap._packs[:5]:
        assert pack.lock(locks, Need.TRAVELS, swap.links.synchronize)
    assert swap.count_staged() == 3
    assert torch.equal(model(x).cpu(), Model()(x.cpu()))
    for pack in swap._packs[:5]:
        pack.unlock()


def test_a_chunk_is_not_overwritten_before_it_has_left(monkeypatch):
    """The simulator knows of every copy which host memory it has yet to read."""
    x = inputs()
    overwritten = []
    copy_ = torch.Tensor.copy_

    def watched(target, source, *args, **kwargs):
        if target.device.type == "cpu" and source.device.type == "cpu":
            overwritten.append(simulator.host_in_flight(target))
        return copy_(target, source, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", watched)
    model = Model()
    swap_of(model, ["cpu"] * 8)
    model(x)
    assert overwritten and not any(overwritten)
    overwritten.clear()
    monkeypatch.setattr(simulator.Event, "synchronize", lambda event: None)
    model(x)
    assert any(overwritten)  # so it can be told


def test_an_error_in_the_worker_fails_the_pass_and_not_the_next(monkeypatch):
    x = inputs()
    expected = Model()(x.cpu())
    model = Model()
    swap = swap_of(model, ["cpu"] * 8)
    assert torch.equal(model(x).cpu(), expected)
    copy, calls = donor_link.Ring.copy, []

    def fails_once(*args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("the ring is gone")
        copy(*args)

    monkeypatch.setattr(donor_link.Ring, "copy", fails_once)
    with pytest.raises(MemoryError):
        model(x)
    assert at_home(swap, model)
    assert torch.equal(model(x).cpu(), expected)


def test_homes_move_only_after_the_worker_is_done():
    x = inputs()
    expected = Model()(x.cpu())
    model = Model()
    swap = swap_of(model, ["cpu"] * 8)
    model(x)
    with swap.writing_homes():
        assert all(slot.queued is None for slot in swap._slots)
        for pack in swap._packs:
            assert not simulator.host_in_flight(pack.flat)
    swap.drop_slots()
    swap._packs[3].place(torch.device("acc:1"))
    swap.update(2)
    assert torch.equal(model(x).cpu(), expected)


def test_a_model_that_dies_while_it_is_staged_is_not_waited_for_by_itself(monkeypatch):
    """Its last reference may be that of the worker, which cannot wait for its own work."""
    x = inputs()
    model = Model()
    swap = swap_of(model, ["cpu"] * 8)
    model(x)
    release, started = threading.Event(), threading.Event()
    copy = donor_link.Ring.copy

    def slow(*args):
        started.set()
        release.wait(10)
        copy(*args)

    swap.settle()
    monkeypatch.setattr(donor_link.Ring, "copy", slow)
    swap._prefetch()
    dead = weakref.ref(swap)
    assert started.wait(10)
    del model, swap
    gc.collect()
    assert dead() is not None  # held by what the worker does
    release.set()
    join_workers()
    assert dead() is None
    gc.collect()
    simulator.check()
