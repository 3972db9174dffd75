"""Page-locking through ComfyUI's own functions, over a driver that counts and can refuse."""

import gc
import threading

import pytest
import torch

from conftest import LAYERS
from rig import page_locking

MIB = 1 << 20
EVERYTHING_IN_RAM = "cpu,*"
BUDGET = 10 * MIB


@pytest.fixture
def cudart(bench, monkeypatch):
    cudart = page_locking.install(monkeypatch, bench.mm, BUDGET)
    donor_link = bench.module("donor_link")
    monkeypatch.setattr(donor_link, "CHUNK_BYTES", 1 << 16)  # the ring of a tiny model
    monkeypatch.setattr(bench.module("page_locks"), "MARGIN", 0)  # in RAM of this machine's size
    yield cudart
    bench.clear()
    gc.collect()
    assert cudart.held == {}  # every test gives back exactly what it has taken
    assert bench.mm.TOTAL_PINNED_MEMORY == 0


@pytest.fixture
def ring_bytes(bench, cudart):
    donor_link = bench.module("donor_link")
    return donor_link.CHUNK_BYTES * donor_link.RING_CHUNKS


def load(bench, text=EVERYTHING_IN_RAM, **inputs):
    patcher = bench.load(bench.distorch(text, **inputs))
    bench.mm.load_models_gpu([patcher])
    return patcher


def evict(bench, patcher):
    """What a model that needs the whole device does to one on it."""
    bench.mm.free_memory(1 << 50, patcher.load_device)
    assert not bench.state(patcher).loaded


def locked(bench, patcher):
    return [pack.locked for pack in bench.state(patcher).packs]


def test_homes_stay_within_the_budget_of_the_host(bench, cudart, ring_bytes, reference):
    """ComfyUI 0.24 and newer lock whatever they are asked to."""
    patcher = load(bench)
    nbytes = bench.state(patcher).packs[0].nbytes
    assert sum(locked(bench, patcher)) == (BUDGET - ring_bytes) // nbytes < LAYERS
    assert cudart.nbytes == bench.mm.TOTAL_PINNED_MEMORY <= BUDGET
    del patcher
    bench.clear()
    latent = bench.sample(bench.distorch(EVERYTHING_IN_RAM), seed=1)
    assert latent.equal(reference[1])
    assert 0 < bench.state().swap.count_staged() < LAYERS
    assert cudart.peak <= BUDGET


def test_the_plugin_has_a_budget_of_its_own(bench, cudart, monkeypatch):
    """A container's limit counts, which ComfyUI does not know, and so does the platform's."""
    monkeypatch.setattr(bench.mm, "MAX_PINNED_MEMORY", 1 << 40)
    utils = bench.module("device_utils")
    monkeypatch.setattr(utils, "ram", lambda: (64 * MIB, 8 * MIB))
    load(bench)
    assert 0 < cudart.peak <= 0.9 * 8 * MIB


def test_homes_leave_a_margin_below_the_hosts_limit(bench, cudart, monkeypatch):
    """Others page-lock as well, and some of them count for nobody."""
    monkeypatch.setattr(bench.module("page_locks"), "MARGIN", 0.5)
    monkeypatch.setattr(bench.module("device_utils"), "ram", lambda: (8 * MIB, 8 * MIB))
    load(bench)
    assert 0 < cudart.peak <= BUDGET - 4 * MIB


def test_where_everything_may_be_locked_no_ring_is_kept(bench, cudart, monkeypatch):
    monkeypatch.setattr(bench.mm, "MAX_PINNED_MEMORY", 1 << 30)
    patcher = load(bench)
    assert all(locked(bench, patcher))
    assert cudart.nbytes == sum(pack.nbytes for pack in bench.state(patcher).all_packs())
    assert bench.state(patcher).swap.count_staged() == 0


@pytest.mark.parametrize("granted", [0, 1, 3])
def test_a_driver_that_refuses_is_not_asked_again(bench, cudart, monkeypatch, granted):
    """The ring has to come first: once the driver refuses, there is nothing left for it."""
    monkeypatch.setattr(bench.mm, "MAX_PINNED_MEMORY", 1 << 30)
    cudart.refuse_from = granted
    patcher = load(bench)
    assert cudart.calls == granted + 1
    assert len(cudart.held) == granted
    assert sum(locked(bench, patcher)) == max(0, granted - 1)
    donor_link = bench.module("donor_link")
    if granted:
        assert donor_link.CHUNK_BYTES * donor_link.RING_CHUNKS in cudart.held.values()


def test_a_refusal_changes_no_latent(bench, cudart, reference):
    cudart.refuse_from = 4
    assert bench.sample(bench.distorch(EVERYTHING_IN_RAM), seed=1).equal(reference[1])


def test_an_evicted_model_gives_its_page_locks_to_the_next(bench, cudart, monkeypatch, ring_bytes):
    """Wan 2.2's experts: each has the whole budget while it runs."""
    first = load(bench)
    other = bench.load(bench.distorch(EVERYTHING_IN_RAM, unet_name="other.safetensors"))
    alone = sum(locked(bench, first))
    for patcher, evicted in ((other, first), (first, other), (other, first)):
        evict(bench, evicted)
        assert not bench.state(evicted).loaded
        bench.mm.load_models_gpu([patcher])
        assert sum(locked(bench, patcher)) == alone
        assert cudart.nbytes <= BUDGET


def test_homes_of_what_is_resident_are_locked_after_what_travels(bench, cudart, monkeypatch):
    """So that the change of experts is an upload from page-locked memory."""
    monkeypatch.setattr(bench.module("device_utils"), "ram", lambda: (1 << 40, 1 << 40))
    patcher = load(bench, "acc:0,11mb;cpu,*")
    state = bench.state(patcher)
    resident = [p for p in state.packs if p.device == state.swap.compute_device]
    swapped = [p for p in state.packs if p.device != state.swap.compute_device]
    assert all(p.locked for p in swapped)
    homes_locked = sum(p.locked for p in resident)
    assert resident and homes_locked < len(resident)  # the budget is out by then
    monkeypatch.setattr(bench.mm, "MAX_PINNED_MEMORY", 1 << 30)
    bench.clear()
    state = bench.state(load(bench, "acc:0,11mb;cpu,*"))
    assert all(pack.locked for pack in state.all_packs())


def test_page_locks_are_where_they_were_after_ten_loads(bench, cudart):
    seen = set()
    for _ in range(10):
        patcher = load(bench)
        seen.add((cudart.nbytes, len(cudart.held)))
        bench.mm.unload_all_models()
        del patcher
        gc.collect()
        assert cudart.held == {}
    assert len(seen) == 1


def test_a_user_who_has_switched_page_locking_off_gets_none(bench, cudart, monkeypatch):
    locks = bench.module("host_memory").page_locks()
    monkeypatch.setattr(
        locks,
        "pinning",
        bench.module("page_locks").Pinning(**{**vars(locks.pinning), "allowed": False}),
    )
    patcher = load(bench)
    assert cudart.calls == 0
    assert bench.state(patcher).swap.count_staged() == 0


def test_a_sampler_run_asks_for_no_pins_and_no_ram_that_are_there_already(bench, monkeypatch):
    """ComfyUI would unpin text encoder and VAE for the whole model at every prompt."""
    asked = []
    free_memory = bench.mm.free_memory

    def noting(*args, **kwargs):
        asked.append((kwargs.get("pins_required", 0), kwargs.get("ram_required", 0)))
        return free_memory(*args, **kwargs)

    monkeypatch.setattr(bench.mm, "free_memory", noting)
    patcher = bench.load(bench.distorch("acc:0,8mb;cpu,*"))
    bench.mm.load_models_gpu([patcher])
    first, asked[:] = list(asked), []
    packs = bench.state(patcher).all_packs()
    bench.mm.load_models_gpu([patcher])
    assert asked and set(asked) == {(0, 0)}
    if any(hasattr(bench.mm, name) for name in ("ensure_pin_budget", "get_free_ram")):
        assert max(max(pair) for pair in first) >= sum(pack.nbytes for pack in packs)
    evict(bench, patcher)
    asked.clear()
    bench.mm.load_models_gpu([patcher])
    assert asked and set(asked) == {(0, 0)}


def test_a_loaded_model_gets_page_locks_that_become_free(bench, cudart, monkeypatch):
    monkeypatch.setattr(bench.mm, "MAX_PINNED_MEMORY", 20 * MIB)
    first = load(bench)
    other = load(bench, unet_name="other.safetensors")
    assert sum(locked(bench, other)) < LAYERS <= sum(locked(bench, first))
    bench.state(first).unload(first.offload_device, donors_too=True)
    bench.mm.load_models_gpu([other])
    assert all(locked(bench, other))
    assert bench.state(other).swap.count_staged() == 0


def test_no_ring_goes_past_the_budget(bench, cudart, monkeypatch):
    """Then copies are slow, which is better than somebody else's copy failing."""
    monkeypatch.setattr(bench.mm, "MAX_PINNED_MEMORY", MIB // 8)
    beside = []
    utils = bench.module("device_utils")
    monkeypatch.setattr(utils, "page_locked", lambda nbytes: beside.append(nbytes))
    patcher = load(bench)
    assert beside == []
    assert cudart.nbytes == 0
    assert bench.state(patcher).swap.count_staged() == 0


def test_blocks_that_were_given_back_travel_page_locked(bench, cudart, monkeypatch):
    monkeypatch.setattr(bench.mm, "MAX_PINNED_MEMORY", 1 << 30)
    patcher = load(bench, "acc:0,*")
    with torch.inference_mode():
        patcher.partially_unload(torch.device("cpu"), 1 << 40)
    assert all(locked(bench, patcher))


def test_a_collection_in_the_staging_worker_does_not_wait_for_itself(bench, cudart, monkeypatch):
    """What is collected there may be the model whose copy the worker is at."""
    monkeypatch.setattr(bench.module("device_utils"), "ram", lambda: (1 << 40, 1 << 40))
    monkeypatch.setattr(bench.mm, "MAX_PINNED_MEMORY", 3 * MIB)
    patcher = load(bench, "acc:0,8mb;cpu,*")
    state = bench.state(patcher)
    state.layout.non_block.lock(
        bench.module("host_memory").page_locks(),
        bench.module("page_locks").Need.HOME,
        state.swap.links.synchronize,
    )
    assert state.swap.count_staged() > 0
    ring = bench.module("donor_link").Ring
    copy, collected = ring.copy, threading.Event()

    def collecting(*args):
        copy(*args)
        gc.collect()
        collected.set()

    state.swap.settle()
    monkeypatch.setattr(ring, "copy", collecting)
    state.swap._prefetch()
    patcher.model.itself = patcher.model
    bench.mm.current_loaded_models.clear()
    del patcher, state
    assert collected.wait(20)
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("block-swap"):
            thread.join(20)
            assert not thread.is_alive()
