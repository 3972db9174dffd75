"""The simulated accelerators themselves: equal results, and each mistake that they must find."""

import copy
import gc
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional

from rig import simulator
from rig.simulator import RaceError, clock, host_in_flight, ledger

DEVICE = "acc:0"
PEER = "acc:1"
MODES = [torch.inference_mode, torch.no_grad, torch.enable_grad]
KB = 1024

simulator.install(count=2)


@pytest.fixture(autouse=True)
def clean():
    """Every test starts at time 0 with no copies, and must end without races or leaks."""
    simulator.reset()
    clock.reset_rates()
    clock.inline_bytes = 0
    before = dict(ledger.allocated)
    yield
    if ledger.allocated != before:  # what an exception holds is in a cycle
        gc.collect()
    simulator.check()
    assert ledger.allocated == before


@pytest.fixture
def side(clean):
    """A second stream of the first device."""
    return torch.acc.Stream(DEVICE)


@pytest.fixture
def compute():
    """The default stream of the first device."""
    return torch.acc.default_stream(DEVICE)


def on_device(nbytes=KB, device=DEVICE):
    """Memory that all streams may use: its allocation has been waited for."""
    tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    torch.acc.synchronize(device)
    return tensor


def on_host(nbytes=KB):
    return torch.ones(nbytes, dtype=torch.uint8)


# ------------------------------------------------------------------------------ tensors and ops


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "make",
    [
        lambda device: torch.zeros(2, 3, device=device),
        lambda device: torch.ones(2, 3, dtype=torch.bfloat16, device=device),
        lambda device: torch.full((2, 3), 1.5, device=device),
        lambda device: torch.arange(7, device=device),
        lambda device: torch.linspace(0, 1, 5, device=device),
        lambda device: torch.eye(3, device=device),
        lambda device: torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device),
        lambda device: torch.as_tensor([1, 2], device=device),
        lambda device: torch.randn(2, 3, device=device),
        lambda device: torch.rand(4, device=device),
        lambda device: torch.randperm(9, device=device),
        lambda device: torch.zeros_like(torch.ones(2), device=device),
        lambda device: torch.ones(2, device=device).new_full((3,), 2.0),
        lambda device: torch.zeros(4).fill_(2).to(device),
        lambda device: torch.zeros(4).to(device, torch.float16),
    ],
)
def test_factories(make, mode):
    with mode():
        torch.manual_seed(0)
        expected = make("cpu")
        torch.manual_seed(0)
        made = make(PEER)
        assert made.device == torch.device(PEER)
        assert (made.shape, made.stride(), made.dtype) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
        )
        assert torch.equal(made.cpu(), expected)


def test_a_device_without_index_is_the_current_one():
    assert torch.zeros(1, device="acc").device == torch.device(DEVICE)
    with torch.acc.device(PEER):
        assert torch.zeros(1, device="acc").device == torch.device(PEER)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(1, device="acc:99")


@pytest.mark.parametrize("mode", MODES)
def test_copies_go_in_all_directions(mode):
    with mode():
        source = torch.arange(4.0)
        up, across = torch.empty(4, device=DEVICE), torch.empty(4, device=PEER)
        down, within = torch.empty(4), torch.empty(4, device=DEVICE, dtype=torch.bfloat16)
        within.copy_(up.copy_(source))
        down.copy_(across.copy_(up))
        assert torch.equal(down, source)
        assert torch.equal(within.float().cpu(), source)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "mixed",
    [
        lambda: torch.ones(2, device=DEVICE) + torch.ones(2),
        lambda: torch.ones(2) * torch.ones(2, device=DEVICE),
        lambda: torch.ones(2, device=DEVICE) + torch.ones(2, device=PEER),
        lambda: torch.cat([torch.ones(2, device=DEVICE), torch.ones(2)]),
        lambda: functional.linear(torch.ones(1, 2, device=DEVICE), torch.ones(2, 2, device=PEER)),
        lambda: torch.ones(2)[torch.zeros(1, dtype=torch.int64, device=DEVICE)],
        lambda: torch.ones(()).add_(torch.ones((), device=DEVICE)),
    ],
)
def test_mixing_devices_raises(mixed, mode):
    with mode(), pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mixed()


def test_numbers_and_indices_on_the_cpu_may_be_mixed_in():
    values = torch.arange(4.0, device=DEVICE)
    assert torch.equal((values * torch.tensor(2.0)).cpu(), torch.arange(4.0) * 2)
    values[torch.tensor([1, 3])] = 7
    assert values[torch.tensor([3, 0])].tolist() == [7, 0]


@pytest.mark.parametrize("mode", MODES)
def test_views_of_a_flat_buffer_share_it(mode):
    with mode():
        flat = torch.zeros(64, dtype=torch.uint8, device=DEVICE)
        wide = flat[:32].view(torch.float32).view(2, 4)
        narrow = flat[32:].view(torch.bfloat16)
        wide.copy_(torch.arange(8.0).view(2, 4))
        narrow.fill_(1.5)
        assert wide.buffer is narrow.buffer is flat.buffer
        assert narrow.data_ptr() == flat.data_ptr() + 32
        host = flat.cpu()
        assert torch.equal(host[:32].view(torch.float32), torch.arange(8.0))
        assert torch.equal(host[32:].view(torch.bfloat16), torch.full((16,), 1.5).bfloat16())
    assert ledger.allocated[DEVICE] == flat.untyped_storage().nbytes() == 64


@pytest.mark.parametrize("mode", MODES)
def test_ops_that_change_the_shape_of_what_they_write(mode):
    with mode():
        tensor = torch.empty(0, device=DEVICE)
        torch.cat([torch.ones(2, 3, device=DEVICE)] * 2, out=tensor)
        assert tensor.shape == (4, 3)
        assert ledger.allocated[DEVICE] == 4 * 3 * 4
        assert tensor.t_().stride() == (1, 3)


class Block(nn.Module):
    """The ops of a video transformer's block."""

    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv3d(4, dim, (1, 2, 2), stride=(1, 2, 2))
        self.norm, self.norm_q = nn.LayerNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.gate = nn.Parameter(torch.randn(1, 2, dim), requires_grad=False)

    def forward(self, latent):
        x = self.embed(latent).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.norm_q(q), k, v)
        )
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        scale, shift = self.gate.chunk(2, dim=1)
        x = torch.addcmul(x, self.out(y), scale) + shift
        angles = torch.einsum("bnd,d->bn", x, shift[0, 0])
        return functional.gelu(torch.cat([x, angles[..., None]], dim=-1), approximate="tanh")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_is_bit_equal_to_the_cpu(dtype, mode):
    torch.manual_seed(0)
    with mode():
        block = Block().to(dtype).requires_grad_(False)
        latent = torch.randn(1, 4, 3, 8, 8, dtype=dtype)
        expected = block(latent)
        moved = block.to(DEVICE)(latent.to(DEVICE))
        assert moved.device == torch.device(DEVICE)
        assert torch.equal(moved.cpu(), expected)


@pytest.mark.parametrize("mode", MODES)
def test_modules_move_and_keep_their_parameters(mode):
    with mode():
        module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).requires_grad_(False)
        expected = copy.deepcopy(module.state_dict())
        for device in (DEVICE, PEER, "cpu", PEER):
            module.to(device)
            assert {tensor.device for tensor in module.state_dict().values()} == {
                torch.device(device)
            }
            assert all(isinstance(parameter, nn.Parameter) for parameter in module.parameters())
            for name, tensor in module.state_dict().items():
                assert torch.equal(tensor.cpu(), expected[name])


@pytest.mark.parametrize("mode", MODES)
def test_a_module_on_another_device_has_new_parameters(mode):
    with mode():
        module = nn.Linear(2, 2)
        on_cpu = module.weight
        module.to(DEVICE)
        assert on_cpu.device == torch.device("cpu")
        assert module.weight is not on_cpu


@pytest.mark.parametrize("mode", MODES)
def test_data_of_a_parameter_can_be_replaced(mode):
    with mode():
        parameter = nn.Parameter(torch.zeros(2), requires_grad=False)
        parameter.note = "kept"
        for values in (
            torch.ones(2, device=DEVICE),
            torch.ones(3, device=PEER).half(),
            torch.ones(4),
        ):
            parameter.data = values
            assert (parameter.device, parameter.dtype) == (values.device, values.dtype)
            assert torch.equal((parameter + 1).cpu(), values.cpu() + 1)
            assert isinstance(parameter, nn.Parameter)
            assert parameter.note == "kept"


def test_a_deep_copy_has_memory_of_its_own():
    module = nn.Linear(2, 2, device=DEVICE)
    twin = copy.deepcopy(module)
    twin.weight.data.zero_()
    assert isinstance(twin.weight, nn.Parameter)
    assert twin.weight.requires_grad
    assert module.weight.cpu().abs().sum() > 0


class Tagged(torch.Tensor):
    """A subclass that carries an attribute, as quantised weights do."""

    def to(self, *args, **kwargs):
        moved = super().to(*args, **kwargs)
        moved.tag = self.tag
        return moved


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_subclass_stays_one(mode):
    with mode():
        tagged = torch.ones(2).as_subclass(Tagged)
        tagged.tag = 5
        moved = tagged.to(DEVICE).to(PEER)
        assert isinstance(moved, Tagged)
        assert (moved.tag, moved.device) == (5, torch.device(PEER))
        assert type(moved.to("cpu")) is Tagged
        assert isinstance(moved + 1, Tagged)
        parameter = nn.Parameter(moved, requires_grad=False)
        assert isinstance(parameter, Tagged)
        assert isinstance(parameter, nn.Parameter)
        moved.detach = lambda: moved  # as ComfyUI-GGUF's
        assert not isinstance(moved.as_subclass(torch.Tensor), Tagged)
        assert isinstance(moved, Tagged)


def test_gradients_flow():
    weight = torch.full((2,), 3.0, device=DEVICE, requires_grad=True)
    (weight * weight).sum().backward()
    assert weight.grad.tolist() == [6, 6]


# --------------------------------------------------------------------------------------- ledger


def test_memory_is_counted_exactly_and_freed():
    a = torch.empty(KB, dtype=torch.uint8, device=DEVICE)
    b = torch.empty(3, dtype=torch.bfloat16, device=PEER)
    view = a[100:].view(4, 231)
    assert ledger.allocated == {DEVICE: KB, PEER: 6}
    del a
    assert ledger.allocated[DEVICE] == KB, "a view keeps all of it"
    del view, b
    assert ledger.allocated == {DEVICE: 0, PEER: 0}


def test_the_peak_remembers_temporaries():
    a = torch.zeros(KB, dtype=torch.uint8, device=DEVICE)
    a = a + 1
    assert (ledger.allocated[DEVICE], ledger.peak[DEVICE]) == (KB, 2 * KB)
    ledger.reset_peak()
    assert torch.acc.max_memory_allocated(DEVICE) == KB
    a.add_(1)
    assert ledger.peak[DEVICE] == KB


def test_too_much_memory_raises():
    simulator.install(count=2, memory=4 * KB)
    try:
        held = torch.zeros(3 * KB, dtype=torch.uint8, device=DEVICE)
        assert torch.acc.mem_get_info(DEVICE) == (KB, 4 * KB)
        for allocate in (lambda: torch.empty(KB, device=DEVICE), lambda: held + 1):
            with pytest.raises(torch.OutOfMemoryError, match="out of memory. Tried to allocate"):
                allocate()
        assert ledger.allocated[DEVICE] == 3 * KB
        torch.zeros(4 * KB, dtype=torch.uint8, device=PEER)
    finally:
        simulator.install(count=2)


def test_copies_are_listed_by_direction():
    up = torch.ones(10).to(DEVICE)
    up.bfloat16().cpu()
    across = up.to(PEER)
    up.clone()
    across[0].item()
    moved = [(c.source, c.destination, c.nbytes) for c in ledger.copies]
    assert moved == [
        ("cpu", DEVICE, 40),
        (DEVICE, "cpu", 20),
        (DEVICE, PEER, 40),
        (PEER, "cpu", 4),
    ]
    assert ledger.bytes_moved("acc", "cpu") == 24
    assert ledger.bytes_moved("cpu", DEVICE) == 40
    assert (ledger.count("acc", "acc"), ledger.count(destination="cpu"), ledger.count()) == (
        1,
        2,
        4,
    )
    assert ledger.copies[2].stream is torch.acc.default_stream(DEVICE)


def test_a_converting_copy_moves_the_bytes_of_the_device_it_reaches_last():
    # As Copy.cu: converted on the host, or on the source where that is a device.
    torch.zeros(10, device=DEVICE).copy_(torch.ones(10).half())
    torch.zeros(10).copy_(torch.ones(10, device=DEVICE).half())
    torch.ones(10, device=DEVICE).half().to(PEER, torch.float32)
    assert [c.nbytes for c in ledger.copies] == [40, 20, 40]


def test_install_again_adds_devices():
    simulator.install(count=1)
    assert simulator.devices()[:2] == [DEVICE, PEER]
    assert torch.acc.device_count() == len(simulator.devices())


# ---------------------------------------------------------------------------------------- races


def test_reading_before_a_copy_was_waited_for_raises(side, compute):
    slot = on_device()
    with torch.acc.stream(side):
        slot.copy_(on_host(), non_blocking=True)
    with pytest.raises(RaceError, match=f"{compute}.*{side}"):
        slot + 1
    compute.wait_stream(side)
    assert (slot + 1).cpu().unique().item() == 2


def test_overwriting_what_is_still_read_raises(side, compute):
    slot = on_device()
    _ = slot + 1
    with torch.acc.stream(side):
        with pytest.raises(RaceError, match="copy_.*writes.*read on"):
            slot.copy_(on_host(), non_blocking=True)
        side.wait_event(compute.record_event())
        slot.copy_(on_host(), non_blocking=True)
    side.synchronize()


def test_waiting_is_transitive(side, compute):
    third = torch.acc.Stream(DEVICE)
    slot = on_device()
    with side:
        slot.copy_(on_host(), non_blocking=True)
    third.wait_stream(side)
    compute.wait_stream(third)
    assert (slot + 1).shape == slot.shape


def test_waiting_for_the_past_does_not_order_the_future(side, compute):
    slot = on_device()
    early = side.record_event()
    with side:
        slot.copy_(on_host(), non_blocking=True)
    compute.wait_event(early)
    with pytest.raises(RaceError):
        slot + 1
    early.record(side)
    compute.wait_event(early)
    assert (slot + 1).shape == slot.shape


def test_an_event_recorded_again_leaves_earlier_waits_as_they_were(side, compute):
    slot = on_device()
    event = torch.acc.Event()
    event.wait(side)  # never recorded: nothing to wait for
    with side:
        slot.copy_(on_host(), non_blocking=True)
        event.record()
        event.wait(compute)
        slot.copy_(on_host(), non_blocking=True)
        event.record()
    with pytest.raises(RaceError):
        slot + 1
    event.wait(compute)
    assert (slot + 1).shape == slot.shape


@pytest.mark.parametrize("wait", ["stream", "event", "device"])
def test_the_host_orders_what_it_waits_for(side, wait):
    slot = on_device()
    with side:
        slot.copy_(on_host(), non_blocking=True)
    event = side.record_event()
    assert not (side.query() or event.query())
    {
        "stream": side.synchronize,
        "event": event.synchronize,
        "device": lambda: torch.acc.synchronize(DEVICE),
    }[wait]()
    assert event.query()
    assert (slot + 1).shape == slot.shape


@pytest.mark.parametrize(
    "blocking",
    [
        lambda slot: slot.copy_(on_host()),
        lambda slot: slot.add_(1).cpu(),
        lambda slot: slot.add_(1)[0].item(),
        lambda slot: slot.add_(1).nonzero(),
    ],
)
def test_the_host_waits_for_what_it_needs(side, blocking):
    slot = on_device()
    with side:
        blocking(slot)
    assert (slot + 1).shape == slot.shape


def test_a_device_is_finished_when_all_it_waited_for_is(compute):
    slot = on_device(device=PEER)
    slot.add_(1)
    compute.wait_stream(torch.acc.default_stream(PEER))
    torch.acc.synchronize(DEVICE)
    stream = torch.acc.Stream(PEER)
    with stream:
        slot.add_(1)
    stream.synchronize()


def test_two_streams_may_read_at_the_same_time(side):
    weights = on_device()
    _ = weights + 1
    with side:
        assert (weights + 1).shape == weights.shape
    side.synchronize()


def test_views_and_shapes_do_not_use_memory(side):
    slot = on_device()
    with side:
        slot.copy_(on_host(), non_blocking=True)
    assert slot.view(torch.float32)[2:].detach().shape == (KB // 4 - 2,)
    assert torch.empty_like(slot).shape == slot.shape
    with pytest.raises(RaceError):
        slot[:1] + 1
    side.synchronize()


def test_memory_of_another_stream_must_be_waited_for(side, compute):
    slot = torch.empty(KB, dtype=torch.uint8, device=DEVICE)
    with side:
        with pytest.raises(RaceError):
            slot.copy_(on_host(), non_blocking=True)
        side.wait_stream(compute)
        slot.copy_(on_host(), non_blocking=True)
    side.synchronize()


def test_memory_freed_in_use_is_reported(side, compute):
    slot = on_device()
    with side:
        slot.copy_(on_host(), non_blocking=True)
    del slot
    with pytest.raises(RaceError, match=f"allocated on {compute} was freed while {side}"):
        simulator.check()
    simulator.reset()
    simulator.check()


@pytest.mark.parametrize("made_safe_by", ["wait", "record_stream", "host"])
def test_memory_freed_in_order_is_not_reported(side, compute, made_safe_by):
    slot = on_device()
    with side:
        _ = slot + 1
        if made_safe_by == "record_stream":
            slot.record_stream(side)
    if made_safe_by == "wait":
        compute.wait_stream(side)
    if made_safe_by == "host":
        side.synchronize()
    del slot
    simulator.check()


def test_a_peer_copy_is_ordered_with_both_current_streams(side):
    weights, slot = on_device(device=PEER), on_device()
    _ = slot + 1
    weights.add_(1)
    slot.copy_(weights, non_blocking=True)  # after the read of slot and the write of weights
    with side, pytest.raises(RaceError):
        slot.add_(1)  # only the current streams were joined
    weights.add_(1)  # after the copy, which ran on the stream of its device
    assert (slot.cpu().unique().item(), weights.cpu().unique().item()) == (1, 2)


def test_streams_are_chosen_per_thread_and_used_from_any(side):
    slot, seen = on_device(), []

    def work():
        seen.append(torch.acc.current_stream(DEVICE))
        with side:
            slot.copy_(on_host(), non_blocking=True)

    with side:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert torch.acc.current_stream(DEVICE) is side
        assert (slot + 1).shape == slot.shape
    assert seen == [torch.acc.default_stream(DEVICE)]
    torch.acc.synchronize(DEVICE)


def test_choosing_a_stream_chooses_its_device_for_a_while():
    stream = torch.acc.Stream(PEER)
    with torch.acc.stream(None), torch.acc.stream(stream):
        assert torch.acc.current_device() == 1
        assert torch.acc.current_stream() is stream
    assert torch.acc.current_device() == 0
    assert torch.acc.current_stream(PEER) is torch.acc.default_stream(PEER)


# ---------------------------------------------------------------------------------- host memory


def test_host_memory_is_in_flight_until_the_host_has_waited(side):
    pinned, slot = on_host(4 * KB), on_device()
    with side:
        slot.copy_(pinned[KB : 2 * KB], non_blocking=True)
        arrived = side.record_event()
    assert host_in_flight(pinned)
    assert host_in_flight(pinned[2 * KB - 1 :])
    assert not host_in_flight(pinned[:KB])
    assert not host_in_flight(pinned[2 * KB :])
    torch.acc.default_stream(DEVICE).wait_event(arrived)
    assert host_in_flight(pinned), "a stream waited, not the host"
    arrived.synchronize()
    assert not host_in_flight(pinned)


def test_host_memory_of_a_blocking_or_converting_copy_is_free_at_once():
    pinned, slot = on_host(), on_device()
    slot.copy_(pinned)
    assert not host_in_flight(pinned)
    slot.view(torch.float16).copy_(pinned[: KB // 2], non_blocking=True)
    assert not host_in_flight(pinned)


def test_host_memory_that_is_written_is_in_flight_too():
    host = on_device().to("cpu", non_blocking=True)
    assert host_in_flight(host)
    torch.acc.synchronize(DEVICE)
    assert not host_in_flight(host)


# ---------------------------------------------------------------------------------------- clock


def test_copies_and_computation_overlap_on_two_streams_and_add_up_on_one(side):
    clock.set_bandwidth(KB)
    slot, source = on_device(2 * KB), on_host(2 * KB)

    def copy_and_compute(stream):
        simulator.reset()
        with torch.acc.stream(stream):
            slot.copy_(source, non_blocking=True)
        clock.charge(DEVICE, 3.0)
        return clock.now(DEVICE)

    assert copy_and_compute(side) == 3.0
    assert copy_and_compute(torch.acc.default_stream(DEVICE)) == 5.0


def test_a_wait_costs_the_time_that_is_left(side, compute):
    clock.set_bandwidth(KB)
    slot = on_device(2 * KB)
    start, end = torch.acc.Event(enable_timing=True), torch.acc.Event(enable_timing=True)
    start.record()
    with side:
        slot.copy_(on_host(2 * KB), non_blocking=True)
    clock.charge(DEVICE, 0.5)
    compute.wait_stream(side)
    clock.charge(DEVICE, 0.25)
    end.record()
    assert clock.now() == 2.25
    assert start.elapsed_time(end) == 2250.0


def test_a_link_carries_one_copy_at_a_time_in_each_direction(side):
    clock.set_bandwidth(KB)
    clock.set_bandwidth(2 * KB, source=PEER, destination=DEVICE)
    slots, peer = [on_device(2 * KB) for _ in range(3)], on_device(2 * KB, PEER)
    simulator.reset()
    streams = [side, torch.acc.Stream(DEVICE)]
    for slot, stream in zip(slots, streams, strict=False):
        with stream:
            slot.copy_(on_host(2 * KB), non_blocking=True)
    assert [stream.timeline.time for stream in streams] == [2.0, 4.0]
    slots[2].copy_(peer, non_blocking=True)
    assert torch.acc.current_stream(DEVICE).timeline.time == 1.0
    assert clock.bandwidth("cpu", PEER) == KB
    simulator.reset()
    assert clock.now() == 0.0


def test_the_host_starts_later_work_after_what_it_waited_for(side):
    clock.charge(PEER, 2.0)
    torch.acc.synchronize(PEER)
    with side:
        clock.charge(DEVICE, 1.0)
    assert clock.now() == 3.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("compute_something", "flops"),
    [
        (lambda: torch.ones(2, 3, device=DEVICE) @ torch.ones(3, 5, device=DEVICE), 60),
        (lambda: torch.ones(4, 2, 3, device=DEVICE) @ torch.ones(4, 3, 5, device=DEVICE), 240),
        (lambda: nn.Linear(3, 5, device=DEVICE)(torch.ones(2, 3, device=DEVICE)), 60),
        (
            lambda: functional.conv2d(
                torch.ones(1, 3, 4, 4, device=DEVICE), torch.ones(5, 3, 2, 2, device=DEVICE)
            ),
            2 * 9 * 5 * 12,
        ),
        (
            lambda: functional.scaled_dot_product_attention(
                torch.ones(1, 2, 3, 8, device=DEVICE),
                torch.ones(1, 2, 5, 8, device=DEVICE),
                torch.ones(1, 2, 5, 8, device=DEVICE),
            ),
            2 * 2 * 3 * 5 * (8 + 8),
        ),
        (lambda: functional.gelu(torch.ones(7, device=DEVICE)), 0),
    ],
)
def test_matrix_products_take_time(compute_something, flops, mode):
    clock.flops = 1.0
    with mode():
        compute_something()
    assert clock.now(DEVICE) == flops


def test_a_little_from_the_host_takes_no_time_and_no_turn_on_the_link(side):
    clock.set_bandwidth(1.0)
    clock.inline_bytes = KB
    with torch.acc.stream(side):
        torch.zeros(2 * KB, dtype=torch.uint8).to(DEVICE, non_blocking=True)
    assert clock.now(DEVICE) == 2 * KB
    little = torch.zeros(KB, dtype=torch.uint8).to(DEVICE, non_blocking=True)
    assert torch.acc.current_stream(DEVICE).timeline.time == 0.0
    little.cpu()
    assert clock.now(DEVICE) == 2 * KB


def test_the_device_module_answers_as_cuda_does():
    module = torch.get_device_module("acc")
    held = torch.zeros(KB, dtype=torch.uint8, device=PEER)
    assert module is torch.acc
    assert module.is_available()
    assert module.memory_allocated(PEER) == held.nbytes
    assert module.memory_stats(PEER)["active_bytes.all.current"] == KB
    free, total = module.mem_get_info(PEER)
    assert total - free == KB
    assert module.get_device_properties(PEER).total_memory == total
    module.manual_seed(3)
    first = torch.rand(2, device=DEVICE)
    module.manual_seed_all(3)
    assert torch.rand(2, device=PEER).tolist() == first.tolist()
    module.empty_cache()
    assert not torch.ones(2).is_pinned()


def test_a_generator_of_a_device_gives_the_cpus_numbers():
    generator = torch.Generator(device=DEVICE)
    assert isinstance(generator, torch.Generator)
    numbers = torch.rand(3, device=DEVICE, generator=generator.manual_seed(7))
    assert torch.equal(numbers.cpu(), torch.rand(3, generator=torch.Generator().manual_seed(7)))
