"""What patches do to a swapped model: hooks, merges, LoRAs, object patches, weight wrappers."""

import gc
import itertools
import sys

import pytest
import safetensors.torch
import torch

from conftest import COMPUTE
from rig import simulator

ledger = simulator.ledger
SPLIT = "acc:0,12mb;acc:1,8mb;cpu,*"


@pytest.mark.parametrize("split", [SPLIT, "acc:0,8mb;cpu,*"])
def test_hooks_that_switch_a_lora_are_those_of_the_host(bench, split):
    """A LoRA on the positive prompt alone: its weights are written in and out every step."""

    def hooked(loader):
        hook = {"lora_name": "lora.safetensors", "strength_model": 1.0, "strength_clip": 0.0}
        positive = {
            "cond_NEW": ["20", 0],
            "strength": 1.0,
            "set_cond_area": "default",
            "hooks": ["11", 0],
        }
        return {
            "1": loader,
            "11": {"class_type": "CreateHookLora", "inputs": hook},
            "12": {"class_type": "ConditioningSetProperties", "inputs": positive},
        }

    def sample(loader, seed):
        return bench.sample(hooked(loader), seed, steps=3, model="1", positive="12")

    expected = [sample(bench.plain(), seed) for seed in (1, 2, 1)]
    unhooked = bench.sample(bench.plain(), 1, steps=3)
    bench.clear()
    loader = bench.distorch(split)
    latents = [sample(loader, seed) for seed in (1, 2, 1)]
    for latent, host in zip(latents, expected, strict=True):
        assert torch.equal(latent, host)
    assert not torch.equal(latents[0], unhooked)
    assert torch.equal(bench.sample(loader, 1, steps=3), unhooked)


def test_a_lora_that_widens_a_weight(bench, tmp_path):
    """Control LoRAs grow the patch embedding; it stays beside the pack until it is undone."""
    key = "diffusion_model.patch_embedding"
    generator = torch.Generator().manual_seed(5)
    wide = 32
    lora = {
        f"{key}.lora_up.weight": torch.randn(256, 2, 1, 1, 1, generator=generator) * 0.02,
        f"{key}.lora_down.weight": torch.randn(2, wide, 1, 2, 2, generator=generator) * 0.02,
        f"{key}.reshape_weight": torch.tensor([256, wide, 1, 2, 2]),
    }
    path = bench.host.base_dir / "models" / "loras" / "wide.safetensors"
    safetensors.torch.save_file(lora, path)

    def weights(loader):
        patcher = bench.load(loader)
        clone = bench.host.nodes["LoraLoaderModelOnly"]().load_lora_model_only(
            patcher, "wide.safetensors", 1.0
        )[0]
        bench.mm.load_models_gpu([clone])
        patched = clone.model.diffusion_model.patch_embedding.weight.cpu().clone()
        there = ledger.allocated[COMPUTE]
        loaded = clone.loaded_size()
        bench.mm.load_models_gpu([patcher])
        again = patcher.model.diffusion_model.patch_embedding.weight
        result = patched, again.cpu().clone(), there - loaded
        patcher.detach()
        return result

    with torch.inference_mode():
        host, original, _ = weights(bench.plain())
        bench.clear()
        before = ledger.allocated[COMPUTE]
        swapped, restored, beside = weights(bench.distorch(SPLIT))
    assert host.shape[1] == wide
    assert torch.equal(swapped, host)
    assert torch.equal(restored, original)
    assert 0 <= beside - before < 20_000
    path.unlink()


def test_a_merge_keeps_the_weights_it_was_made_of(bench):
    """The merge takes A's weights while A is loaded; A is then patched in place."""

    def scenario(loader):
        a, b = bench.load(loader("wan.safetensors")), bench.load(loader("other.safetensors"))
        bench.mm.load_models_gpu([a])
        merge = b.clone()
        merge.add_patches(a.get_key_patches("diffusion_model."), 0.5, 0.5)
        node = bench.host.nodes["LoraLoaderModelOnly"]()
        bench.mm.load_models_gpu([node.load_lora_model_only(a, "lora.safetensors", 1.0)[0]])
        bench.mm.load_models_gpu([merge])
        return {name: t.cpu().clone() for name, t in merge.model.state_dict().items()}

    with torch.inference_mode():
        host = scenario(bench.plain)
        bench.clear()
        before = dict(ledger.allocated)
        swapped = scenario(lambda name: bench.distorch("acc:0,12mb;cpu,*", unet_name=name))
    assert all(torch.equal(swapped[name], host[name]) for name in host)
    bench.clear()
    assert ledger.allocated == before


@pytest.mark.parametrize("name", ["forward_orig", "forward", "_forward"])
def test_object_patches_on_the_model_come_and_go(bench, name):
    def twice(patcher):
        model = patcher.model.diffusion_model
        method = getattr(type(model), name)
        patched = patcher.clone()
        patched.add_object_patch(
            f"diffusion_model.{name}", lambda *args, **kwargs: 2 * method(model, *args, **kwargs)
        )
        return patched

    plain = bench.load(bench.plain())
    host = _run(bench, plain), _run(bench, twice(plain))
    bench.clear()
    patcher = bench.load(bench.distorch(SPLIT))
    results = [_run(bench, p) for p in (patcher, twice(patcher), patcher, twice(patcher))]
    for result, expected in zip(results, (*host, *host), strict=True):
        assert torch.equal(result, expected)
    patcher.detach()
    bench.clear()
    # ComfyUI leaves the method it found; it must not have found one that drives the swap.
    for method in ("forward", "_forward", "forward_orig"):
        left = vars(patcher.model.diffusion_model).get(method)
        assert left is None or left.__func__ is getattr(type(patcher.model.diffusion_model), method)


class Shift:
    """A weight wrapper: adds ``value`` to a weight, where the weight is computed with."""

    def __init__(self, value):
        self.value = torch.tensor(value)

    def __call__(self, weight):
        assert weight.device == self.value.device == torch.device(COMPUTE)
        return weight + self.value.to(weight.dtype)

    def move_to(self, device):
        self.value = self.value.to(device)
        return self.value.nbytes


def test_weight_wrappers_come_and_go_with_their_clone(bench):
    """On weights and a bias of swapped blocks and beside them, alone and on top of a LoRA."""
    names = [f"blocks.{i}.self_attn.q.weight" for i in range(8)]
    names += ["blocks.2.ffn.0.bias", "blocks.5.norm3.weight", "head.head.weight"]
    names += ["text_embedding.0.weight", "patch_embedding.bias"]

    def wrapped(patcher):
        clone = patcher.clone()
        for number, name in enumerate(names):
            clone.add_weight_wrapper(f"diffusion_model.{name}", Shift(0.001 * (number + 1)))
        return clone

    def results(loader):
        patcher = bench.load(loader)
        node = bench.host.nodes["LoraLoaderModelOnly"]()
        with_lora = node.load_lora_model_only(patcher, "lora.safetensors", 1.0)[0]
        outputs = {"plain": _run(bench, patcher), "wrapped": _run(bench, wrapped(patcher))}
        gc.collect()  # that clone is dropped while it is loaded
        outputs["plain again"] = _run(bench, patcher)
        outputs["both"] = _run(bench, wrapped(with_lora))
        outputs["lora"] = _run(bench, with_lora)
        outputs["wrapped again"] = _run(bench, wrapped(patcher))
        patcher.detach()
        outputs["after unloading"] = _run(bench, patcher)
        return outputs

    host = results(bench.plain())
    bench.clear()
    swapped = results(bench.distorch(SPLIT))
    assert [name for name in host if not torch.equal(swapped[name], host[name])] == []
    for same in ("plain again", "after unloading"):
        assert torch.equal(host[same], host["plain"])
    different = [host[name] for name in ("plain", "wrapped", "lora", "both")]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(different, 2))


def _run(bench, patcher):
    """One pass of a patcher's model after its load."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        bench.mm.load_models_gpu([patcher])
        dtype = patcher.model.get_dtype_inference()
        x = torch.randn(1, 16, 2, 8, 8, generator=generator).to(COMPUTE, dtype)
        context = torch.randn(1, 16, 4096, generator=generator).to(COMPUTE, dtype)
        t = torch.full((1,), 500.0).to(COMPUTE)
        return patcher.model.diffusion_model(x, t, context).cpu()


def test_load_callbacks_are_called(bench):
    patcher = bench.load(bench.distorch(SPLIT))
    seen = []
    callbacks = sys.modules["comfy.patcher_extension"].CallbacksMP
    patcher.add_callback(callbacks.ON_LOAD, lambda *args: seen.append(args[0]))
    bench.mm.load_models_gpu([patcher])
    assert seen == [patcher]


def test_accounting_follows_slots_that_a_pass_allocates(bench):
    patcher = bench.load(bench.distorch("acc:0,14mb;cpu,*"))
    _run(bench, patcher)
    before = ledger.allocated[COMPUTE] - patcher.loaded_size()
    freed = patcher.partially_unload(patcher.offload_device, 1)
    assert freed > 0
    assert ledger.allocated[COMPUTE] - patcher.loaded_size() == before
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        dtype = patcher.model.get_dtype_inference()
        x = torch.randn(1, 16, 2, 8, 8, generator=generator).to(COMPUTE, dtype)
        context = torch.randn(1, 16, 4096, generator=generator).to(COMPUTE, dtype)
        patcher.model.diffusion_model(x, torch.full((1,), 500.0).to(COMPUTE), context)
        del x, context
    assert ledger.allocated[COMPUTE] - patcher.loaded_size() == before


def test_highvram_which_offloads_to_the_compute_device(bench):
    patcher = bench.load(bench.distorch("acc:0,14mb;cpu,*"))
    patcher.offload_device = torch.device(COMPUTE)
    before = ledger.allocated[COMPUTE]
    bench.mm.load_models_gpu([patcher])
    loaded = ledger.allocated[COMPUTE]
    split = bench.state(patcher).split
    wanted = split.slots * split.slot_bytes + 1
    freed = patcher.partially_unload(patcher.offload_device, wanted)
    assert freed >= wanted
    assert freed == loaded - ledger.allocated[COMPUTE]
    patcher.detach()
    assert ledger.allocated[COMPUTE] == before
    assert patcher.current_loaded_device() == torch.device("cpu")


def test_a_loader_makes_the_model_on_the_cpu(bench, monkeypatch):
    """ComfyUI makes it on the card where more VRAM than RAM is free."""
    free = bench.mm.get_free_memory

    def little_ram(dev=None, torch_free_too=False):
        if dev is not None and dev.type == "cpu":
            return (1 << 20, 0) if torch_free_too else 1 << 20
        return free(dev, torch_free_too)

    monkeypatch.setattr(bench.mm, "get_free_memory", little_ram)
    before = ledger.allocated[COMPUTE]
    node = bench.host.nodes["CheckpointLoaderSimpleDisTorch2MultiGPU"]()
    outputs = node.override(
        ckpt_name="wan.safetensors",
        compute_device=COMPUTE,
        virtual_vram_gb=0.0,
        expert_mode_allocations="acc:0,8mb;cpu,*",
        keep_loaded=False,
    )
    assert ledger.allocated[COMPUTE] == before
    assert outputs[0].offload_device == torch.device("cpu")


def test_another_load_device_takes_the_model_there(bench):
    patcher = bench.load(bench.distorch("acc:0,8mb;cpu,*"))
    here = _run(bench, patcher)
    bench.clear()
    patcher.load_device = torch.device("acc:1")
    bench.mm.load_models_gpu([patcher])
    assert bench.state(patcher).split.compute_device == "acc:1"
    assert ledger.allocated["acc:1"] >= bench.state(patcher).split.compute_bytes
    patcher.detach()
    assert torch.isfinite(here).all()


def test_planning_anew_waits_for_the_copies_of_the_last_pass(bench):
    """The last pass has queued copies for the next: their sources are about to move."""
    patcher = bench.load(bench.distorch("acc:1,*"))
    before = _run(bench, patcher)
    patcher.model._distorch_v2_meta = {"full_allocation": "cpu,*#acc:0"}
    bench.module("model_lookup").follow_allocation(patcher)
    assert torch.equal(_run(bench, patcher), before)
    assert bench.state(patcher).split.homes[:8] == ("cpu",) * 8
    simulator.check()
