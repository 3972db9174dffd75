"""The swap on simulated accelerators: results, order, bytes, exceptions."""

import gc
import itertools
import weakref

import psutil
import pytest
import torch

from block_swap import pass_timing
from block_swap.page_locks import Limit, Need, PageLocks
from rig import page_locking, simulator
from toy import COMPUTE, Model, at_home, swap_of

ledger = simulator.ledger
HOMES = {
    "half": ["acc:0", "cpu"] * 4,
    "all": ["cpu"] * 8,
    "peer": ["acc:0", "acc:1"] * 4,
    "mixed": ["acc:0", "cpu", "acc:1", "cpu", "acc:1", "acc:0", "acc:1", "cpu"],
    "none": ["acc:0"] * 8,
}


def run(model, steps=1):
    """The results of ``steps`` passes on the CPU's side, each from its own input."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    return [model((x + step).to(next(model.embed.parameters()).device)) for step in range(steps)]


def expected(steps=1, **kwargs):
    return [y.cpu() for y in run(Model(**kwargs), steps)]


def equal(results, reference):
    return all(torch.equal(a.cpu(), b) for a, b in zip(results, reference, strict=True))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("homes", HOMES)
def test_results_are_those_of_the_unswapped_model(homes, slots, inference):
    with torch.inference_mode(inference):
        model = Model()
        swap = swap_of(model, HOMES[homes], slots)
        assert equal(run(model, steps=3), expected(steps=3))
        assert at_home(swap, model)


@pytest.mark.parametrize("homes", ["half", "all", "mixed"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_pass_moves_each_swapped_block_up_once_and_nothing_down(homes, slots):
    model = Model()
    swap = swap_of(model, HOMES[homes], slots)
    away = [pack for pack in swap._packs if pack.device != COMPUTE]
    x = torch.randn(4, 32).to(COMPUTE)
    model(x)
    for _ in range(3):
        ledger.clear_copies()
        model(x)
        assert sorted(copy.nbytes for copy in ledger.copies) == sorted(p.nbytes for p in away)
        assert all(copy.destination == "acc:0" for copy in ledger.copies)


def test_slots_are_allocated_once_and_passes_allocate_nothing_that_stays():
    model = Model()
    swap = swap_of(model, HOMES["all"], slots=2)
    block = swap._packs[0].nbytes
    assert swap.slot_bytes == 2 * block
    x = torch.randn(4, 32).to(COMPUTE)
    model(x)
    held = ledger.allocated["acc:0"]
    model(x)
    assert ledger.allocated["acc:0"] == held
    assert swap.drop_slots() == 2 * block
    assert ledger.allocated["acc:0"] == held - 2 * block
    assert equal(run(model), expected())


def test_the_next_copy_is_issued_before_the_block_runs_and_across_passes():
    model = Model()
    swap = swap_of(model, HOMES["half"], slots=2)
    seen = {}

    def note(index):
        def hook(*_):
            seen[index] = {slot.block for slot in swap._slots}

        return hook

    handles = [b.up.register_forward_pre_hook(note(i)) for i, b in enumerate(model.blocks)]
    run(model)
    assert seen[0] == {1, 3}
    assert seen[1] == {1, 3}
    assert seen[2] == {3, 5}
    assert seen[7] == {7, 1}
    assert {slot.block for slot in swap._slots} == {1, 3}
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("homes", ["half", "all", "mixed"])
def test_an_exception_leaves_everything_at_home_and_the_next_pass_right(homes):
    model = Model()
    swap = swap_of(model, HOMES[homes])
    for fail_at in range(8):
        model.fail_at = fail_at
        with pytest.raises(InterruptedError) as caught:
            run(model)
        assert at_home(swap, model)
        model.fail_at = None
        assert equal(run(model), expected())
        del caught  # holds the suspended loop until here
    assert at_home(swap, model)


def test_skipped_blocks_and_a_changed_order():
    model = Model()
    swap_of(model, HOMES["half"])
    reference = Model()
    for skip in [(1, 2), (), (3,), (1, 3, 5, 7), ()]:
        model.skip = reference.skip = skip
        assert equal(run(model, steps=2), [y.cpu() for y in run(reference, steps=2)])


def test_two_lists_one_taken_by_index():
    model = Model(side=2)
    lists = ("blocks", "side_blocks")
    swap = swap_of(model, ["cpu"] * 10, slots=2, lists=lists)
    assert equal(run(model, steps=3), expected(steps=3, side=2))
    assert at_home(swap, model)
    block = swap._packs[0].nbytes
    ledger.clear_copies()
    run(model)
    # The order is learned in the first pass: from then on one copy per block.
    assert ledger.count("cpu", "acc:0") == 10 + 1  # and the input
    assert swap.slot_bytes == 2 * block


class Nested(Model):
    """Its first block calls the second one, in the middle of its own work."""

    def __init__(self):
        super().__init__()
        inner = self.blocks[1]

        def forward(x):
            self.seen = [block.up.weight.device for block in self.blocks[:2]]
            return inner(x)

        self.blocks[0].down.register_forward_hook(lambda _, __, y: y + forward(y))


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_block_inside_another_has_a_use_of_its_own(caplog, slots):
    with torch.no_grad():
        model = Nested()
        swap = swap_of(model, HOMES["all"], slots=slots)
        assert equal(run(model, steps=3), [y.cpu() for y in run(Nested(), steps=3)])
    assert model.seen[0] == COMPUTE
    assert at_home(swap, model)
    assert ("one more slot" in caplog.text) == (slots == 1)


def test_what_is_kept_serves_until_another_block_is_called():
    """Models use a block's own parts and numbers after its call has returned."""

    class Looking(Model):
        def loop(self, x):
            for block in self.blocks:
                x = block(x)
                x = x + block.down(block.up(x)) * block.scale
            return x

    model = Looking()
    swap = swap_of(model, HOMES["all"])
    assert equal(run(model, steps=2), [y.cpu() for y in run(Looking(), steps=2)])
    assert at_home(swap, model)


def test_a_block_that_is_called_outside_of_a_pass_is_a_pass():
    model, reference = Model(), Model()
    swap = swap_of(model, HOMES["half"])
    x = torch.randn(4, 32)
    run(model)
    for index in (1, 1, 0, 5):
        y = model.blocks[index](x.to(COMPUTE))
        assert torch.equal(y.cpu(), reference.blocks[index](x))
        assert at_home(swap, model)
    assert equal(run(model), expected())
    x = x.to(COMPUTE)
    model(x)
    ledger.clear_copies()
    model(x)
    assert ledger.count("cpu", "acc:0") == 4


def test_modules_are_what_they_were():
    """Whoever looks at the lists, in a pass or not, sees the modules themselves."""
    model = Model()
    seen = {}
    swap = swap_of(model, HOMES["all"], slots=3)
    modules = model.blocks
    modules[3].up.register_forward_pre_hook(lambda *_: seen.update(list=model.blocks))
    run(model)
    assert seen["list"] is modules
    assert model.state_dict().keys() == Model().state_dict().keys()
    assert at_home(swap, model)


def test_blocks_that_never_run_are_known_and_not_fetched():
    model = Model()
    model.skip = (2, 5)
    swap = swap_of(model, HOMES["all"])
    assert swap.idle == frozenset()
    model.fail_at = 4
    with pytest.raises(InterruptedError):
        model(torch.randn(4, 32).to(COMPUTE))
    assert swap.idle == frozenset()  # who knows what the pass would have run
    model.fail_at = None
    x = torch.randn(4, 32).to(COMPUTE)
    for _ in range(2):  # the first pass is guessed, and stops guessing where it was wrong
        model(x)
    assert swap.idle == {2, 5}
    ledger.clear_copies()
    model(x)
    assert ledger.count("cpu", "acc:0") == 6


def test_exchanged_modules_are_brought_in():
    """ComfyUI hangs compiled modules in place of blocks for one call of the model."""

    class Around(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.inner = block

        def forward(self, x):
            seen.append("forward" in self.inner.__dict__)
            return self.inner(x)

    seen = []
    model = Model()
    swap = swap_of(model, HOMES["all"])
    plain = list(model.blocks)
    for _ in range(2):
        for index in (1, 4):
            model.blocks[index] = Around(plain[index])
        assert equal(run(model), expected())
        for index in (1, 4):
            model.blocks[index] = plain[index]
        assert equal(run(model), expected())
    assert seen == [False] * 4  # a hook inside of what is compiled would break its graph
    assert at_home(swap, model)


def test_a_forward_that_others_hang_on_a_block_runs_and_stays():
    model = Model()
    swap = swap_of(model, HOMES["all"], drive=False)
    undo = swap.drive(model)
    block = model.blocks[2]
    block.forward = lambda x: 2 * type(block).forward(block, x)
    reference = Model()
    twin = reference.blocks[2]
    twin.forward = lambda x: 2 * type(twin).forward(twin, x)
    assert equal(run(model, 2), [y.cpu() for y in run(reference, 2)])
    theirs = vars(block)["forward"].__wrapped__
    undo()
    assert vars(block)["forward"] is theirs
    del block.forward
    assert "forward" not in vars(model.blocks[3])


def test_homes_that_were_written_are_seen_after_settle():
    model = Model()
    swap = swap_of(model, HOMES["half"])
    run(model)
    swap.settle()
    model.blocks[1].up.weight.data.mul_(2)
    reference = Model()
    reference.blocks[1].up.weight.mul_(2)
    assert equal(run(model), [run(reference)[0].cpu()])


def test_blocks_may_move_between_passes():
    model = Model()
    swap = swap_of(model, HOMES["half"])
    run(model)
    swap.settle()
    for pack, home in zip(swap._packs, HOMES["mixed"], strict=True):
        pack.place(torch.device(home))
    swap.update(2)
    assert equal(run(model), expected())
    for pack in swap._packs:
        pack.place(COMPUTE)
    swap.update(2)
    ledger.clear_copies()
    assert equal(run(model), expected())
    assert swap.slot_bytes == 0


def test_undrive_restores_the_instance():
    model = Model()
    before = dict(model.__dict__)
    swap = swap_of(model, HOMES["all"], drive=False)
    undo = swap.drive(model)
    assert {"forward", "loop"} <= set(model.__dict__)
    undo()
    assert model.__dict__ == before


def test_a_method_replaced_on_the_instance_is_still_the_one_that_runs():
    model = Model()
    model.loop = lambda x: Model.loop(model, x) * 2
    swap_of(model, HOMES["all"])
    assert equal(run(model), [2 * y for y in expected()])


def test_a_model_that_nobody_holds_dies_at_once():
    model = Model()
    swap = swap_of(model, HOMES["all"])
    run(model)
    held = weakref.ref(model), weakref.ref(swap)
    gc.disable()
    try:
        del model, swap
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


def locks_of(cudart):
    return PageLocks(page_locking.pinning(cudart), lambda: Limit(1 << 40, 0))


def test_page_locks_are_held_while_the_pack_stays():
    cudart = page_locking.Cudart()
    locks = locks_of(cudart)
    model = Model()
    swap = swap_of(model, HOMES["all"])
    pack, settle = swap._packs[0], swap.links.synchronize
    assert pack.lock(locks, Need.TRAVELS, settle)
    assert pack.lock(locks, Need.TRAVELS, settle)
    assert cudart.held == {pack.flat.data_ptr(): pack.nbytes}
    pack.place(COMPUTE)
    assert cudart.held == {}
    assert not pack.lock(locks, Need.TRAVELS, settle)  # there is nothing of it in host memory


def test_a_page_lock_that_was_taken_away_can_be_had_again():
    cudart = page_locking.Cudart()
    model = Model()
    swap = swap_of(model, HOMES["all"])
    one, other = swap._packs[:2]
    locks = PageLocks(page_locking.pinning(cudart), lambda: Limit(one.nbytes, 0))
    assert one.lock(locks, Need.UNLOADED, swap.links.synchronize)
    assert other.lock(locks, Need.TRAVELS, swap.links.synchronize)
    assert not one.locked
    assert not one.lock(locks, Need.UNLOADED, swap.links.synchronize)
    other.unlock()
    assert one.lock(locks, Need.TRAVELS, swap.links.synchronize)
    assert cudart.held == {one.flat.data_ptr(): one.nbytes}


def test_garbage_is_unlocked_after_the_copies_that_read_it():
    """A cyclic collection calls finalizers in any order: here the packs' come before the swap's."""
    cudart = page_locking.Cudart()
    locks = locks_of(cudart)
    model = Model()
    swap = swap_of(model, HOMES["all"])
    unlocked = []

    def unpin(flat):
        unlocked.append(simulator.host_in_flight(flat))
        return cudart.cudaHostUnregister(flat.data_ptr()) == 0

    locks.pinning.unpin = unpin
    for pack in swap._packs:
        assert pack.lock(locks, Need.TRAVELS, swap.links.synchronize)
    model(torch.randn(4, 32).to(COMPUTE))
    assert any(simulator.host_in_flight(pack.flat) for pack in swap._packs)
    swap.itself = swap
    del pack, model, swap
    gc.collect()
    assert unlocked == [False] * 8
    assert cudart.held == {}


def test_packed_weights_are_aligned_contiguous_views_of_one_buffer():
    model = Model()
    swap = swap_of(model, HOMES["all"])
    for pack, block in zip(swap._packs, model.blocks, strict=True):
        start = pack.flat.data_ptr()
        for tensor in (*block.parameters(), *block.buffers()):
            assert tensor.is_contiguous()
            assert (tensor.data_ptr() - start) % 256 == 0
            assert start <= tensor.data_ptr() < start + pack.nbytes
        assert all(isinstance(p, torch.nn.Parameter) for p in block.parameters())


def test_tied_weights_stay_tied():
    model = Model()
    model.blocks[0].down.bias = model.blocks[0].down.bias
    model.blocks[0].twin = torch.nn.Linear(32, 64)
    model.blocks[0].twin.weight = model.blocks[0].up.weight
    swap = swap_of(model, HOMES["all"])
    assert model.blocks[0].twin.weight is model.blocks[0].up.weight
    seen = []
    model.blocks[0].up.register_forward_pre_hook(lambda up, _: seen.append(up.weight))
    run(model)
    assert seen[0].device == COMPUTE
    swap.settle()
    with swap.forward_pass():
        swap.enter_block(0)
        assert model.blocks[0].twin.weight is model.blocks[0].up.weight


def test_a_pass_allocates_nothing_but_what_the_model_itself_does(monkeypatch):
    allocated = []
    resize = simulator.Buffer.resize

    def noted(buffer, nbytes):
        if nbytes > buffer.nbytes:
            allocated.append((buffer.accelerator.name, nbytes - buffer.nbytes))
        resize(buffer, nbytes)

    monkeypatch.setattr(simulator.Buffer, "resize", noted)

    def of_a_pass(homes):
        model = Model()
        swap_of(model, homes)
        x = torch.randn(4, 32).to(COMPUTE)
        model(x)
        allocated.clear()
        model(x)
        return list(allocated)

    own = of_a_pass(["acc:0"] * 8)
    assert own
    assert of_a_pass(["cpu"] * 8) == own
    assert of_a_pass(["cpu", "acc:0", "acc:1", "cpu"] * 2) == own


def test_two_hundred_passes_leave_no_trace_in_ram():
    model = Model(dim=64)
    swap_of(model, ["cpu", "acc:0", "acc:1", "cpu"] * 2)
    x = torch.randn(4, 64).to(COMPUTE)
    process = psutil.Process()

    def run(passes):
        for _ in range(passes):
            model(x)
        simulator.ledger.clear_copies()
        gc.collect()
        return process.memory_info().rss

    run(50)
    before = run(50)
    assert run(200) - before < 1 << 20


def test_the_second_pass_of_every_shape_is_timed_once():
    model = Model()
    swap = swap_of(model, HOMES["mixed"])
    times = []
    swap.watch.time_passes(times.append)
    alternating = itertools.cycle([torch.randn(rows, 32).to(COMPUTE) for rows in (4, 2)])

    def run(passes):
        for _ in range(passes):
            model(next(alternating))
            torch.acc.synchronize()
        return len(times)

    assert [run(1), run(1), run(1), run(1), run(4), run(4)] == [0, 0, 0, 1, 2, 2]
    for pass_time in times:
        assert 0 <= pass_time.waiting < pass_time.total
        moved = {}
        for donor, nbytes, seconds in pass_time.copies:
            assert seconds >= 0  # small ones take no time on the virtual clock
            moved[str(donor)] = moved.get(str(donor), 0) + nbytes
        block = swap._packs[0].nbytes
        assert sum(moved.values()) <= 6 * block
        assert set(moved) == {"cpu", "acc:1"}
    swap.watch.time_passes(times.append)
    assert run(6) == 4


@pytest.mark.parametrize("homes", [["cpu"] * 8, ["cpu", "acc:0"] * 4, ["acc:0"] * 8])
def test_a_pass_is_timed_in_its_parts(homes):
    """What comes before the first block, the blocks, what is behind them, and the pause between."""

    class Slow(Model):
        def forward(self, x):
            simulator.clock.charge(COMPUTE, 0.5)
            x = self.embed(x)
            for block in self.blocks:
                simulator.clock.charge(COMPUTE, 0.25)  # taken for a part of the block before
                x = block(x)
            simulator.clock.charge(COMPUTE, 0.125)
            return x

    model = Slow()
    swap = swap_of(model, homes)
    times = []
    swap.watch.time_passes(times.append)
    simulator.clock.flops = float("inf")
    simulator.clock.inline_bytes = 0
    simulator.clock.set_bandwidth(swap._packs[0].nbytes / 0.5)  # a copy takes half a second
    x = torch.randn(4, 32).to(COMPUTE)
    for _ in range(3):
        model(x)
        simulator.clock.charge(COMPUTE, 2.0)  # the first copies of the next pass are over
        torch.acc.synchronize()
    simulator.clock.reset_rates()
    (timed,) = times
    assert timed.shape == x.shape
    assert timed.before == pytest.approx(0.5 + 0.25)
    assert timed.between == pytest.approx(2.0)
    assert timed.blocks + timed.after == pytest.approx(7 * 0.25 + 0.125)
    assert timed.after <= 0.125 + 1e-9
    swapped = homes.count("cpu")
    assert (timed.waiting > 0) == (swapped == 8)
    assert timed.total == pytest.approx(0.5 + 2.0 + 0.125 + timed.waiting)


def test_every_block_has_its_own_time():
    """Attention takes most of a block's time, and not most of its bytes."""
    model = Model()
    seconds = [0.125 * (1 + index % 3) for index in range(8)]
    for block, time in zip(model.blocks, seconds, strict=True):
        block.up.register_forward_pre_hook(lambda *_, time=time: clock.charge(COMPUTE, time))
    clock = simulator.clock
    swap = swap_of(model, HOMES["mixed"], slots=3)
    times = []
    swap.watch.time_passes(times.append)
    clock.flops = float("inf")
    for _ in range(3):
        model(torch.randn(4, 32).to(COMPUTE))
        torch.acc.synchronize()
    clock.reset_rates()
    (timed,) = times
    assert timed.each == pytest.approx(dict(enumerate(seconds)))


def test_a_pass_that_fails_is_not_timed_and_the_next_one_is():
    model = Model()
    swap = swap_of(model, HOMES["half"])
    times = []
    swap.watch.time_passes(times.append)
    x = torch.randn(4, 32).to(COMPUTE)
    model(x)
    model.fail_at = 5
    with pytest.raises(InterruptedError):
        model(x)
    torch.acc.synchronize()
    swap.watch.before_pass()
    assert times == []
    model.fail_at = None
    for _ in range(3):
        model(x)
        torch.acc.synchronize()
    assert len(times) == 1


def test_a_host_that_runs_ahead_leaves_no_shape_untimed():
    """Results come late on a card: the pass that is due may find the timer of another."""
    model = Model()
    swap = swap_of(model, HOMES["half"])
    times = []
    swap.watch.time_passes(times.append)
    one, other = (torch.randn(rows, 32).to(COMPUTE) for rows in (4, 2))
    for x in (one, other, one, other):  # nothing is waited for: the first result is not there
        model(x)
    for x in (one, other, one, other):
        torch.acc.synchronize()
        model(x)
    assert {timed.shape for timed in times} == {one.shape, other.shape}
    assert len(times) == 2


def test_a_backend_that_cannot_time_is_not_timed(monkeypatch, caplog):
    def elapsed_time(event, other):
        raise NotImplementedError("elapsed_time is not supported")

    monkeypatch.setattr(simulator.Event, "elapsed_time", elapsed_time)
    model = Model()
    swap = swap_of(model, HOMES["half"])
    swap.watch.time_passes(lambda _: pytest.fail("there is no time to tell of"))
    x = torch.randn(4, 32).to(COMPUTE)
    expected = Model()(x.cpu())
    for _ in range(6):
        assert torch.equal(model(x).cpu(), expected)
        torch.acc.synchronize()
    assert len([r for r in caplog.records if "not timed any more" in r.message]) == 1


def test_copies_that_are_queued_meanwhile_do_not_count(monkeypatch):
    """A worker may still be staging what comes next when the timed pass has ended."""
    timer = pass_timing.PassTimer(COMPUTE)
    stream = torch.acc.Stream(0)
    with timer.copy(torch.device("cpu"), 1, stream):
        pass
    timer.stop()
    torch.acc.synchronize()
    query = simulator.Event.query

    def queues_another(event):
        if len(timer._copies) == 1:
            timer._copies.append((torch.device("cpu"), 1, *(torch.acc.Event() for _ in range(2))))
        return query(event)

    monkeypatch.setattr(simulator.Event, "query", queues_another)
    assert len(timer.result().copies) == 1


class Failing(Model):
    """Runs out of memory once, in block 5; ``writes`` names what has written into its inputs."""

    def __init__(self, writes):
        super().__init__()
        self.writes, self.failed = writes, False

    def forward(self, x):
        if "forward" in self.writes:
            x += 1
        return self.loop(self.embed(x))

    def loop(self, x):
        if "loop" in self.writes:
            x += 1
        for i, block in enumerate(self.blocks):
            if i == 5 and not self.failed:
                self.failed = True
                raise torch.OutOfMemoryError("Tried to allocate 1.00 MiB")
            x = block(x)
        return x


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("writes", [(), ("loop",), ("forward",), ("forward", "loop")])
def test_what_has_written_into_its_inputs_does_not_run_again(writes, repeats):
    """The loop runs again, or else the forward, whose own the inputs of the loop are."""
    with torch.inference_mode():
        model = Failing(writes)
        swap = swap_of(model, HOMES["half"])
        room = [1 << 20]  # to be had once
        swap.repeats, swap.on_missing = (
            repeats,
            lambda nbytes: [nbytes] == [room.pop() if room else 0],
        )
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
        reference = Failing(writes)
        reference.failed = True
        expected = reference(x.clone())
        if repeats and len(writes) < 2:
            assert torch.equal(model(x.to(COMPUTE)).cpu(), expected)
        else:
            with pytest.raises(torch.OutOfMemoryError):
                model(x.to(COMPUTE))
        assert at_home(swap, model)
        assert torch.equal(model(x.to(COMPUTE)).cpu(), expected)


def _reads_weights(model, x):
    for block in model.blocks:
        x = x + block.modulation * block.scale
    return x


def _calls_children(model, x):
    for i in range(len(model.blocks)):
        x = x + model.blocks[i].down(torch.tanh(model.blocks[i].up(x)))
    return x


def _looks_then_calls(model, x):
    device = model.blocks[-1].up.weight.device
    for block in model.blocks[1:]:
        x = block(x.to(device))
    return x


@pytest.mark.parametrize("loop", [_reads_weights, _calls_children, _looks_then_calls])
@pytest.mark.parametrize("after", [False, True])
def test_a_forward_of_others_may_take_blocks_apart(loop, after):
    """Nodes replace a model's forward by one that has its blocks' code inside."""
    model, reference = Model(), Model()
    swap = swap_of(model, HOMES["all"], drive=after)
    model.loop = lambda x: loop(model, x)
    reference.loop = lambda x: loop(reference, x)
    if not after:
        swap.drive(model)
    assert equal(run(model, 3), [y.cpu() for y in run(reference, 3)])
    assert at_home(swap, model)
    assert isinstance(model.blocks, torch.nn.ModuleList) and "blocks" not in vars(model)
    del model.loop
    swap.drive(model)
    assert equal(run(model), expected())
