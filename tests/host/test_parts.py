"""Blocks that move in parts: the latents and promises of whole ones, with smaller slots."""

import pytest
import torch

from conftest import COMPUTE
from rig import simulator

ledger = simulator.ledger
NAMES = ("self_attn", "cross_attn", "ffn")
STRINGS = {
    "bytes": "acc:0,8mb;cpu,*",
    "two donors": "acc:0,9mb;acc:1,4mb;cpu,*",
    "ratio": "acc:0,60%;cpu,40%",
    "auto": "acc:0,auto;cpu,*",
}


@pytest.fixture(autouse=True)
def small_parts(bench, monkeypatch):
    """The parts of the tests' blocks are half a MiB, not hundreds of them."""
    monkeypatch.setattr(bench.module("model_blocks"), "PART_BYTES", 1 << 18)
    monkeypatch.setattr(bench.module("step_time"), "WORTH", 1.0)
    yield
    bench.clear()


@pytest.fixture
def whole(bench, monkeypatch):
    """The split of whole blocks for a string."""

    def split_of(text):
        with monkeypatch.context() as patched:
            patched.setattr(bench.module("model_blocks"), "PART_BYTES", 1 << 40)
            bench.sample(bench.distorch(text))
            split = bench.state().split
        bench.clear()
        return split

    return split_of


@pytest.mark.parametrize("text", STRINGS.values(), ids=STRINGS)
def test_the_latent_is_that_of_the_unswapped_run(bench, reference, card, text):
    if "auto" in text:
        card(16)
    loader = bench.distorch(text)
    assert torch.equal(bench.sample(loader, 1), reference[1])
    state = bench.state()
    assert {name.rpartition(".")[2] for name in _blocks(state)} == set(NAMES)
    assert state.layout.part_names == ", ".join(NAMES)
    for seed in (2, 1):
        assert torch.equal(bench.sample(loader, seed), reference[seed])


def _blocks(state):
    return [block.name for block in state.sizes.blocks]


@pytest.mark.parametrize("quota", ["7mb", "8mb", "10mb", "12mb"])
def test_more_stays_on_the_compute_device(bench, whole, quota):
    text = f"acc:0,{quota};cpu,*"
    before = whole(text)
    held = dict(ledger.allocated)
    bench.sample(bench.distorch(text))
    split = bench.state().split
    assert split.slot_bytes < 0.5 * before.slot_bytes
    assert split.bytes_per_pass < 0.98 * before.bytes_per_pass
    assert 0 <= ledger.allocated[COMPUTE] - held[COMPUTE] - split.compute_bytes < 20_000
    assert split.compute_bytes <= split.quotas[0].nbytes < split.compute_bytes + split.slot_bytes


def test_every_swapped_part_moves_once_a_pass_and_nothing_down(bench):
    loader = bench.distorch("acc:0,8mb;cpu,*")
    bench.sample(loader)
    state = bench.state()
    ledger.clear_copies()
    bench.sample(loader, seed=2)  # two steps of two passes
    sizes = [state.packs[index].nbytes for index in state.split.swapped]
    moved = [c.nbytes for c in ledger.copies if c.nbytes >= min(sizes)]
    assert sorted(moved) == sorted(4 * sizes)
    assert all(c.destination != "cpu" for c in ledger.copies if c.nbytes > 20_000)


def test_a_lora_is_patched_and_undone(bench):
    plain = {s: bench.sample(bench.lora(bench.plain(), s)) for s in (1.0, 0.0)}
    loader = bench.distorch("acc:0,8mb;cpu,*")
    for strength in (1.0, 0.0, 1.0):
        assert torch.equal(bench.sample(bench.lora(loader, strength)), plain[strength])
        assert bench.state().layout.wholes


def test_without_a_gain_blocks_stay_whole(bench):
    bench.sample(bench.distorch("acc:0,1gb;cpu,*"))
    assert not bench.state().layout.wholes


def test_what_is_compiled_moves_whole_from_the_next_load_on(bench, reference, monkeypatch):
    loader = bench.distorch("acc:0,8mb;cpu,*")
    assert torch.equal(bench.sample(loader, 1), reference[1])
    site = bench.module("module_calls").CallSite
    with monkeypatch.context() as patched:  # as if every block hung there compiled
        patched.setattr(site, "is_compiled", property(lambda _: True))
        for seed in (2, 1):
            assert torch.equal(bench.sample(loader, seed), reference[seed])
    assert not bench.state().layout.wholes
    assert torch.equal(bench.sample(loader, 2), reference[2])
