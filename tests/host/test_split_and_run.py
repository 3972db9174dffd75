"""An allocation string on a real ComfyUI: the same latent, the bytes that were asked for."""

import pytest
import torch

from conftest import COMPUTE
from rig import prompts, simulator

ledger = simulator.ledger

STRINGS = {
    "two accelerators and the CPU": {"text": "acc:0,12mb;acc:1,8mb;cpu,*"},
    "ratio": {"text": "acc:0,40%;cpu,60%"},
    "bytes": {"text": "acc:0,8mb;cpu,*"},
    "all on the CPU": {"text": "cpu,*"},
    "fraction": {"text": "acc:0,0.0012;cpu,0.5"},
    "virtual VRAM": {"virtual_vram": 0.006},
    "virtual VRAM, another accelerator": {"virtual_vram": 4.0, "donor": "acc:1"},
    "everything fits": {"text": "acc:0,1gb;cpu,*"},
    "embeddings leave": {"text": "acc:0,5mb;cpu,*"},
    "only the floor": {"text": "acc:0,1mb;cpu,*"},
}
all_strings = pytest.mark.parametrize("inputs", STRINGS.values(), ids=STRINGS.keys())


@all_strings
def test_the_latent_is_bit_equal_to_the_unswapped_run(bench, reference, inputs):
    expected = [reference[seed] for seed in (1, 2, 1)]
    loader = bench.distorch(**inputs)
    latents = [bench.sample(loader, seed) for seed in (1, 2)]
    other = bench.sample(bench.plain("other.safetensors"))
    latents.append(bench.sample(loader, 1))
    for latent, unswapped in zip(latents, expected, strict=True):
        assert torch.equal(latent, unswapped)
    assert not torch.equal(other, expected[0])


@all_strings
def test_bytes_on_every_device_keep_to_their_quota(bench, inputs):
    before = dict(ledger.allocated)
    bench.sample(bench.distorch(**inputs))
    split = bench.state().split
    block = max(part.nbytes for part in split.sizes.parts)
    quotas = {quota.device: quota for quota in split.quotas}
    for device in simulator.devices():
        held = ledger.allocated[device] - before[device]
        # What the split says is what is there. Sampling leaves a latent and a few sigmas behind.
        assert 0 <= held - split.bytes_on(device) < 20_000
        quota = quotas.get(device)
        if quota is None or quota.nbytes is None or quota.wildcard:
            continue
        at_the_floor = COMPUTE not in split.homes[: len(split.sizes.blocks)]
        assert split.bytes_on(device) <= quota.nbytes or at_the_floor
        if split.swapped and not at_the_floor and device == COMPUTE:
            assert quota.nbytes - split.bytes_on(device) < block


@all_strings
def test_the_peak_less_activations_stays_within_the_split(bench, inputs):
    bench.sample(bench.plain())
    weights = bench.mm.current_loaded_models[0].model.model_size()
    activations = ledger.peak[COMPUTE] - weights
    bench.clear()
    ledger.reset_peak()
    before = ledger.allocated[COMPUTE]
    bench.sample(bench.distorch(**inputs))
    split = bench.state().split
    # The first allowance is for what padding adds to the weights.
    assert ledger.peak[COMPUTE] - before <= split.compute_bytes + activations + 20_000


@pytest.mark.usefixtures("static_split")
@all_strings
def test_a_pass_moves_the_swapped_blocks_up_in_one_copy_each_and_no_weights_down(bench, inputs):
    loader = bench.distorch(**inputs)
    bench.sample(loader)
    split = bench.state().split
    passes = []
    model = bench.loaded().model.diffusion_model
    before = model.register_forward_pre_hook(lambda *_: passes.append([len(ledger.copies)]))
    after = model.register_forward_hook(lambda *_: passes[-1].append(len(ledger.copies)))
    bench.sample(loader, seed=2, steps=3)
    before.remove()
    after.remove()
    assert len(passes) == 6  # three steps, cond and uncond
    moved = sorted(split.sizes.parts[i].nbytes for i in split.swapped)
    if len(moved) <= split.slots:
        moved = []
    for (start, end), (following, _) in zip(passes[1:], passes[2:], strict=False):
        # Wan itself sends 512 bytes of frequencies up; latents travel between passes.
        inside = [copy for copy in ledger.copies[start:end] if copy.nbytes > 512]
        assert sorted(copy.nbytes for copy in inside) == moved
        down = [c.nbytes for c in ledger.copies[start:following] if c.destination != COMPUTE]
        assert all(nbytes < 20_000 for nbytes in down)


@pytest.mark.usefixtures("static_split")
def test_the_table_is_printed_once_per_load(bench, capfd, caplog):
    loader = bench.distorch("acc:0,12mb;acc:1,8mb;cpu,*")
    with caplog.at_level("INFO", logger="MultiGPU"):
        bench.module("distorch2_patch").logger.addHandler(caplog.handler)
        bench.sample(loader, 1)
        bench.sample(loader, 2)
        bench.module("distorch2_patch").logger.removeHandler(caplog.handler)
    tables = {r.getMessage() for r in caplog.records if "Block swap of" in r.getMessage()}
    assert len(tables) == 1
    split = bench.state().split
    (table,) = tables
    assert table.startswith(split.table())
    assert "homes" in table.removeprefix(split.table())  # what there is in RAM
    for shown in ("acc:0,12mb;acc:1,8mb;cpu,*", "12.00 MiB", "8.00 MiB", "slots"):
        assert shown in split.table()


@pytest.mark.parametrize("flag", ["fp16_unet", "bf16_unet", "fp32_unet"])
def test_every_plain_precision(bench, monkeypatch, flag):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "bf16_unet", False)
    monkeypatch.setattr(args, flag, True)
    expected = bench.sample(bench.plain())
    bench.clear()
    latent = bench.sample(bench.distorch("acc:0,50%;cpu,50%"))
    assert len(bench.state().split.swapped) > 2
    assert torch.equal(latent, expected)


def test_the_checkpoint_loaders_distorch2_forms(bench, reference):
    expected = reference[1]
    simple = prompts.checkpoint("wan.safetensors", "acc:0,8mb;cpu,*")
    advanced = {
        "class_type": "CheckpointLoaderAdvancedDisTorch2MultiGPU",
        "inputs": {
            "ckpt_name": "wan.safetensors",
            "unet_compute_device": COMPUTE,
            "unet_virtual_vram_gb": 0.0,
            "unet_donor_device": "cpu",
            "clip_compute_device": "cpu",
            "clip_virtual_vram_gb": 0.0,
            "clip_donor_device": "cpu",
            "vae_device": COMPUTE,
            "unet_expert_mode_allocations": "acc:0,8mb;cpu,*",
            "clip_expert_mode_allocations": "",
            "high_precision_loras": True,
            "eject_models": False,
        },
    }
    bench.needs_multigpu(2, 6, 0)  # before, its checkpoint loading lacks `disable_dynamic`
    for loader in (simple, advanced):
        assert torch.equal(bench.sample(loader), expected)
        assert bench.state().split.homes[:8] == ("cpu",) * 8
        bench.clear()


def test_the_cpu_as_compute_device_swaps_nothing(bench):
    latent = bench.sample(bench.distorch("acc:0,8mb;cpu,*", compute="cpu"))
    assert torch.isfinite(latent).all()
    assert bench.state().split.swapped == ()
    assert ledger.count() == 0


@pytest.mark.parametrize(
    "text",
    ["acc:0,8mb;;cpu,*", "acc:7,8mb", "acc:0,-1mb", "acc:0,nan", "acc:0,*;cpu,*", "x" * 10_000],
)
def test_nonsense_fails_in_the_loader_node(bench, reference, text):
    from rig.comfy_host import PromptError

    expected = reference[1]
    with pytest.raises(PromptError) as caught:
        bench.sample(bench.distorch(text))
    assert caught.value.node_id == "1"
    assert caught.value.exception_type.endswith("AllocationError")
    assert "Devices present: cpu, acc:0, acc:1" in caught.value.message
    # The next prompt works.
    assert torch.equal(bench.sample(bench.distorch("acc:0,8mb;cpu,*")), expected)
