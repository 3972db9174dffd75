"""Inside a pass torch, ComfyUI and MultiGPU agree on the device, whoever sampled."""

import pytest
import torch

from conftest import COMPUTE
from rig import page_locking, prompts

OTHER = "acc:1"


@pytest.fixture
def seen(bench, monkeypatch):
    """What a block, and what a staging worker, took for the current device: torch's, and theirs."""
    multigpu = bench.host.custom_module("ComfyUI-MultiGPU")
    seen = []

    def look(who):
        mine = (torch.acc.current_device(), bench.mm.get_torch_device())
        seen.append((who, *mine, torch.device(multigpu.get_current_device())))

    from comfy.ldm.wan.model import WanAttentionBlock

    forward = WanAttentionBlock.forward

    def looking(block, *args, **kwargs):
        look("block")
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(WanAttentionBlock, "forward", looking)
    ring = bench.module("donor_link").Ring
    copy = ring.copy

    def copying(*args):
        seen.append(("worker", torch.acc.current_device()))
        return copy(*args)

    monkeypatch.setattr(ring, "copy", copying)
    return seen


def custom_sampling(loader):
    """SamplerCustomAdvanced: the guider samples, MultiGPU's guard of `comfy.sample` is not met."""
    return {
        "1": loader,
        "20": prompts.conditioning(1, 16),
        "21": prompts.conditioning(2, 17),
        "22": prompts.EMPTY_LATENT,
        "30": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
        "31": {
            "class_type": "CFGGuider",
            "inputs": {"model": ["1", 0], "positive": ["20", 0], "negative": ["21", 0], "cfg": 5.0},
        },
        "32": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "33": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["1", 0], "scheduler": "simple", "steps": 2, "denoise": 1.0},
        },
        "34": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["30", 0],
                "guider": ["31", 0],
                "sampler": ["32", 0],
                "sigmas": ["33", 0],
                "latent_image": ["22", 0],
            },
        },
        "35": prompts.probe("34", "custom"),
    }


@pytest.mark.parametrize("sampler", ["KSampler", "SamplerCustomAdvanced"])
def test_a_pass_holds_its_device(bench, seen, monkeypatch, sampler):
    """The model computes on the second device, while the first is everybody's current one."""
    page_locking.install(monkeypatch, bench.mm, 1 << 20)  # a ring, and homes that have to use it
    monkeypatch.setattr(bench.module("donor_link"), "CHUNK_BYTES", 1 << 16)
    multigpu = bench.host.custom_module("ComfyUI-MultiGPU")
    loader = prompts.distorch("wan.safetensors", f"{OTHER},30%;cpu,*", compute=OTHER)
    multigpu.set_current_device(torch.device(COMPUTE))
    torch.acc.set_device(0)
    before = multigpu.get_current_device()
    if sampler == "KSampler":
        bench.sample(loader)
    else:
        bench.host.run(custom_sampling(loader))
    assert {entry for entry in seen if entry[0] == "block"} == {
        ("block", 1, torch.device(OTHER), torch.device(OTHER))
    }
    assert {entry for entry in seen if entry[0] == "worker"} == {("worker", 1)}
    assert torch.acc.current_device() == 0
    assert multigpu.get_current_device() == before
    bench.clear()


def test_patches_are_computed_on_the_device_they_are_for(bench, monkeypatch):
    """Kernels that quantise a patched weight ask torch, and MultiGPU's guards, where they are."""
    multigpu = bench.host.custom_module("ComfyUI-MultiGPU")
    import comfy.lora

    calculate, seen = comfy.lora.calculate_weight, set()

    def looking(*args, **kwargs):
        seen.add((torch.acc.current_device(), str(multigpu.get_current_device())))
        return calculate(*args, **kwargs)

    monkeypatch.setattr(comfy.lora, "calculate_weight", looking)
    loader = prompts.distorch("wan.safetensors", f"{OTHER},30%;cpu,*", compute=OTHER)
    torch.acc.set_device(0)
    bench.sample(bench.lora(loader, 1.0))
    assert seen == {(1, OTHER)}


def test_after_a_pass_that_failed_the_devices_are_what_they_were(bench, seen, monkeypatch):
    patcher = bench.load(prompts.distorch("wan.safetensors", f"{OTHER},30%;cpu,*", compute=OTHER))
    bench.mm.load_models_gpu([patcher])
    torch.acc.set_device(0)
    outside = bench.mm.get_torch_device()
    with pytest.raises(TypeError):
        patcher.model.diffusion_model("no latent")
    assert torch.acc.current_device() == 0
    assert bench.mm.get_torch_device() == outside
    assert bench.module("device_utils").pass_device() is None


def test_a_free_visits_only_devices_that_hold_something(bench, monkeypatch):
    """To synchronise a card that nobody uses makes a context there."""
    visited = []
    synchronize = type(torch.acc).synchronize

    def noting(module, device=None):
        visited.append(str(device))
        return synchronize(module, device)

    bench.sample(bench.distorch("acc:0,40%;cpu,*"))
    monkeypatch.setattr(type(torch.acc), "synchronize", noting)
    bench.mm.soft_empty_cache()
    assert visited and set(visited) == {COMPUTE}
