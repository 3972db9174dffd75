"""The time of a step on the virtual clock, against max(resident step, bytes / bandwidth)."""

import pytest
import torch

from conftest import COMPUTE, LAYERS
from rig import simulator

clock = simulator.clock
ledger = simulator.ledger
WARM_UP, PASSES = 4, 4


@pytest.fixture
def forward(bench):
    """Runs ``PASSES`` passes of a loaded patcher's model; returns the virtual seconds of one."""

    def run(patcher):
        model, dtype = patcher.model.diffusion_model, patcher.model.get_dtype_inference()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 16, 4, 16, 16, generator=generator).to(COMPUTE, dtype)
        context = torch.randn(1, 16, 4096, generator=generator).to(COMPUTE, dtype)
        t = torch.full((1,), 500.0).to(COMPUTE)
        start, end = (torch.acc.Event(enable_timing=True) for _ in range(2))
        with torch.inference_mode():
            for _ in range(WARM_UP):  # the second pass is timed, and the split then improved
                model(x, t, context)
                # As samplers do when they look at a latent: what is copied meanwhile goes on.
                torch.acc.current_stream().synchronize()
            model(x, t, context)  # the slots that the last one has filled would be a gift
            start.record()
            for _ in range(PASSES):
                model(x, t, context)
            end.record()
        return start.elapsed_time(end) / 1000 / PASSES

    yield run
    clock.reset_rates()


_known = {}


@pytest.fixture
def resident(bench, forward):
    """The sizes of the model, and the seconds of a pass with everything resident."""
    clock.flops = 1e9
    if not _known:  # one measurement is enough for all tests
        patcher = bench.load(bench.distorch("acc:0,1gb;cpu,*"))
        bench.mm.load_models_gpu([patcher])
        clock.set_bandwidth(1e30)
        _known["sizes"] = bench.state(patcher).split.sizes
        _known["seconds"] = forward(patcher)
        bench.clear()
    return _known["sizes"], _known["seconds"]


# The whole grid is that of bench/simulated_grid.py; these are points of it on a real Wan.
@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("blocks", [2, 5, 7])
def test_a_step_is_within_5_percent_of_the_bound(bench, forward, resident, blocks, ratio):
    """``blocks``: the quota's room behind non-block weights; ``ratio``: compute over transfer."""
    sizes, resident_step = resident
    block = sizes.blocks[0].nbytes
    bandwidth = block / (resident_step / LAYERS) * ratio
    quota = sizes.total_bytes - LAYERS * block + blocks * block
    patcher = bench.load(bench.distorch(f"acc:0,{quota}b;cpu,*"))
    bench.mm.load_models_gpu([patcher])
    split = bench.state(patcher).split
    clock.set_bandwidth(bandwidth, "cpu", COMPUTE)
    step = forward(patcher)
    assert step <= 1.05 * max(resident_step, split.bytes_per_pass / bandwidth)
    assert bench.state(patcher).split.compute_bytes <= split.compute_bytes


@pytest.fixture
def transfer_bound(bench, forward, resident):
    """A patcher of which six blocks are swapped, computed in half the time of their copies."""
    sizes, resident_step = resident
    block = sizes.blocks[0].nbytes
    clock.set_bandwidth(block / (resident_step / LAYERS) * 0.5, "cpu", COMPUTE)
    quota = sizes.total_bytes - LAYERS * block + 5 * block
    patcher = bench.load(bench.distorch(f"acc:0,{quota}b;cpu,*"))
    bench.mm.load_models_gpu([patcher])
    split = bench.state(patcher).split
    assert (split.slots, len(split.swapped)) == (3, 6)
    return patcher, resident_step


def test_a_timed_pass_is_predicted_and_its_split_improved(bench, forward, transfer_bound):
    """Where copies take longest, a slot becomes a resident block, between passes."""
    patcher, resident_step = transfer_bound
    state = bench.state(patcher)
    planned, held = state.split, ledger.allocated[COMPUTE]
    state.swap.watch.time_passes(None)
    first = forward(patcher)
    assert state.split is planned
    state.swap.watch.time_passes(state._timed)
    second = forward(patcher)
    assert (state.split.slots, len(state.split.swapped)) == (2, 5)
    assert second < 0.9 * first
    step_time = bench.module("step_time")
    assert first == pytest.approx(step_time.predict(planned, state.tuner.timing), rel=0.05)
    assert second == pytest.approx(step_time.predict(state.split, state.tuner.timing), rel=0.05)
    assert state.tuner.timing.compute == pytest.approx(resident_step, rel=0.05)
    # The exchange takes no more memory than the split had.
    assert ledger.allocated[COMPUTE] <= held + 20_000
    assert patcher.loaded_size() == state.split.compute_bytes


def test_an_improvement_without_memory_for_it_leaves_the_split_as_it_was(
    bench, forward, transfer_bound, monkeypatch
):
    patcher, _ = transfer_bound
    state = bench.state(patcher)
    planned, place, failed = state.split, state._place, []

    def fails_once():
        if not failed:
            failed.append(True)
            state.swap.drop_slots()
            raise torch.OutOfMemoryError("simulated")
        place()

    monkeypatch.setattr(state, "_place", fails_once)
    before = bench.mm.current_loaded_models[0]
    forward(patcher)
    assert failed and state.split is planned
    assert bench.mm.current_loaded_models[0] is before
    assert patcher.loaded_size() == planned.compute_bytes


def test_what_was_given_back_is_not_taken_by_an_improvement(bench, forward, transfer_bound):
    """Another model has that memory now; the next load asks for it."""
    patcher, _ = transfer_bound
    with torch.inference_mode():
        patcher.partially_unload(torch.device("cpu"), 1 << 40)
    left = patcher.loaded_size()
    state = bench.state(patcher)
    forward(patcher)
    assert state.tuner.timing is not None
    assert patcher.loaded_size() == left + state.swap.slot_bytes
    bench.mm.load_models_gpu([patcher])
    assert patcher.loaded_size() == state.split.compute_bytes


def test_memory_that_is_gone_in_the_middle_of_an_improvement_fails_no_pass(
    bench, forward, transfer_bound, monkeypatch
):
    patcher, _ = transfer_bound
    state = bench.state(patcher)
    pack_class = type(state.packs[0])
    place = pack_class.place

    def taken(pack, device, keep_home=False):
        if device == torch.device(COMPUTE) and pack.device != device:
            raise torch.OutOfMemoryError("taken by another model")
        place(pack, device, keep_home)

    monkeypatch.setattr(pack_class, "place", taken)
    forward(patcher)
    assert patcher.loaded_size() <= state.split.compute_bytes


def test_an_exchange_that_loses_is_taken_back(bench, forward, transfer_bound, monkeypatch):
    """Whatever was predicted: the next timed pass of the same shape decides."""
    patcher, _ = transfer_bound
    state = bench.state(patcher)
    planned, held = state.split, ledger.allocated[COMPUTE]
    step_time = bench.module("step_time")
    worse = step_time.replace(planned, slots=1)
    monkeypatch.setattr(step_time, "improve", lambda split, timing: worse)
    tried = []
    place = state._place
    monkeypatch.setattr(state, "_place", lambda: (tried.append(state.split), place()))
    forward(patcher)
    assert tried == [worse, planned]
    assert state.split is planned
    assert ledger.allocated[COMPUTE] <= held + 20_000
    forward(patcher)
    assert tried == [worse, planned]  # nor is it tried again before the next load


def test_an_exchange_that_wins_stays(bench, forward, transfer_bound):
    patcher, _ = transfer_bound
    state = bench.state(patcher)
    forward(patcher)
    better = state.split
    assert state.tuner.on_trial is None  # confirmed
    forward(patcher)
    assert state.split is better


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_times_that_make_no_sense_change_nothing(bench, forward, transfer_bound, seconds):
    patcher, _ = transfer_bound
    state = bench.state(patcher)
    planned = state.split
    pass_time = bench.module("pass_timing").PassTime
    state._timed(pass_time((1,), seconds, 0.0, 0.0, 0.0, 0.0, ((torch.device("cpu"), 1, seconds),)))
    assert state.split is planned
    assert state.tuner.timing is None


@pytest.fixture
def on_trial(bench, forward, transfer_bound, monkeypatch):
    """A patcher whose split was exchanged for one that will lose, and not been timed since."""
    patcher, _ = transfer_bound
    state = bench.state(patcher)
    step_time = bench.module("step_time")
    planned = state.split
    worse = step_time.replace(planned, slots=1)
    monkeypatch.setattr(step_time, "improve", lambda split, timing: worse)
    pass_time = bench.module("pass_timing").PassTime
    copies = ((torch.device("cpu"), 1 << 20, 0.5),)
    state._timed(pass_time((1,), 2.0, 0.5, 0.0, 0.0, 0.0, copies))
    assert state.split is worse and state.tuner.on_trial == (1,)

    def decide(seconds, shape=(1,)):
        state._timed(pass_time(shape, seconds, 0.5, 0.0, 0.0, 0.0, copies))

    return patcher, state, planned, decide


def test_a_trial_that_loses_takes_nothing_back_that_was_given_away(bench, on_trial):
    patcher, state, planned, decide = on_trial
    with torch.inference_mode():
        patcher.partially_unload(torch.device("cpu"), 1 << 40)
    left = patcher.loaded_size()
    decide(3.0)
    assert state.split is planned
    assert patcher.loaded_size() == left
    bench.mm.load_models_gpu([patcher])
    assert patcher.loaded_size() == planned.compute_bytes


def test_a_trial_outlives_a_load(bench, on_trial):
    """Wan 2.2's experts take turns after few passes."""
    patcher, state, planned, decide = on_trial
    bench.mm.free_memory(1 << 50, patcher.load_device)
    bench.mm.load_models_gpu([patcher])
    assert state.tuner.on_trial == (1,)
    decide(3.0)
    assert state.split is planned


def test_a_trial_ends_with_passes_of_another_shape(bench, on_trial, monkeypatch):
    _, state, planned, decide = on_trial
    monkeypatch.setattr(bench.module("step_time"), "improve", lambda split, timing: split)
    decide(1.0, shape=(2,))
    assert state.tuner.on_trial is None
    assert state.split is planned


def test_what_has_lost_is_not_tried_again(bench, on_trial):
    """Neither after another load, nor after another string and back."""
    patcher, state, planned, decide = on_trial
    decide(3.0)
    bench.mm.free_memory(1 << 50, patcher.load_device)
    bench.mm.load_models_gpu([patcher])
    decide(2.0, shape=(3,))
    assert state.split is planned
