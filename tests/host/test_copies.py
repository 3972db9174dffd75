"""Deep copies of a swapped model, as ComfyUI makes for several cards: models of their own."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch

from conftest import COMPUTE
from rig import prompts, simulator, tiny_models

ledger = simulator.ledger
SPLIT = "acc:0,8mb;acc:1,4mb;cpu,*"


@pytest.fixture
def swapped(bench):
    """A loaded, swapped Wan."""
    patcher = bench.load(bench.distorch(SPLIT))
    bench.mm.load_models_gpu([patcher])
    yield patcher
    bench.clear()


def a_pass(patcher):
    """One evaluation of a patcher's Wan, on the device that it is loaded for."""

    def noise(*shape):
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        return values.to(patcher.load_device, patcher.model.get_dtype_inference())

    t = torch.full((1,), 500.0).to(patcher.load_device)
    with torch.inference_mode():
        return patcher.model.diffusion_model(noise(1, 16, 2, 8, 8), t, noise(1, 16, 4096)).cpu()


def copy_of(model):
    """A deep copy of an inner model, but for ComfyUI's configuration, which cannot be copied."""
    return copy.deepcopy(model, {id(model.model_config): model.model_config})


def patcher_of(model, device=COMPUTE):
    import comfy.model_patcher

    return comfy.model_patcher.ModelPatcher(model, torch.device(device), torch.device("cpu"))


def test_a_deep_copy_has_the_weights_and_nothing_else(bench, swapped):
    before = {name: t.cpu().clone() for name, t in swapped.model.state_dict().items()}
    held = dict(ledger.allocated)
    twin = copy_of(swapped.model)
    state = getattr(twin, bench.module("model_lookup").STATE)
    assert state is None
    assert all(torch.equal(t.cpu(), before[name]) for name, t in twin.state_dict().items())
    theirs = {t.untyped_storage().data_ptr() for t in swapped.model.state_dict().values()}
    mine = {t.untyped_storage().data_ptr() for t in twin.state_dict().values()}
    assert theirs.isdisjoint(mine)
    gone = weakref.ref(twin)
    del twin
    assert gone() is None  # at once
    assert ledger.allocated == held


@pytest.mark.parametrize("device", [COMPUTE, "acc:1"])
def test_a_deep_copy_is_loaded_and_swapped_by_itself(bench, swapped, device):
    expected = a_pass(swapped)
    other = patcher_of(copy_of(swapped.model), device)
    bench.mm.load_models_gpu([other])
    assert bench.state(other) is not None
    assert bench.state(other).split.compute_device == device
    assert torch.equal(a_pass(other), expected)
    bench.mm.load_models_gpu([swapped])
    assert torch.equal(a_pass(swapped), expected)
    other.detach()


def test_a_deep_copy_without_an_allocation_is_comfyuis(bench, swapped):
    expected = a_pass(swapped)
    twin = copy_of(swapped.model)
    del twin._distorch_v2_meta
    other = patcher_of(twin)
    bench.mm.load_models_gpu([other])
    twin.diffusion_model.to(COMPUTE)  # ComfyUI takes what is loaded for complete
    ledger.clear_copies()
    assert torch.equal(a_pass(other), expected)
    assert ledger.bytes_moved("cpu", COMPUTE) < bench.state(swapped).sizes.largest_block
    other.detach()


def test_a_patched_deep_copy_keeps_the_patch(bench):
    bench.sample(bench.lora(bench.distorch(SPLIT), 0.7))
    patcher = bench.loaded()
    expected = a_pass(patcher)
    twin = copy_of(patcher.model)
    assert all(
        torch.equal(a.cpu(), b.cpu())
        for a, b in zip(
            twin.state_dict().values(), patcher.model.state_dict().values(), strict=True
        )
    )
    twin.to(COMPUTE)
    patcher.detach()
    gc.collect()
    other = patcher_of(twin)
    assert torch.equal(a_pass(other), expected)


@pytest.fixture
def control_net(bench):
    """A small ControlNet of a Flux, swapped."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("controlnet")[0])
    folder.mkdir(exist_ok=True)
    tiny_models.write_control(folder / "copied.safetensors")
    inputs = prompts.distorch("", "cpu,*")["inputs"]
    for name in ("unet_name", "weight_dtype"):
        del inputs[name]
    inputs["control_net_name"] = "copied.safetensors"
    with tiny_models.installed():
        net = bench.load({"class_type": "ControlNetLoaderDisTorch2MultiGPU", "inputs": inputs})
        bench.mm.load_models_gpu([net.control_model_wrapped])
        yield net
    bench.clear()


def test_a_control_net_is_cloned_for_another_card(bench, control_net):
    """ComfyUI's own deep copy, where several cards compute."""
    if not hasattr(control_net, "deepclone_multigpu"):
        pytest.skip("this ComfyUI has no work for several cards")
    weights = control_net.control_model_wrapped
    clone = control_net.deepclone_multigpu(torch.device("acc:1")).control_model_wrapped
    bench.mm.load_models_gpu([clone])
    assert bench.state(clone).split.compute_device == "acc:1"
    assert bench.state(weights).split.compute_device == "acc:0"
    pairs = zip(weights.model.state_dict().values(), clone.model.state_dict().values(), strict=True)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
    assert {str(t.device) for t in clone.model.state_dict().values()} == {"acc:1", "cpu"}
    clone.detach()
