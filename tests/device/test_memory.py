"""Quotas and page-locks: by the allocator, by the driver, and by the calls that lock."""

import pytest
import torch

SHARES = (0.25, 0.6)


def quota_of(bench):
    """The bytes that the string gives to the compute device."""
    (quota,) = (q for q in bench.state().split.quotas if q.device == bench.compute)
    return quota.nbytes


def allocations(split):
    """How many buffers a split has on the compute device: packs, slots, what is not packed."""
    return len(split.homes) - len(split.swapped) + split.slots + 3


@pytest.mark.parametrize("share", SHARES)
def test_a_load_takes_what_its_table_says_and_no_more_on_the_way(bench, card, share):
    allocated, used = card.allocated(card.compute), card.used(card.compute)
    loader = bench.distorch(bench.text("wan", share))
    patcher = bench.place(loader)
    split = bench.state(patcher).split
    assert quota_of(bench) - split.slot_bytes < split.compute_bytes <= quota_of(bench)
    slack = card.slack(allocations(split))
    taken = card.allocated(card.compute) - allocated
    assert 0 <= taken - split.compute_bytes <= slack
    assert card.peak(card.compute) - allocated <= split.compute_bytes + slack
    card.reset()  # of what the allocator has and does not use
    taken = card.used(card.compute) - used
    assert 0 <= taken - split.compute_bytes <= slack + card.segments
    assert slack + card.segments < split.slot_bytes  # or a block too much would not show


class Figures:
    """The most that a run takes of the compute device, after the one that loads the model."""

    def __init__(self, bench, card, loader):
        self._card, self._most = card, 0
        card.reset()
        allocated, used = card.allocated(card.compute), card.used(card.compute)
        bench.sample(loader)
        card.reset()
        model = bench.mm.current_loaded_models[0].model.model.diffusion_model
        hooks = [block.register_forward_pre_hook(self._look) for block in model.blocks]
        bench.sample(loader, seed=2)
        for hook in hooks:
            hook.remove()
        self.allocated = card.peak(card.compute) - allocated
        self.used = self._most - used

    def _look(self, *_):
        self._most = max(self._most, self._card.used(self._card.compute))


@pytest.mark.parametrize("share", [*SHARES, "virtual VRAM"])
def test_a_run_keeps_to_its_quota_beside_what_it_computes_with(bench, card, share):
    plain = Figures(bench, card, bench.plain())
    weights = bench.mm.current_loaded_models[0].model.model_size()
    assert min(plain.used, plain.allocated) > weights
    bench.clear()
    if share == "virtual VRAM":
        loader = bench.distorch(virtual_vram=0.5 * weights / 2**30)
    else:
        loader = bench.distorch(bench.text("wan", share))
    run = Figures(bench, card, loader)
    split = bench.state().split
    quota = weights // 2 if share == "virtual VRAM" else quota_of(bench)
    slack = card.slack(allocations(split))
    assert split.swapped
    assert run.allocated <= quota + plain.allocated - weights + slack
    assert run.used <= quota + plain.used - weights + slack + card.segments


@pytest.mark.parametrize("keep", [False, True], ids=["free", "kept, planned anew"])
def test_page_locks_are_back_where_they_were_after_ten_loads(bench, card, keep):
    file = "small.safetensors"
    before, total = dict(card.locks.held), bench.mm.TOTAL_PINNED_MEMORY
    shares = (0.3, 0.6) if keep else (0.3, 0.3)
    held = []
    for number in range(10):
        text = bench.text("small", shares[number % 2])
        bench.sample(bench.distorch(text, unet_name=file, keep_loaded=keep))
        split = bench.state().split
        locked = sum(card.locks.held.values()) - sum(before.values())
        swapped = sum(split.sizes.parts[i].nbytes for i in split.swapped)
        assert locked >= swapped > 0
        assert len(card.locks.held) <= len(before) + len(split.homes) + 1
        held.append(locked)
        if not keep:
            bench.free()
            assert card.locks.held == before
    assert keep or len(set(held)) == 1
    bench.sample(bench.distorch(text, unet_name=file, keep_loaded=False))
    bench.free()
    assert card.locks.held == before
    assert total == bench.mm.TOTAL_PINNED_MEMORY


def test_free_gives_everything_back(bench, card, expected):
    latents = [expected("wan", seed) for seed in (1, 2)]
    card.reset()
    devices = (card.compute, *card.others)
    before = {device: card.allocated(device) for device in devices}
    used = card.used(card.compute)
    loader = bench.distorch(bench.text("wan", 0.4))
    assert torch.equal(bench.sample(loader), latents[0])
    bench.free()
    assert bench.mm.current_loaded_models == []
    assert {device: card.allocated(device) for device in devices} == before
    assert card.used(card.compute) - used <= card.segments
    assert torch.equal(bench.sample(loader, 2), latents[1])


@pytest.mark.usefixtures("static_split")
def test_free_leaves_a_kept_model_where_it_is(bench, card, expected):
    latent = expected("wan", 2)
    loader = bench.distorch(bench.text("wan", 0.4), keep_loaded=True)
    bench.sample(loader)
    model, split = bench.loaded().model, bench.state().split
    locked = dict(card.locks.held)
    with card.traffic() as traffic:
        bench.free()
    assert sum(copy.nbytes for copy in traffic.copies) < split.slot_bytes // 2
    assert card.locks.held == locked
    assert bench.loaded().model is model
    assert card.allocated(card.compute) >= split.compute_bytes
    assert torch.equal(bench.sample(loader, 2), latent)
    assert bench.loaded().model is model
