"""Layers that keep their weights as they lie in the file and dequantise them at each use."""

import comfy.lora
import comfy.model_management
import comfy.ops
import torch

from .tensors import GGMLTensor, dequantize, is_quantized


def moved(patches, device):
    """`patches`, nested tuples and lists, with all their tensors on `device`."""
    if isinstance(patches, torch.Tensor):
        return patches.to(device, non_blocking=True)
    if isinstance(patches, list | tuple):
        return type(patches)(moved(item, device) for item in patches)
    return patches


class GGMLOps(comfy.ops.manual_cast):
    """ComfyUI's layers; the linear ones, where a Wan has its size, take quantised weights."""

    class Linear(comfy.ops.manual_cast.Linear):
        comfy_cast_weights = True

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)  # no memory for weights that the file brings along
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None
            self.largest_layer = False

        def _load_from_state_dict(self, state_dict, prefix, _metadata, _strict, missing, *_rest):
            for name in ("weight", "bias"):
                tensor = state_dict.get(prefix + name)
                if tensor is not None:
                    setattr(self, name, torch.nn.Parameter(tensor, requires_grad=False))
            if self.weight is None:
                missing.append(f"{prefix}weight")
            self.largest_layer = getattr(self.weight, "is_largest_weight", False)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            """For ComfyUI's estimates alone: sizes without values, and room to dequantise."""
            if not self._is_quantized():
                super()._save_to_state_dict(destination, prefix, keep_vars)
                return
            for name, tensor in (("weight", self.weight), ("bias", self.bias)):
                if tensor is not None:
                    destination[prefix + name] = torch.zeros_like(tensor, device="meta")
            if self.largest_layer:
                room = torch.empty(*self.weight.shape, dtype=torch.float16, device="meta")
                destination[f"{prefix}temp.weight"] = room

        def _is_quantized(self):
            return is_quantized(self.weight) or is_quantized(self.bias)

        def _value(self, tensor, like):
            """The weight that `tensor` stands for, patched, as `like` needs it to compute with."""
            tensor = tensor.to(like.device)
            weight = dequantize(tensor, like.dtype)
            for patches, key in getattr(tensor, "patches", []):
                weight = comfy.lora.calculate_weight(moved(patches, like.device), weight, key)
            return weight.to(like.dtype)

        def forward_comfy_cast_weights(self, input, *args, **kwargs):
            if self._is_quantized():
                bias = None if self.bias is None else self._value(self.bias, input)
                return torch.nn.functional.linear(input, self._value(self.weight, input), bias)
            output = super().forward_comfy_cast_weights(input, *args, **kwargs)
            return output.as_subclass(torch.Tensor) if isinstance(output, GGMLTensor) else output
