"""A double of ComfyUI-MultiGPU: its DisTorch2 loader nodes and what they do to ComfyUI.

It honours the contract that the plugin relies on (node ids, inputs, the allocation string and the
flags on the inner model, the functions it replaces in ComfyUI and when) with code of its own, so
that the tests need no checkout. Where it differs from MultiGPU, it is wrong.
"""

from pathlib import Path

import folder_paths
from nodes import NODE_CLASS_MAPPINGS as HOST_NODES

from .current_device import (
    get_current_device,
    get_current_text_encoder_device,
    get_current_unet_offload_device,
    patch_model_management,
    set_current_device,
    set_current_text_encoder_device,
    set_current_unet_offload_device,
)
from .device_utils import get_device_list, soft_empty_cache_multigpu
from .distorch_2 import register_patched_safetensor_modelpatcher
from .loaders import (
    CheckpointLoaderAdvancedDisTorch2MultiGPU,
    UnetLoaderGGUF,
    distorch2_loader,
)

__all__ = [
    "NODE_CLASS_MAPPINGS",
    "get_current_device",
    "get_current_text_encoder_device",
    "get_current_unet_offload_device",
    "get_device_list",
    "register_patched_safetensor_modelpatcher",
    "set_current_device",
    "set_current_text_encoder_device",
    "set_current_unet_offload_device",
    "soft_empty_cache_multigpu",
]

patch_model_management()

NODE_CLASS_MAPPINGS = {
    "CheckpointLoaderAdvancedDisTorch2MultiGPU": CheckpointLoaderAdvancedDisTorch2MultiGPU,
}
for _name in (
    "UNETLoader",
    "VAELoader",
    "CheckpointLoaderSimple",
    "ControlNetLoader",
    "DiffControlNetLoader",
):
    NODE_CLASS_MAPPINGS[f"{_name}DisTorch2MultiGPU"] = distorch2_loader(HOST_NODES[_name])
for _name in ("CLIPLoader", "DualCLIPLoader", "CLIPVisionLoader"):
    NODE_CLASS_MAPPINGS[f"{_name}DisTorch2MultiGPU"] = distorch2_loader(
        HOST_NODES[_name], text_encoder=True, resets_device=_name != "CLIPVisionLoader"
    )

# Like MultiGPU, by the folder that is there, whether or not ComfyUI has come to it yet.
if any((Path(f) / "ComfyUI-GGUF").is_dir() for f in folder_paths.get_folder_paths("custom_nodes")):
    NODE_CLASS_MAPPINGS["UnetLoaderGGUFDisTorch2MultiGPU"] = distorch2_loader(UnetLoaderGGUF)
