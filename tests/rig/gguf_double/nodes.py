"""The loader node and the patcher of what it loads."""

import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths

from .ops import GGMLOps, moved
from .tensors import is_quantized, read

FOLDERS = folder_paths.folder_names_and_paths
FOLDERS["unet_gguf"] = (FOLDERS["diffusion_models"][0], {".gguf"})


class GGUFModelPatcher(comfy.model_patcher.ModelPatcher):
    """Hangs patches on quantised weights, instead of replacing them by patched ones."""

    patch_on_device = False
    mmap_released = False

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False):
        if key not in self.patches:
            return
        weight = comfy.utils.get_attr(self.model, key)
        if not is_quantized(weight):
            super().patch_weight_to_device(key, device_to, inplace_update)
            return
        weight = weight.to(device_to)
        device = self.load_device if self.patch_on_device else self.offload_device
        weight.patches = [(moved(self.patches[key], device), key)]
        comfy.utils.set_attr_param(self.model, key, weight)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            for weight in self.model.parameters():
                if is_quantized(weight):
                    weight.patches = []
        return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

    def load(self, *args, force_patch_weights=False, **kwargs):
        """ComfyUI's load, with no patch left to the layers, and of no memory of the file's."""
        super().load(*args, force_patch_weights=True, **kwargs)
        if not self.mmap_released and self.load_device != self.offload_device:
            for module in self.model.modules():
                weights = (getattr(module, name, None) for name in ("weight", "bias"))
                if any(w is not None and w.device == self.offload_device for w in weights):
                    module.to(self.load_device).to(self.offload_device)
        self.mmap_released = True

    def clone(self, *args, **kwargs):
        """A clone of this class, also where `self` is a patcher of ComfyUI's own."""
        own = type(self)
        self.__class__ = GGUFModelPatcher
        try:
            clone = super().clone(*args, **kwargs)
        finally:
            self.__class__ = own
        clone.__class__ = GGUFModelPatcher
        clone.patch_on_device = getattr(self, "patch_on_device", False)
        clone.mmap_released = getattr(self, "mmap_released", False)
        if own is not GGUFModelPatcher:
            clone.size = 0  # to be computed again
        return clone


class UnetLoaderGGUF:
    CATEGORY = "bootleg"
    FUNCTION = "load_unet"
    RETURN_TYPES = ("MODEL",)
    TITLE = "Unet Loader (GGUF)"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"unet_name": (folder_paths.get_filename_list("unet_gguf"),)}}

    def load_unet(self, unet_name, dequant_dtype=None, patch_dtype=None, patch_on_device=None):
        """The last three are inputs of the advanced node; the two types are not followed here."""
        weights = read(folder_paths.get_full_path("unet", unet_name))
        options = {"custom_operations": GGMLOps()}
        patcher = comfy.sd.load_diffusion_model_state_dict(weights, model_options=options)
        if patcher is None:
            raise RuntimeError(f"GGUF: {unet_name} is of no known model")
        patcher = GGUFModelPatcher.clone(patcher)
        patcher.patch_on_device = patch_on_device
        return (patcher,)
