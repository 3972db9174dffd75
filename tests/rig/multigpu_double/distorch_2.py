"""Loading of models that carry an allocation: layer by layer, each layer to one device."""

import functools
import os
import re

import comfy.model_management as mm
import comfy.model_patcher
import torch

# The version whose contract is honoured. It has changed twice: up to 2.5.5 allocations are kept in
# a table and not on the model, and up to 2.5.0 loaders have `keep_loaded` instead of `eject_models`
# and ComfyUI's `load_models_gpu` is left alone.
VERSION = tuple(map(int, os.environ.get("MULTIGPU_DOUBLE_VERSION", "2.6.3").split(".")))

if VERSION <= (2, 5, 5):
    safetensor_allocation_store = {}

    def create_safetensor_model_hash(model, caller):
        """The key of a patcher's allocation, which like models share."""
        size = sum(tensor.nbytes for tensor in model.model.state_dict().values())
        return f"{type(model.model).__name__}_{size}_{list(model.model.state_dict())[:3]}"


def store_allocation(patcher, allocation: str) -> None:
    """Keep `allocation` where this version does; from 2.5.6 on, an empty one leaves no trace."""
    if VERSION <= (2, 5, 5):
        key = create_safetensor_model_hash(patcher, "store")
        safetensor_allocation_store[key] = allocation
    elif allocation:
        patcher.model._distorch_v2_meta = {"full_allocation": allocation}


def allocation_of(patcher) -> str:
    """The allocation of a patcher's model, `""` if it has none."""
    if VERSION <= (2, 5, 5):
        return safetensor_allocation_store.get(create_safetensor_model_hash(patcher, "read"), "")
    return getattr(patcher.model, "_distorch_v2_meta", {}).get("full_allocation", "")


UNITS = {"b": 1, "k": 1024, "m": 1024**2, "g": 1024**3}


def register_patched_safetensor_modelpatcher() -> None:
    """Replace ComfyUI's loading the first time that it is called."""
    patcher_class = comfy.model_patcher.ModelPatcher
    if hasattr(patcher_class, "_distorch_patched"):
        return
    if VERSION > (2, 5, 0):
        mm.load_models_gpu = _load_models_gpu_after(mm.load_models_gpu)
    patcher_class.partially_load = _partially_load_instead_of(patcher_class.partially_load)
    patcher_class._distorch_patched = True


def _load_models_gpu_after(original):
    @functools.wraps(original)
    def patched_load_models_gpu(
        models,
        memory_required=0,
        force_patch_weights=False,
        minimum_memory_required=None,
        force_full_load=False,
    ):
        for patcher in models:
            if _has_donor(patcher):
                device = patcher.load_device
                loaded = mm.current_loaded_models
                wanted = [m for m in loaded if m.model and m.model.is_clone(patcher)]
                mm.free_memory(mm.get_total_memory(device), device, wanted)
        return original(
            models,
            memory_required=memory_required,
            force_patch_weights=force_patch_weights,
            minimum_memory_required=minimum_memory_required,
            force_full_load=force_full_load,
        )

    return patched_load_models_gpu


def _has_donor(patcher) -> bool:
    """Say whether a model gives virtual VRAM to a donor: everything else then makes room."""
    compute = allocation_of(patcher).partition("#")[2]
    return patcher.load_device.type != "cpu" and ";" in compute


def _partially_load_instead_of(original):
    @functools.wraps(original)
    def partially_load(
        self, device_to, extra_memory=0, full_load=False, force_patch_weights=False, **kwargs
    ):
        if not allocation_of(self):
            return original(self, device_to, extra_memory, force_patch_weights)
        loaded_patches = getattr(self.model, "current_weight_patches_uuid", None)
        stale = loaded_patches is not None and loaded_patches != self.patches_uuid
        if stale or (force_patch_weights and loaded_patches is not None):
            self.unpatch_model(self.offload_device, unpatch_weights=True)
        self.patch_model(load_weights=False)
        _place_layers(self, device_to)
        self.model.current_weight_patches_uuid = self.patches_uuid
        self.model.device = device_to
        return 0

    return partially_load


def _place_layers(patcher, compute: torch.device) -> None:
    """Patch every layer on `compute`, then send it to the device that its allocation names."""
    # Versions differ in what they put before these four.
    layers = [item[-4:] for item in patcher._load_list()]
    total = sum(size for size, *_ in layers)
    quotas = _donor_quotas(allocation_of(patcher), compute, total)
    for size, name, module, _params in reversed(layers):
        target = next((d for d, left in quotas.items() if left >= size), compute)
        if target in quotas:
            quotas[target] -= size
        if not getattr(module, "comfy_patched_weights", False):
            module.to(compute)
            for key in (f"{name}.weight", f"{name}.bias"):
                if key in patcher.patches:
                    patcher.patch_weight_to_device(key, device_to=compute)
        module.to(target)
        if target != compute:
            module.comfy_cast_weights = True
        module.comfy_patched_weights = True


def _donor_quotas(allocation: str, compute: torch.device, total: int) -> dict[torch.device, float]:
    """Return the bytes that each donor of a model of `total` bytes is to hold."""
    expert, _, virtual = allocation.partition("#")
    if not expert:
        _, gigabytes, donors = virtual.split(";")
        return {torch.device(donors.split(",")[0]): float(gigabytes) * UNITS["g"]}
    entries = [entry.split(",") for entry in expert.split(";")]
    shares = {torch.device(name): _share(name, value, total) for name, value in entries}
    rest = total - sum(share for share in shares.values() if share is not None)
    shares = {device: rest if share is None else share for device, share in shares.items()}
    return {device: share for device, share in shares.items() if device != compute}


def _share(device: str, value: str, total: int) -> float | None:
    """Return the bytes that one entry of an expert allocation means, None for "the rest"."""
    value = value.strip().lower()
    if "*" in value:
        return None
    if value.endswith("%"):
        return float(value[:-1]) / 100 * total
    if size := re.fullmatch(r"([\d.]+)\s*([bkmg])i?b?", value):
        return float(size[1]) * UNITS[size[2]]
    return float(value) * mm.get_total_memory(torch.device(device))
