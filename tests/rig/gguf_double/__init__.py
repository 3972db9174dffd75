"""A double of ComfyUI-GGUF: its loader of diffusion models, and what its weights are like.

It honours the contract that the plugin and MultiGPU rely on (the node, the tensor class with its
quirks, layers that dequantise when they are used, a patcher that hangs patches on quantised
weights) with code of its own, for Q8_0 and Q4_0. Where it differs from ComfyUI-GGUF, it is wrong.
"""

from .nodes import UnetLoaderGGUF

__all__ = ["NODE_CLASS_MAPPINGS"]

NODE_CLASS_MAPPINGS = {"UnetLoaderGGUF": UnetLoaderGGUF}
