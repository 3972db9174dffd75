"""The devices that the loader nodes offer, and clearing the caches of all of them."""

import gc

import comfy.model_management as mm
import server
import torch

from . import distorch_2

# Filled on first use; the test host writes the simulated devices here, as it does in MultiGPU.
_DEVICE_LIST_CACHE = None


def get_device_list() -> list[str]:
    """Return the names of all devices, "cpu" first."""
    global _DEVICE_LIST_CACHE
    if _DEVICE_LIST_CACHE is None:
        cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        _DEVICE_LIST_CACHE = ["cpu", *cuda]
    return _DEVICE_LIST_CACHE


def is_accelerator_available() -> bool:
    """Say whether there is any device besides the CPU."""
    return torch.cuda.is_available()


def soft_empty_cache_multigpu() -> None:
    """Clear the allocator caches of all devices."""
    gc.collect()
    for kind in {torch.device(name).type for name in get_device_list()} - {"cpu"}:
        torch.get_device_module(kind).empty_cache()


original_soft_empty_cache = mm.soft_empty_cache


def soft_empty_cache_distorch2_patched(force=False):
    """Clear all devices while a DisTorch2 model is loaded; with `force`, drop node outputs too."""
    patchers = [loaded.model for loaded in mm.current_loaded_models]
    if any(distorch_2.allocation_of(p) for p in patchers if p is not None):
        soft_empty_cache_multigpu()
    else:
        original_soft_empty_cache(force)
    if force:
        server.PromptServer.instance.prompt_queue.set_flag("free_memory", True)


mm.soft_empty_cache = soft_empty_cache_distorch2_patched
