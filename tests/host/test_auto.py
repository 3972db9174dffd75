"""`auto`: the compute device holds what the video leaves, and no pass fails for want of memory."""

import contextlib
import gc

import pytest
import torch

from conftest import COMPUTE, RESERVED
from rig import comfy_host, prompts, simulator

MIB = 1 << 20
ledger = simulator.ledger
AUTO = f"{COMPUTE},auto;cpu,*"


def kind_of_video(bench):
    return bench.module("pass_memory").PassKind.of("WanModel", torch.bfloat16, (1, 16, 2, 8, 8))


@pytest.mark.parametrize("mebibytes", [7, 8, 9, 10, 12, 16, 19, 21, 40])
def test_the_card_is_full_and_never_over(bench, card, need, reference, mebibytes):
    """Whatever ComfyUI's estimate is worth: the first prompt runs, the second fills the card."""
    card(mebibytes)
    for seed in (1, 2):
        ledger.reset_peak()
        assert bench.sample(bench.distorch(AUTO), seed=seed).equal(reference[seed])
        assert ledger.peak[COMPUTE] <= mebibytes * MIB
    state = bench.state()
    may = min(mebibytes * MIB - 1.03 * need - RESERVED, state.sizes.total_bytes)
    assert state.split.compute_bytes <= may or len(state.split.swapped) == len(state.split.homes)
    assert state.split.compute_bytes >= may - 1 - state.sizes.largest_block


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 3.0])
def test_a_wrong_estimate_is_learnt_within_two_prompts(
    bench, card, need, estimate, reference, log, factor
):
    card(16)
    estimate(factor * need)
    splits, repeats = [], []
    for seed in (1, 2, 1, 2):
        before = len(log("out of memory in a pass"))
        assert bench.sample(bench.distorch(AUTO), seed=seed).equal(reference[seed])
        splits.append(bench.state().split.homes)
        repeats.append(len(log("out of memory in a pass")) - before)
    assert splits[1] == splits[2] == splits[3]
    assert repeats[1:] == [0, 0, 0]
    assert (repeats[0] > 0) == (factor < 0.5)


def test_memory_that_is_free_in_pieces_is_learnt_too(
    bench, card, need, reference, log, monkeypatch
):
    """The allocator's peak is no more than before, and still there was too little."""
    card(14)
    bench.module("host_memory").pass_memory.learn(kind_of_video(bench), need)
    require = ledger.require

    def in_pieces(device, nbytes):
        if device == COMPUTE and bench.module("device_utils").pass_device() is not None:
            with monkeypatch.context() as patch:
                patch.setitem(ledger.capacity, COMPUTE, 11 * MIB)
                return require(device, nbytes)
        return require(device, nbytes)

    monkeypatch.setattr(ledger, "require", in_pieces)
    repeats = []
    for seed in (1, 2, 1, 2):
        before = len(log("out of memory in a pass"))
        assert bench.sample(bench.distorch(AUTO), seed=seed).equal(reference[seed])
        repeats.append(len(log("out of memory in a pass")) - before)
    assert repeats[0] > 0 and repeats[1:] == [0, 0, 0]


def test_a_pass_that_runs_out_of_memory_is_repeated(bench, card, estimate, reference, log):
    card(14)
    estimate(0)
    assert bench.sample(bench.distorch(AUTO), seed=1).equal(reference[1])
    assert len(log("which is repeated with")) >= 1
    assert bench.state().swap.slot_bytes > 0


def test_at_the_floor_the_error_is_the_hosts(bench, card, estimate, reference):
    card(5)
    estimate(0)
    with pytest.raises(comfy_host.PromptError) as caught:
        bench.sample(bench.distorch(AUTO), seed=1)
    assert "OutOfMemoryError" in caught.value.exception_type
    assert "wan/model.py" in caught.value.traceback  # where it happened is not lost
    bench.clear()
    card(40)
    assert bench.sample(bench.distorch(AUTO), seed=1).equal(reference[1])


def test_a_forward_of_others_is_not_repeated_but_learnt_from(bench, card, estimate, log):
    """Nodes that cache across steps replace it, and keep what they have seen."""
    card(14)
    estimate(0)
    patcher = bench.load(bench.distorch(AUTO))
    model, calls = patcher.model.diffusion_model, []
    forward_orig = model.forward_orig

    def caching(*args, **kwargs):
        calls.append(1)
        return forward_orig(*args, **kwargs)

    patcher.add_object_patch("diffusion_model.forward_orig", caching)
    generator, dtype = torch.Generator().manual_seed(0), patcher.model.get_dtype_inference()
    x = torch.randn(1, 16, 2, 8, 8, generator=generator).to(COMPUTE, dtype)
    context = torch.randn(1, 16, 4096, generator=generator).to(COMPUTE, dtype)

    def prompt():
        need = patcher.model.memory_required([1, 16, 2, 8, 8])
        with torch.inference_mode():
            bench.mm.load_models_gpu([patcher], memory_required=need)
            return model(x, torch.full((1,), 500.0).to(COMPUTE), context)

    for _ in range(3):  # a pass that fails shows only where it stopped
        try:
            out = prompt()
        except torch.OutOfMemoryError:
            gc.collect()
    assert out.shape == x.shape
    assert len(calls) == 3
    assert log("which is repeated") == []
    bench.clear()


def test_a_cache_around_the_blocks_sees_one_pass(bench, card, estimate, reference, log):
    """EasyCache and the like wrap the forward from outside of what is repeated."""
    import comfy.patcher_extension

    card(14)
    estimate(0)
    patcher = bench.load(bench.distorch(AUTO))
    model, seen = patcher.model.diffusion_model, []

    def wrapper(executor, *args, **kwargs):
        seen.append("in")
        out = executor(*args, **kwargs)
        seen.append("out")
        return out

    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    options = {"wrappers": {kind: {"test": [wrapper]}}}
    generator, dtype = torch.Generator().manual_seed(0), patcher.model.get_dtype_inference()
    x = torch.randn(1, 16, 2, 8, 8, generator=generator).to(COMPUTE, dtype)
    context = torch.randn(1, 16, 4096, generator=generator).to(COMPUTE, dtype)
    with torch.inference_mode():
        bench.mm.load_models_gpu([patcher])
        model(x, torch.full((1,), 500.0).to(COMPUTE), context, transformer_options=options)
    assert len(log("which is repeated")) >= 1
    assert seen == ["in", "out"]
    bench.clear()


def test_a_typed_quota_is_never_changed_by_an_error(bench, card, estimate):
    card(12)
    estimate(0)
    with pytest.raises(comfy_host.PromptError):
        bench.sample(bench.distorch(f"{COMPUTE},11mb;cpu,*"), seed=1)


@pytest.mark.parametrize("quota", [3, 5, 7, 9, 11])
def test_a_typed_quota_that_leaves_too_little_is_told_once(
    bench, card, need, log, quota, static_split
):
    """Before the first step, with the largest quota that fits, exactly where it is due."""
    bench.module("host_memory").pass_memory.learn(kind_of_video(bench), need)
    loader = bench.distorch(f"{COMPUTE},{quota}mb;cpu,*")
    patcher = bench.load(loader)
    bench.mm.load_models_gpu([patcher])
    weights = bench.state(patcher).split.compute_bytes
    bench.clear()
    assert log("too little of it") == []
    # 8 MiB and a half may be typed here: what a pass is known to need is taken with some slack.
    card((8.5 * MIB + need * 1.03 + RESERVED) / MIB)
    for seed in (1, 2):
        with contextlib.suppress(comfy_host.PromptError):
            bench.sample(loader, seed=seed)
    told = log("too little of it")
    assert bool(told) == (weights > 8 * MIB)
    assert len(set(told)) <= 1 and len(told) <= 2  # a prompt that failed has let the model go
    assert all("acc:0,8mb or less, or acc:0,auto" in line for line in told)


def test_what_is_free_is_never_quite_the_same_and_nothing_flaps(bench, card, need, reference):
    """A few hundred KB more or less, as previews and desktops take: no block moves."""
    card(14)
    bench.sample(bench.distorch(AUTO), seed=1)
    bench.sample(bench.distorch(AUTO), seed=2)
    homes = set()
    for n, less in enumerate((0.0, 0.2, 0.0, 0.1, 0.3, 0.0, 0.2)):
        card(13.7 + less)
        bench.sample(bench.distorch(AUTO), seed=n % 2 + 1)
        homes.add(bench.state().split.homes)
    assert len(homes) <= 2
    card(14)
    ledger.clear_copies()
    assert bench.sample(bench.distorch(AUTO), seed=1).equal(reference[1])


def test_prompt_after_prompt_nothing_moves_and_nothing_is_said(bench, card, log):
    """The same video again: what is free has not changed, and neither does anything else."""
    card(14)
    for seed in (1, 2, 1):
        bench.sample(bench.distorch(AUTO), seed=seed)
    split, said = bench.state().split, len(log("Block swap of"))
    block = split.sizes.largest_block
    ledger.clear_copies()
    for seed in (2, 1):
        bench.sample(bench.distorch(AUTO), seed=seed)
    assert bench.state().split is split
    assert len(log("Block swap of")) == said
    passes = 2 * 2 * 2  # prompts, steps, cond and uncond
    large = [copy.nbytes for copy in ledger.copies if copy.nbytes >= block // 2]
    assert len(large) == passes * len(split.swapped)


def test_it_follows_the_length_of_the_video_and_reads_no_file(bench, card, reference):
    probe = bench.host.custom_module("probe")
    card(18)
    bench.sample(bench.distorch(AUTO), seed=1)
    bench.sample(bench.distorch(AUTO), seed=2)
    short, read = bench.state().split.compute_bytes, dict(probe.OPENED)
    patcher = bench.loaded()
    longer = {
        **prompts.EMPTY_LATENT,
        "inputs": {"width": 192, "height": 192, "length": 17, "batch_size": 1},
    }
    nodes = prompts.guided({"1": bench.distorch(AUTO)}, "1", 1, 2)
    nodes["22"] = longer
    for seed in (1, 2):
        nodes["23"]["inputs"]["seed"] = seed
        bench.host.run(nodes)
    assert bench.state().split.compute_bytes < short
    bench.sample(bench.distorch(AUTO), seed=1)
    assert bench.state().split.compute_bytes == short
    assert dict(probe.OPENED) == read
    assert bench.loaded().model is patcher.model


def test_what_saves_no_time_is_given_back_before_others_are_evicted(bench, card):
    """Where copies hide behind the computation, `auto` needs little of what it has."""
    card(40)
    other = bench.load(bench.plain("other.safetensors"))
    bench.mm.load_models_gpu([other])
    patcher = bench.load(bench.distorch(AUTO))
    bench.mm.load_models_gpu([patcher])
    state, device = bench.state(patcher), torch.device(COMPUTE)
    held = state.compute_bytes()
    assert held == state.sizes.total_bytes
    state.tuner.cheapest_bytes = held // 2
    wanted = bench.mm.get_free_memory(device) + held // 4
    bench.mm.free_memory(wanted, device)
    assert bench.mm.get_free_memory(device) >= wanted
    assert {loaded.model for loaded in bench.mm.current_loaded_models} == {other, patcher}
    assert state.compute_bytes() >= held // 2


def test_the_host_makes_room_for_the_whole_model(bench, card):
    card(40)
    patcher = bench.load(bench.distorch(AUTO))
    bench.mm.load_models_gpu([patcher])
    (loaded,) = [m for m in bench.mm.current_loaded_models if m.model is patcher]
    assert loaded.model_memory_required(torch.device(COMPUTE)) == 0
    with torch.inference_mode():
        bench.mm.free_memory(1 << 40, torch.device(COMPUTE))
    assert loaded.model_memory_required(torch.device(COMPUTE)) >= 0.99 * total_of(bench, patcher)


def total_of(bench, patcher):
    return bench.state(patcher).sizes.total_bytes


def test_a_donor_may_be_auto_too(bench, card, monkeypatch, reference):
    card(12)
    monkeypatch.setitem(ledger.capacity, "acc:1", 4 * MIB)
    loader = bench.distorch(f"{COMPUTE},auto;acc:1,auto;cpu,*")
    for seed in (1, 2):
        assert bench.sample(loader, seed=seed).equal(reference[seed])
    split = bench.state().split
    assert 0 < split.bytes_on("acc:1") <= 0.9 * 4 * MIB
    assert ledger.allocated["acc:1"] == split.bytes_on("acc:1")


@pytest.mark.parametrize("setting", ["HIGH_VRAM", "LOW_VRAM", "NO_VRAM"])
def test_settings_of_the_host_are_respected(bench, card, monkeypatch, reference, setting):
    card(16)
    monkeypatch.setattr(bench.mm, "vram_state", getattr(bench.mm.VRAMState, setting))
    for seed in (1, 2):
        assert bench.sample(bench.distorch(AUTO), seed=seed).equal(reference[seed])
    assert ledger.peak[COMPUTE] <= 16 * MIB


def test_what_multigpu_loads_is_told_in_bytes(bench, card, no_blocks, monkeypatch):
    """It knows no `auto`; the string stays what the user typed.

    A layer is 2 MiB here, and MultiGPU may place one more than it was asked to.
    """
    card(9)
    monkeypatch.setattr(bench.mm, "minimum_inference_memory", lambda: 3 * MIB)
    inner, text = no_blocks.model, "acc:0,auto;acc:1,*#acc:0"
    bench.allocate(no_blocks, text)
    no_blocks.partially_load(torch.device(COMPUTE))
    assert bench.module("model_lookup").allocation_text(inner) == text
    assert inner._distorch2_in_bytes[1].startswith(f"acc:0,{6 * MIB}b;acc:1,0b*#")
    held = sum(p.nbytes for p in inner.parameters() if str(p.device) == COMPUTE)
    assert 0 < held <= 9 * MIB
    assert {str(p.device) for p in inner.parameters()} == {COMPUTE, "acc:1"}
