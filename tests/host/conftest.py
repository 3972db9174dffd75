"""A real ComfyUI with this plugin and MultiGPU, on two simulated accelerators.

    pytest tests/host --comfyui 0.18.2 [--multigpu DIR|double:VERSION] [--gguf DIR|double]
                      [--plugin-first]

One process boots one ComfyUI, so each combination is a run of its own (`make test`).
"""

import gc
import sys
from pathlib import Path

import pytest
import torch

from rig import comfy_host, multigpu, prompts, simulator, tiny_wan

ROOT = Path(__file__).parents[2]
RIG = ROOT / "tests" / "rig"
CACHE = ROOT / ".cache"
COMPUTE = "acc:0"
LAYERS = 8

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--comfyui", default="0.30.0", help="ComfyUI version, from PyPI")
    parser.addoption("--multigpu", default=multigpu.DEFAULT, help=multigpu.HELP)
    parser.addoption("--gguf", default="double", help="a checkout of ComfyUI-GGUF, or double")
    parser.addoption("--plugin-first", action="store_true", help="ComfyUI loads the plugin first")


def pytest_report_header(config):
    options = [config.getoption(name) for name in ("comfyui", "multigpu", "gguf", "plugin_first")]
    return "ComfyUI {}, MultiGPU {}, GGUF {}, plugin first: {}".format(*options)


class Workbench:
    """The booted host, and the prompts that the tests run on it."""

    def __init__(self, host, plugin, multigpu):
        self.host = host
        self.plugin = plugin
        self.mm = host.mm
        self.multigpu = multigpu  # its version

    def needs_multigpu(self, *version):
        """Skip a test of MultiGPU's own ways where an older one is not up to this ComfyUI."""
        package = Path(self.host.custom_module("ComfyUI-MultiGPU").__file__).resolve()
        if RIG not in package.parents and self.multigpu < version:
            pytest.skip(f"MultiGPU itself fails here before {version}")

    def module(self, name):
        """A module of the plugin as ComfyUI imported it."""
        return sys.modules[f"{self.plugin.__name__}.{name}"]

    def plain(self, file="wan.safetensors"):
        return prompts.plain(file)

    def distorch(self, text="", virtual_vram=0.0, donor="cpu", **inputs):
        inputs = {"virtual_vram_gb": virtual_vram, "donor_device": donor, **inputs}
        loader = prompts.distorch(inputs.pop("unet_name", "wan.safetensors"), text, **inputs)
        if self.multigpu <= (2, 5, 0):
            del loader["inputs"]["eject_models"]
        return loader

    def allocate(self, patcher, text):
        """Give a patcher an allocation the way that this MultiGPU does."""
        multigpu = self.host.custom_module("ComfyUI-MultiGPU").__name__
        distorch_2 = sys.modules[f"{multigpu}.distorch_2"]
        table = getattr(distorch_2, "safetensor_allocation_store", None)
        if table is None:
            patcher.model._distorch_v2_meta = {"full_allocation": text}
        else:
            table[distorch_2.create_safetensor_model_hash(patcher, "test")] = text

    def lora(self, loader, strength):
        """The nodes of a loader and a LoRA on top of it; node 10 is the model."""
        return {"1": loader, "10": prompts.lora("1", strength)}

    def sample(self, loader, seed=1, steps=2, model=None, positive="20"):
        """Sample with classifier-free guidance and return the latent, on the CPU.

        ``loader`` is a loader node, or nodes by id of which the last is the model.
        """
        nodes = loader if "class_type" not in loader else {"1": loader}
        model = model or max(nodes, key=int)
        self.host.run(prompts.guided(nodes, model, seed, steps, positive))
        return self.host.custom_module("probe").LATENTS.pop("out")

    def load(self, loader):
        """The patcher that a loader node makes, outside of any prompt."""
        node = self.host.nodes[loader["class_type"]]
        return getattr(node(), node.FUNCTION)(**loader["inputs"])[0]

    def loaded(self):
        """The patcher of the swapped model that ComfyUI holds now."""
        state = self.module("model_patcher_patch").STATE
        (patcher,) = [
            loaded.model
            for loaded in self.mm.current_loaded_models
            if loaded.model is not None and hasattr(loaded.model.model, state)
        ]
        return patcher

    def state(self, patcher=None):
        """The swap state of a patcher's model."""
        return getattr((patcher or self.loaded()).model, self.module("model_patcher_patch").STATE)

    def clear(self):
        """Let every model go, as the free buttons do."""
        for loaded in list(self.mm.current_loaded_models):
            if loaded.model is not None:
                loaded.model_unload()
        self.mm.current_loaded_models.clear()
        self.plugin._memory.retention.let_go_all("a test ends")
        self.host.free(unload_models=True, free_memory=True)
        gc.collect()


@pytest.fixture(scope="session")
def bench(pytestconfig, tmp_path_factory):
    """The workbench of this run."""
    torch.set_num_threads(1)  # the tensors are tiny
    base = tmp_path_factory.mktemp("comfyui")
    models = base / "models"
    for folder in ("diffusion_models", "checkpoints", "loras"):
        (models / folder).mkdir(parents=True)
    tiny_wan.write_wan(models / "diffusion_models" / "wan.safetensors", layers=LAYERS)
    tiny_wan.write_wan(models / "diffusion_models" / "other.safetensors", layers=LAYERS, seed=7)
    checkpoint = models / "checkpoints" / "wan.safetensors"
    tiny_wan.write_wan(checkpoint, layers=LAYERS, prefix="model.diffusion_model.")
    tiny_wan.write_lora(models / "loras" / "lora.safetensors", layers=LAYERS, seed=3)
    folder, version = multigpu.package(pytestconfig.getoption("multigpu"))
    nodes = [
        ("probe", RIG / "probe_nodes"),
        ("ComfyUI-MultiGPU", folder),
        ("block_swap", ROOT),
    ]
    if pytestconfig.getoption("plugin_first"):
        nodes.reverse()
    gguf = pytestconfig.getoption("gguf")
    gguf = RIG / "gguf_double" if gguf == "double" else Path(gguf)
    nodes.insert(0, ("ComfyUI-GGUF", gguf))
    simulator.install(count=2)
    # The weights stay in the file's bf16, and nodes are cached by the graph alone.
    argv = ("--bf16-unet", "--cache-classic")
    source = comfy_host.fetch(pytestconfig.getoption("comfyui"), CACHE)
    host = comfy_host.Host.boot(source, base, nodes, argv=argv)
    gc.freeze()  # ComfyUI collects after every prompt: spare it going through its own modules
    return Workbench(host, host.custom_module("block_swap"), version)


@pytest.fixture(autouse=True)
def simulated(bench):
    """Every test starts with empty devices and ends without a race."""
    bench.clear()
    simulator.reset()
    yield
    simulator.check()


@pytest.fixture
def static_split(bench, monkeypatch):
    """No slot is exchanged for a block, for tests that count copies over several passes."""
    monkeypatch.setattr(bench.module("step_time"), "WORTH", 1.0)


@pytest.fixture(scope="session")
def reference(bench):
    """Latents of the unswapped model on the same device, by seed (1 and 2)."""
    latents = {seed: bench.sample(bench.plain(), seed=seed) for seed in (1, 2)}
    bench.clear()
    return latents
