"""`auto` on a card that something else has most of."""

import pytest
import torch


@pytest.fixture
def loader(bench, expected):
    for seed in (1, 2):
        expected("wan", seed)  # not to be made while the ballast is there
    bench.module("host_memory").pass_memory.__init__()
    return bench.distorch(f"{bench.compute},auto;cpu,*", unet_name="wan.safetensors")


def test_every_prompt_runs_and_the_second_one_fills_the_card(bench, card, loader, expected):
    """What is left of the card is less than the model, and more than a pass needs."""
    size = bench.size("wan")
    ballast = card.ballast(int(0.8 * size + bench.mm.minimum_inference_memory()))
    for seed in (1, 2, 1):
        assert torch.equal(bench.sample(loader, seed), expected("wan", seed))
    state = bench.state()
    block = state.sizes.largest_block
    assert 0 < len(state.split.swapped) < len(state.sizes.blocks)
    assert state.split.compute_bytes <= state.choice.room.nbytes
    assert state.split.compute_bytes >= 0.95 * state.choice.room.nbytes - 1.3 * block
    del ballast


def test_a_pass_without_memory_is_repeated(bench, card, loader, expected):
    """Somebody has taken what was free after the model was loaded."""
    bench.sample(loader)
    patcher, model = bench.loaded(), bench.loaded().model.diffusion_model
    inputs = bench.inputs(patcher)
    with torch.inference_mode():
        before = model(*inputs)
        held = bench.state().compute_bytes()
        ballast = card.ballast(left=bench.block_bytes("wan") // 8)
        assert torch.equal(model(*inputs), before)
    assert bench.state().compute_bytes() < held
    assert bench.at_home()
    del ballast
