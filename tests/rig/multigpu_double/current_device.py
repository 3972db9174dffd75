"""Which devices ComfyUI is to use now: what a loader node sets while it loads."""

import comfy.model_management as mm
import torch

from . import device_utils

_current = {
    "device": mm.get_torch_device(),
    "text_encoder_device": mm.text_encoder_device(),
    "unet_offload_device": mm.unet_offload_device(),
}


def get_current_device():
    return _current["device"]


def set_current_device(device):
    _current["device"] = device


def get_current_text_encoder_device():
    return _current["text_encoder_device"]


def set_current_text_encoder_device(device):
    _current["text_encoder_device"] = device


def get_current_unet_offload_device():
    return _current["unet_offload_device"]


def set_current_unet_offload_device(device):
    _current["unet_offload_device"] = device


def _known_or_cpu(device) -> torch.device:
    usable = device_utils.is_accelerator_available() and mm.cpu_state != mm.CPUState.CPU
    if usable and str(device) in device_utils.get_device_list():
        return torch.device(device)
    return torch.device("cpu")


def get_torch_device_patched():
    return _known_or_cpu(get_current_device())


def text_encoder_device_patched():
    return _known_or_cpu(get_current_text_encoder_device())


def unet_offload_device_patched():
    return _known_or_cpu(get_current_unet_offload_device())


def patch_model_management() -> None:
    """Make ComfyUI ask this module for its devices."""
    mm.get_torch_device = get_torch_device_patched
    mm.text_encoder_device = text_encoder_device_patched
    mm.unet_offload_device = unet_offload_device_patched
