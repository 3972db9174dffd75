"""VAEs and models without blocks, which MultiGPU loads: a string runs, or fails in the loader."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from conftest import COMPUTE, MIB
from rig import simulator
from rig.comfy_host import PromptError

# What MultiGPU reads as it is meant, and what it does not: the README's table, and worse.
READABLE = (
    "acc:0,4mb;cpu,*",
    "acc:0,2.5mb;acc:1,3m;cpu,*",
    "acc:0,4 MiB",
    "acc:0,4mb*;acc:1,1mb",
    "acc:0,25%;cpu,75%",
    "acc:0,8%;acc:1,8%;cpu,4%",
    "acc:0,0.4;cpu,0.5",
)
OTHERS = (
    "acc:0,auto;cpu,*",
    "acc:0,auto;acc:1,auto;cpu,*",
    "acc:0,auto;acc:1,30%;cpu,*",
    "cpu,*",
    "acc:0,*",
    "acc:1,*",
    "acc:0,50%;cpu,*",
    "acc:0,30%;acc:1,20%;cpu,*",
    "acc:0,50%",
    "acc:0,0%",
    "acc:0,0.0001;cpu,*",
    "acc:0,0.5*;acc:1,0.0001",
    "acc:0,.004gb;cpu,*",
    " acc:0 , 4mb ; cpu , * ",
    "ACC:0,4mb;CPU,*",
    "acc,4mb;cpu,*",
    "acc:0,0;cpu,*",
    "acc:0,0;cpu,0",
)
NONSENSE = ("acc:7,4mb", "acc:0,4mb;acc:0,1mb", "acc:0,4mb;cpu,50%", "acc:0,much", "acc:0,*;cpu,*")


def vae_loader(text, file, **inputs):
    inputs = {"virtual_vram_gb": 0.0, "donor_device": "cpu", "eject_models": False, **inputs}
    inputs |= {"vae_name": file, "compute_device": COMPUTE, "expert_mode_allocations": text}
    return {"class_type": "VAELoaderDisTorch2MultiGPU", "inputs": inputs}


def run(bench, loader):
    """A latent that a VAE has made a picture of, and a latent of that again, by a prompt."""
    channels = {"taesd.safetensors": "EmptyLatentImage", "ltx.safetensors": "EmptyLTXVLatentVideo"}
    node = channels[loader["inputs"]["vae_name"]]
    size = {"width": 128, "height": 128, "batch_size": 1}
    if node == "EmptyLTXVLatentVideo":
        size["length"] = 1
    nodes = {
        "1": loader,
        "2": {"class_type": node, "inputs": size},
        "3": {"class_type": "VAEDecode", "inputs": {"vae": ["1", 0], "samples": ["2", 0]}},
        "4": {"class_type": "VAEEncode", "inputs": {"vae": ["1", 0], "pixels": ["3", 0]}},
        "5": {"class_type": "ProbeLatent", "inputs": {"latent": ["4", 0], "key": "vae"}},
    }
    bench.host.run(nodes)
    return bench.host.custom_module("probe").LATENTS.pop("vae")


@pytest.fixture(scope="module")
def files(bench):
    """Files of two tiny VAEs, one of layers in chains and one that has lists of modules."""
    import comfy.ldm.lightricks.vae.causal_video_autoencoder as ltx
    import comfy.taesd.taesd
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("vae")[0])
    folder.mkdir(exist_ok=True)
    blocks = [["res_x", {"num_layers": 2}], ["compress_all", {}], ["res_x", {"num_layers": 2}]]
    config = {
        "dims": 3,
        "latent_channels": 128,
        "blocks": blocks,
        "encoder_base_channels": 32,
        "decoder_base_channels": 32,
        "norm_layer": "pixel_norm",
        "latent_log_var": "uniform",
        "patch_size": 4,
        "causal_decoder": True,
    }
    torch.manual_seed(5)
    models = {
        "taesd.safetensors": (comfy.taesd.taesd.TAESD(), None),
        "ltx.safetensors": (
            ltx.VideoVAE(config=config),
            {"config": json.dumps({"vae": config})},
        ),
    }
    for file, (model, metadata) in models.items():
        weights = {
            name: torch.randn(weight.shape) / max(1, weight[0].numel()) ** 0.5
            if weight.ndim > 1
            else torch.rand(weight.shape) + 0.5
            for name, weight in model.state_dict().items()
        }
        save_file(weights, folder / file, metadata)
    return tuple(models)


@pytest.fixture(scope="module")
def expected(bench, files):
    """What the VAEs make of a latent when ComfyUI loads them, by file."""
    latents = {
        file: run(bench, {"class_type": "VAELoader", "inputs": {"vae_name": file}})
        for file in files
    }
    bench.clear()
    assert all(latent.std() > 0 for latent in latents.values())
    return latents


@pytest.fixture
def small(bench, monkeypatch):
    """The CPU is as small for MultiGPU as the cards, of which it counts in ten-thousandths."""
    bench.needs_multigpu(2, 5, 11)
    total = bench.mm.get_total_memory

    def get_total_memory(dev=None, torch_total_too=False):
        whole = total(dev, torch_total_too)
        return 1024 * MIB if dev is not None and dev.type == "cpu" else whole

    monkeypatch.setattr(bench.mm, "get_total_memory", get_total_memory)


@pytest.mark.parametrize("text", [*READABLE, *OTHERS])
def test_a_vae_runs_by_every_string(bench, files, expected, small, text):
    for file in files:
        assert torch.equal(run(bench, vae_loader(text, file)), expected[file])
        bench.clear()


@pytest.mark.parametrize("file", ["taesd.safetensors", "ltx.safetensors"])
def test_a_vae_is_left_to_multigpu_with_one_line(bench, expected, small, log, file):
    assert torch.equal(run(bench, vae_loader("acc:0,2mb;cpu,*", file)), expected[file])
    said = log("left to MultiGPU")  # once, or once by every logger that passes it on
    (vae,) = {m.model for m in bench.mm.current_loaded_models if hasattr(m.model.model, "decode")}
    vae.partially_load(torch.device(COMPUTE))
    assert len(set(said)) == 1
    assert log("left to MultiGPU") == said
    lookup = bench.module("model_lookup")
    assert not any(hasattr(m.model.model, lookup.STATE) for m in bench.mm.current_loaded_models)


def test_virtual_vram_of_a_vae(bench, expected, small):
    file = "taesd.safetensors"
    loader = vae_loader("", file, virtual_vram_gb=4.0, donor_device="acc:1")
    assert torch.equal(run(bench, loader), expected[file])


@pytest.mark.parametrize("text", NONSENSE)
@pytest.mark.parametrize("file", ["taesd.safetensors", "ltx.safetensors"])
def test_nonsense_for_a_vae_fails_in_the_loader(bench, files, file, text):
    with pytest.raises(PromptError) as caught:
        run(bench, vae_loader(text, file))
    assert caught.value.node_id == "1"
    assert caught.value.exception_type.endswith("AllocationError")


def test_nonsense_fails_before_the_file_is_read(bench, files, monkeypatch):
    import comfy.utils

    monkeypatch.setattr(comfy.utils, "load_torch_file", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(PromptError) as caught:
        run(bench, vae_loader("acc:7,4mb", "taesd.safetensors"))
    assert caught.value.exception_type.endswith("AllocationError")


def test_a_kept_vae_does_not_take_nonsense(bench, files, expected):
    file = "taesd.safetensors"
    kept = vae_loader("acc:0,2mb;cpu,*", file, keep_loaded=True)
    assert torch.equal(run(bench, kept), expected[file])
    with pytest.raises(PromptError) as caught:
        run(bench, vae_loader("acc:0,much", file, keep_loaded=True))
    assert caught.value.node_id == "1"
    assert torch.equal(run(bench, kept), expected[file])


@pytest.mark.parametrize("text", [*READABLE, *OTHERS])
def test_a_model_without_blocks_loads_by_every_string(bench, no_blocks, small, text):
    """It has six layers of 2 MiB, and MultiGPU may put one more on a device than was asked for."""
    stored = f"{text}#{COMPUTE}"
    bench.allocate(no_blocks, stored)
    bench.mm.load_models_gpu([no_blocks])
    assert bench.module("model_lookup").allocation_text(no_blocks.model) == stored
    given = no_blocks.model._distorch2_in_bytes[1]
    assert (given == stored) == (text in READABLE)
    allocation = bench.module("model_lookup").read_allocation(no_blocks)
    named = {COMPUTE, *allocation.devices}
    assert {str(p.device) for p in no_blocks.model.parameters()} <= named


@pytest.mark.parametrize(
    ("text", "bytes_on"),
    [
        ("cpu,*", {"cpu": 12}),
        ("acc:0,*", {"acc:0": 12}),
        ("acc:0,50%;cpu,*", {"acc:0": 6, "cpu": 6}),
        ("acc:0,50%", {"acc:0": 6, "cpu": 6}),
        ("acc:0,30%;acc:1,20%;cpu,*", {"acc:0": 3.6, "acc:1": 2.4, "cpu": 6}),
        ("acc:0,.00390625gb;cpu,*", {"acc:0": 4, "cpu": 8}),
    ],
)
def test_what_is_translated_keeps_its_meaning(bench, card, no_blocks, small, text, bytes_on):
    """To one layer of 2 MiB a device, and what MultiGPU cannot place is left on the first."""
    card(1024)
    bench.allocate(no_blocks, f"{text}#{COMPUTE}")
    bench.mm.load_models_gpu([no_blocks])
    layers = list(no_blocks.model.parameters())
    for device, mebibytes in bytes_on.items():
        held = sum(p.nbytes for p in layers if str(p.device) == device)
        assert abs(held - mebibytes * MIB) <= 4 * MIB
        assert held or mebibytes < 4
    assert {str(p.device) for p in layers} <= {COMPUTE, *bytes_on}


def test_without_a_stored_compute_device_the_rest_goes_to_the_real_one(bench, no_blocks, small):
    """MultiGPU's legacy loaders store none, and it takes `cuda:0` for it then."""
    bench.allocate(no_blocks, "acc:1,4mb;cpu,0.1mb#")
    bench.mm.load_models_gpu([no_blocks])
    devices = {str(p.device) for p in no_blocks.model.parameters()}
    assert devices <= {str(simulator.devices()[0]), "acc:1", "cpu"}


def test_a_control_net_without_blocks_is_comfyuis_with_one_line(bench, no_blocks, log):
    """MultiGPU drops the strings of ControlNets."""
    net = SimpleNamespace(control_model_wrapped=no_blocks)
    inputs = vae_loader("acc:0,2mb;cpu,*", "none")["inputs"]
    bench.module("distorch2_patch")._give_allocation((net,), inputs)
    assert bench.module("model_lookup").allocation_text(no_blocks.model) == ""
    assert len(set(log("left to ComfyUI"))) == 1
