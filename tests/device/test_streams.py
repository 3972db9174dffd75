"""Passes are right however late a stream is: what orders them are events, and never luck."""

import random
from collections import Counter

import pytest
import torch

LATE = 0.002  # seconds at the most: a block of the model for real cards is copied in less


@pytest.fixture
def delays(card, monkeypatch):
    """Has streams wait longer than they are told to, at random; counts that by stream.

    A copy stream is told to wait before every copy, the computing one before every swapped block:
    what comes late then is what others have to wait for.
    """
    chances, delayed = random.Random(0), Counter()
    wait_event = card.module.Stream.wait_event

    def wait_and_dawdle(stream, event):
        wait_event(stream, event)
        if chances.random() < 0.5:
            delayed[stream] += 1
            card.delay(stream, LATE * chances.random())

    monkeypatch.setattr(card.module.Stream, "wait_event", wait_and_dawdle)
    return delayed


@pytest.fixture(scope="module")
def unswapped(session_bench):
    """What the unswapped model gives for `bench.inputs`, on the card."""
    session_bench.clear()
    patcher = session_bench.place(session_bench.plain("small.safetensors"))
    with torch.inference_mode():
        result = patcher.model.diffusion_model(*session_bench.inputs(patcher)).clone()
    assert torch.isfinite(result).all()
    session_bench.clear()
    return result


@pytest.mark.usefixtures("static_split")
@pytest.mark.parametrize("locked", [True, False], ids=["locked", "staged"])
@pytest.mark.parametrize("slots", [2, 3])
def test_random_delays_in_every_stream(bench, card, unswapped, delays, slots, locked):
    texts = {2: "cpu,*", 3: bench.text("small", 0.72)}
    loader = bench.distorch(texts[slots], unet_name="small.safetensors")
    refused = [] if locked else [bench.block_bytes("small")]
    with card.locks.refusing(*refused):
        patcher = bench.place(loader)
        state = bench.state(patcher)
        blocks = [pack for pack in state.packs if pack.nbytes == bench.block_bytes("small")]
        swapped = [pack for pack in blocks if pack.device.type == "cpu"]
        assert len(swapped) > slots == state.split.slots
        assert {card.locks.covers(pack.flat) for pack in swapped} == {locked}
        passes_are_right(bench, card, patcher, unswapped, delays)
        if not locked:
            assert state.swap.count_staged() >= len(swapped)


def passes_are_right(bench, card, patcher, unswapped, delays):
    """Every pass gives what the unswapped model does; nothing waits for the host in between."""
    chances = random.Random(1)
    model, inputs = patcher.model.diffusion_model, bench.inputs(patcher)
    current = card.module.current_stream(card.compute)

    def dawdle(*_):
        if chances.random() < 0.2:
            card.delay(current, LATE * chances.random())

    hooks = [block.register_forward_pre_hook(dawdle) for block in model.blocks]
    with torch.inference_mode():
        # Compared on the card: to look at a result would be to wait for it.
        wrong = [(model(*inputs) != unswapped).any() for _ in range(card.stressed_passes)]
    for hook in hooks:
        hook.remove()
    assert [number for number, value in enumerate(wrong) if value.item()] == []
    assert len(delays) >= 2
    assert all(number > card.stressed_passes for number in delays.values())
