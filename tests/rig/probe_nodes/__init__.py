"""Test nodes: conditioning without a text encoder, and a place where a test finds its latents."""

import torch

TEXT_DIM = 4096

# key -> the latent that ProbeLatent last saw under it, on the CPU.
LATENTS: dict[str, torch.Tensor] = {}


class ProbeConditioning:
    """Seeded noise in the shape of a text encoder's output for Wan, [1, length, 4096]."""

    CATEGORY = "tests"
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0}),
                "length": ("INT", {"default": 16, "min": 1}),
            }
        }

    def encode(self, seed, length):
        generator = torch.Generator().manual_seed(seed)
        return ([[torch.randn((1, length, TEXT_DIM), generator=generator), {}]],)


class ProbeLatent:
    """Passes a latent on and keeps a copy of it in `LATENTS[key]`."""

    CATEGORY = "tests"
    FUNCTION = "keep"
    RETURN_TYPES = ("LATENT",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "latent": ("LATENT",),
                "key": ("STRING", {"default": "latent"}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **_inputs):
        return float("nan")  # run in every prompt, also where the sampler's result is cached

    def keep(self, latent, key):
        LATENTS[key] = latent["samples"].detach().to("cpu", copy=True)
        return (latent,)


NODE_CLASS_MAPPINGS = {
    "ProbeConditioning": ProbeConditioning,
    "ProbeLatent": ProbeLatent,
}
