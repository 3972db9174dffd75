"""`auto` moves what brings something: where copies hide behind the computation, nothing does."""

import pytest
import torch

from conftest import COMPUTE, MIB
from rig import simulator

ledger, clock = simulator.ledger, simulator.clock
AUTO = f"{COMPUTE},auto;cpu,*"


def prompts(bench, number=3):
    """The same prompt several times: the second pass of a shape is timed."""
    return [bench.sample(bench.distorch(AUTO), seed=n % 2 + 1) for n in range(number)]


@pytest.fixture
def slow_links():
    clock.set_bandwidth(1e6)


@pytest.fixture
def slow_card():
    clock.flops = 1e9


def test_more_room_is_left_free_where_it_saves_no_time(bench, card, slow_card, reference):
    card(14)
    prompts(bench)
    split = bench.state().split
    assert split.bytes_per_pass > 0
    card(40)
    first, second = prompts(bench, 2)
    assert bench.state().split.homes == split.homes
    assert first.equal(reference[1]) and second.equal(reference[2])


def test_it_is_taken_where_it_saves_time(bench, card, slow_links):
    card(14)
    prompts(bench)
    assert bench.state().split.bytes_per_pass > 0
    card(40)
    prompts(bench)
    assert bench.state().split.bytes_per_pass == 0


def test_what_is_known_of_another_video_says_nothing(bench, card, slow_card, monkeypatch):
    card(14)
    prompts(bench)
    card(40)
    longer = {**bench.latent, "inputs": {**bench.latent["inputs"], "length": 9}}
    monkeypatch.setattr(bench, "latent", longer)
    prompts(bench, 1)
    assert bench.state().split.bytes_per_pass == 0


def test_what_was_given_back_for_nothing_is_not_taken_again(bench, card, slow_card, reference):
    """A text encoder that needs room before every prompt: nothing goes to and fro."""
    card(40)
    device = torch.device(COMPUTE)
    other = bench.load(bench.plain("other.safetensors"))
    bench.mm.load_models_gpu([other])
    patcher = bench.load(bench.distorch(AUTO))
    card(30)
    prompts(bench)
    state = bench.state()
    assert state.split.bytes_per_pass == 0
    wanted = bench.mm.get_free_memory(device) + 3 * MIB
    bench.mm.free_memory(wanted, device)
    assert bench.mm.get_free_memory(device) >= wanted
    split = state.split
    homes = [pack.device for pack in state.packs]
    ledger.clear_copies()
    assert prompts(bench, 2)[1].equal(reference[2])
    assert state.split is split and [pack.device for pack in state.packs] == homes
    passes = 2 * 2 * 2  # prompts, steps, cond and uncond
    block = split.sizes.largest_block
    up = [c for c in ledger.copies if c.nbytes >= block // 2 and c.destination == COMPUTE]
    assert len(up) <= passes * len(split.swapped)
    del patcher, other
