"""The DisTorch2 loader nodes: ComfyUI's loaders plus a device, a donor and an allocation."""

import copy

import comfy.model_management as mm
import comfy.sd
import folder_paths
import nodes
import server
import torch

from .current_device import (
    get_current_device,
    get_current_text_encoder_device,
    set_current_device,
    set_current_text_encoder_device,
)
from .device_utils import get_device_list
from .distorch_2 import (
    VERSION,
    register_patched_safetensor_modelpatcher,
    store_allocation,
)

VIRTUAL_VRAM = {"min": 0.0, "max": 128.0, "step": 0.1}


def full_allocation(expert: str, compute: str, virtual_vram_gb: float, donor: str) -> str:
    """Build the string that is stored on a model: "<expert>#<compute>;<gigabytes>;<donor>"."""
    if virtual_vram_gb > 0:
        return f"{expert}#{compute};{virtual_vram_gb};{donor}"
    return f"{expert}#{compute}" if expert else ""


def mark_loaded_models_for_eject() -> None:
    """Flag every model that is loaded now, so that it gives way to the one about to load."""
    for loaded in mm.current_loaded_models:
        if loaded.model is not None:
            inner = getattr(loaded.model, "model", loaded.model)
            inner._mgpu_unload_distorch_model = True


def _default_device() -> str:
    return get_device_list()[:2][-1]


def distorch2_loader(loader, *, text_encoder=False, resets_device=False):
    """Return the DisTorch2 variant of the loader node `loader`.

    Args:
        text_encoder: it loads on the text encoder device, its input is named "device", and it
            leaves other models alone by default.
        resets_device: `loader` has a "device" input of its own, which is to be "default".
    """
    device_input = "device" if text_encoder else "compute_device"
    get_device = get_current_text_encoder_device if text_encoder else get_current_device
    set_device = set_current_text_encoder_device if text_encoder else set_current_device
    eject_default = not text_encoder

    class DisTorch2Loader(loader):
        CATEGORY = "multigpu/distorch_2"
        FUNCTION = "override"
        TITLE = f"{getattr(loader, 'TITLE', loader.__name__)} (DisTorch2)"

        @classmethod
        def INPUT_TYPES(cls):
            inputs = copy.deepcopy(loader.INPUT_TYPES())
            devices = get_device_list()
            optional = inputs.setdefault("optional", {})
            optional[device_input] = (devices, {"default": _default_device()})
            optional["virtual_vram_gb"] = ("FLOAT", {"default": 4.0, **VIRTUAL_VRAM})
            optional["donor_device"] = (devices, {"default": "cpu"})
            optional["expert_mode_allocations"] = ("STRING", {"multiline": False, "default": ""})
            switch, default = _switch(eject_default)
            optional[switch] = ("BOOLEAN", {"default": default})
            return inputs

        @classmethod
        def IS_CHANGED(
            cls,
            *args,
            virtual_vram_gb=4.0,
            donor_device="cpu",
            expert_mode_allocations="",
            eject_models=eject_default,
            **kwargs,
        ):
            device = kwargs.get(device_input)
            settings = (device, virtual_vram_gb, donor_device)
            return repr((*settings, expert_mode_allocations, eject_models))

        def _load(self, allocation, eject_models, *args, **kwargs):
            virtual_vram_gb, donor_device, expert_mode_allocations = allocation
            device = kwargs.pop(device_input, None)
            previous = get_device()
            if eject_models:
                mark_loaded_models_for_eject()
            if device is not None:
                set_device(device)
            if resets_device:
                kwargs["device"] = "default"
            register_patched_safetensor_modelpatcher()
            outputs = getattr(super(), loader.FUNCTION)(*args, **kwargs)
            allocation = full_allocation(
                expert_mode_allocations, device, virtual_vram_gb, donor_device
            )
            _attach(outputs[0], allocation)
            # Like MultiGPU, not done when loading fails: the device then stays switched.
            set_device(previous)
            return outputs

        if VERSION <= (2, 5, 0):

            def override(
                self,
                *args,
                virtual_vram_gb=4.0,
                donor_device="cpu",
                expert_mode_allocations="",
                keep_loaded=True,
                **kwargs,
            ):
                allocation = (virtual_vram_gb, donor_device, expert_mode_allocations)
                outputs = self._load(allocation, False, *args, **kwargs)
                patcher = _patcher_of(outputs[0])
                if patcher is not None:
                    patcher.model._mgpu_unload_distorch_model = not keep_loaded
                if not keep_loaded:  # then everything goes when the prompt has ended
                    for flag in ("unload_models", "free_memory"):
                        server.PromptServer.instance.prompt_queue.set_flag(flag, True)
                return outputs

        else:

            def override(
                self,
                *args,
                virtual_vram_gb=4.0,
                donor_device="cpu",
                expert_mode_allocations="",
                eject_models=eject_default,
                **kwargs,
            ):
                allocation = (virtual_vram_gb, donor_device, expert_mode_allocations)
                return self._load(allocation, eject_models, *args, **kwargs)

    return DisTorch2Loader


def _switch(eject_default: bool) -> tuple[str, bool]:
    """The last input of the loaders, and its default."""
    return ("keep_loaded", True) if VERSION <= (2, 5, 0) else ("eject_models", eject_default)


def _patcher_of(output):
    patcher = output if hasattr(output, "model") else getattr(output, "patcher", None)
    return patcher if hasattr(patcher, "model") else None


def _attach(output, allocation: str) -> None:
    """Store `allocation` for a loader's output, if that has a model."""
    patcher = _patcher_of(output)
    if patcher is not None:
        store_allocation(patcher, allocation)


class UnetLoaderGGUF:
    """Stands for ComfyUI-GGUF's loader, which may be loaded after this package."""

    CATEGORY = "bootleg"
    FUNCTION = "load_unet"
    RETURN_TYPES = ("MODEL",)
    TITLE = "Unet Loader (GGUF)"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"unet_name": (folder_paths.get_filename_list("unet_gguf"),)}}

    def load_unet(self, unet_name, dequant_dtype=None, patch_dtype=None, patch_on_device=None):
        loader = nodes.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]()
        return loader.load_unet(unet_name, dequant_dtype, patch_dtype, patch_on_device)


class CheckpointLoaderAdvancedDisTorch2MultiGPU:
    """A checkpoint whose parts go to devices of their own, model and CLIP with allocations."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load_checkpoint"
    CATEGORY = "multigpu/distorch_2"
    TITLE = "Checkpoint Loader Advanced (DisTorch2)"

    @classmethod
    def INPUT_TYPES(cls):
        devices = get_device_list()
        compute = (devices, {"default": _default_device()})
        cpu = (devices, {"default": "cpu"})
        allocation = ("STRING", {"multiline": False, "default": ""})
        return {
            "required": {
                "ckpt_name": (folder_paths.get_filename_list("checkpoints"),),
                "unet_compute_device": compute,
                "unet_virtual_vram_gb": ("FLOAT", {"default": 4.0, **VIRTUAL_VRAM}),
                "unet_donor_device": cpu,
                "clip_compute_device": cpu,
                "clip_virtual_vram_gb": ("FLOAT", {"default": 2.0, **VIRTUAL_VRAM}),
                "clip_donor_device": cpu,
                "vae_device": compute,
            },
            "optional": {
                "unet_expert_mode_allocations": allocation,
                "clip_expert_mode_allocations": allocation,
                "high_precision_loras": ("BOOLEAN", {"default": True}),
                **({"eject_models": ("BOOLEAN", {"default": True})} if VERSION > (2, 5, 0) else {}),
            },
        }

    def load_checkpoint(
        self,
        ckpt_name,
        unet_compute_device,
        unet_virtual_vram_gb,
        unet_donor_device,
        clip_compute_device,
        clip_virtual_vram_gb,
        clip_donor_device,
        vae_device,
        unet_expert_mode_allocations="",
        clip_expert_mode_allocations="",
        high_precision_loras=True,
        eject_models=VERSION > (2, 5, 0),
    ):
        if eject_models:
            mark_loaded_models_for_eject()
        _patch_checkpoint_loading()
        _pending_checkpoint.update(
            unet_device=unet_compute_device,
            clip_device=clip_compute_device,
            vae_device=vae_device,
            unet_allocation=full_allocation(
                unet_expert_mode_allocations,
                unet_compute_device,
                unet_virtual_vram_gb,
                unet_donor_device,
            ),
            clip_allocation=full_allocation(
                clip_expert_mode_allocations,
                clip_compute_device,
                clip_virtual_vram_gb,
                clip_donor_device,
            ),
            high_precision_loras=high_precision_loras,
        )
        return nodes.CheckpointLoaderSimple().load_checkpoint(ckpt_name)


# What the checkpoint node asked for, until ComfyUI's loader comes to the state dict.
_pending_checkpoint: dict = {}


def _patch_checkpoint_loading() -> None:
    """Replace `comfy.sd.load_state_dict_guess_config` the first time that it is called."""
    original = comfy.sd.load_state_dict_guess_config
    if getattr(original, "_places_pending_checkpoint", False):
        return

    def patched_load_state_dict_guess_config(sd, *args, **kwargs):
        if not _pending_checkpoint:
            return original(sd, *args, **kwargs)
        request = dict(_pending_checkpoint)
        _pending_checkpoint.clear()
        device, clip_device = get_current_device(), get_current_text_encoder_device()
        set_current_device(request["unet_device"])
        set_current_text_encoder_device(request["clip_device"])
        try:
            parts = original(sd, *args, **kwargs)
        finally:
            set_current_device(device)
            set_current_text_encoder_device(clip_device)
        _place_parts(parts, request)
        return parts

    patched_load_state_dict_guess_config._places_pending_checkpoint = True
    comfy.sd.load_state_dict_guess_config = patched_load_state_dict_guess_config


def _place_parts(parts, request: dict) -> None:
    model, clip, vae, _clip_vision = parts
    for part, patcher in (("unet", model), ("clip", getattr(clip, "patcher", None))):
        allocation = request[f"{part}_allocation"]
        if patcher is not None and allocation:
            register_patched_safetensor_modelpatcher()
            _attach(patcher, allocation)
            patcher.model._distorch_high_precision_loras = request["high_precision_loras"]
    if hasattr(vae, "patcher"):
        vae.device = vae.patcher.load_device = torch.device(request["vae_device"])
