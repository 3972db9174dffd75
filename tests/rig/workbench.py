"""What the tests of a booted ComfyUI do with it: load, sample, look at the swap, let go."""

import gc
import sys
from pathlib import Path

import pytest

from . import prompts

RIG = Path(__file__).parent


class Workbench:
    """The booted host, and the prompts that the tests run on it."""

    def __init__(self, host, multigpu, compute, latent=prompts.EMPTY_LATENT):
        self.host = host
        self.plugin = host.custom_module("block_swap")
        self.mm = host.mm
        self.multigpu = multigpu  # its version
        self.compute = compute  # the compute device, unless a test names another
        self.latent = latent  # the node that the sampler starts from

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
        inputs.setdefault("compute", self.compute)
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
        self.host.run(prompts.guided(nodes, model, seed, steps, positive, latent=self.latent))
        return self.host.custom_module("probe").LATENTS.pop("out")

    def load(self, loader):
        """The patcher that a loader node makes, outside of any prompt."""
        node = self.host.nodes[loader["class_type"]]
        return getattr(node(), node.FUNCTION)(**loader["inputs"])[0]

    def loaded(self):
        """The patcher of the swapped model that ComfyUI holds now."""
        state = self.module("model_lookup").STATE
        (patcher,) = [
            loaded.model
            for loaded in self.mm.current_loaded_models
            if loaded.model is not None and hasattr(loaded.model.model, state)
        ]
        return patcher

    def state(self, patcher=None):
        """The swap state of a patcher's model."""
        return getattr((patcher or self.loaded()).model, self.module("model_lookup").STATE)

    def clear(self):
        """Let every model go, as the free buttons do."""
        for loaded in list(self.mm.current_loaded_models):
            if loaded.model is not None:
                loaded.model_unload()
        self.mm.current_loaded_models.clear()
        self.plugin._memory.retention.let_go_all("a test ends")
        self.host.free(unload_models=True, free_memory=True)
        gc.collect()
