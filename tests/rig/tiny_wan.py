"""Small random Wan models, and LoRAs for them, as files that ComfyUI loads like any other.

ComfyUI recognises a model by the names and shapes of its weights, so a file with few and narrow
layers is a complete Wan to it. Names and shapes follow `comfy/ldm/wan/model.py`.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

TEXT_DIM = 4096
TIME_DIM = 256
VISION_DIM = 1280
LATENT_CHANNELS = 16
# An image-to-video Wan also sees the start image's latent and a mask of four channels.
I2V_CHANNELS = 2 * LATENT_CHANNELS + 4
PATCH = (1, 2, 2)

Shapes = dict[str, tuple[int, ...]]


def write_wan(
    path: Path,
    *,
    layers: int = 8,
    dim: int = 256,
    ffn: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    image_to_video: bool = False,
    prefix: str = "",
) -> Path:
    """Write a Wan 2.1 with random weights to `path` (.safetensors) and return `path`.

    Weights are scaled so that activations stay near 1 and every block shows in the output. With
    the defaults the file has 16 MB.

    Args:
        layers: number of transformer blocks.
        dim: width of the model; a multiple of 128, the width of one attention head.
        ffn: width inside the feed-forward layers.
        image_to_video: the i2v variant, with image cross-attention, instead of t2v.
        prefix: put before every name; "model.diffusion_model." makes it a checkpoint.
    """
    if dim % 128:
        raise ValueError(f"dim must be a multiple of 128, not {dim}")
    generator = torch.Generator().manual_seed(seed)
    weights = {
        prefix + name: _random_weight(name, shape, generator).to(dtype)
        for name, shape in _model_shapes(layers, dim, ffn, image_to_video).items()
    }
    save_file(weights, path)
    return path


def write_lora(
    path: Path,
    *,
    layers: int = 8,
    dim: int = 256,
    rank: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a LoRA for the self-attention of a `write_wan` model to `path` and return `path`.

    Args:
        layers: number of blocks it changes, from the first one on.
        dim: width of the model.
        rank: inner width of the two factors of each weight difference.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(layers):
        for target in "qkvo":
            name = f"diffusion_model.blocks.{layer}.self_attn.{target}"
            for factor, shape in (("lora_A", (rank, dim)), ("lora_B", (dim, rank))):
                weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
                weights[f"{name}.{factor}.weight"] = weight.to(dtype)
    save_file(weights, path)
    return path


def _model_shapes(layers: int, dim: int, ffn: int, image_to_video: bool) -> Shapes:
    channels = I2V_CHANNELS if image_to_video else LATENT_CHANNELS
    patch_values = PATCH[0] * PATCH[1] * PATCH[2]
    shapes: Shapes = {
        "patch_embedding.weight": (dim, channels, *PATCH),
        "patch_embedding.bias": (dim,),
        **_linear("text_embedding.0", TEXT_DIM, dim),
        **_linear("text_embedding.2", dim, dim),
        **_linear("time_embedding.0", TIME_DIM, dim),
        **_linear("time_embedding.2", dim, dim),
        **_linear("time_projection.1", dim, 6 * dim),
        **_linear("head.head", dim, patch_values * LATENT_CHANNELS),
        "head.modulation": (1, 2, dim),
    }
    if image_to_video:
        shapes |= _layer_norm("img_emb.proj.0", VISION_DIM)
        shapes |= _linear("img_emb.proj.1", VISION_DIM, VISION_DIM)
        shapes |= _linear("img_emb.proj.3", VISION_DIM, dim)
        shapes |= _layer_norm("img_emb.proj.4", dim)
    for layer in range(layers):
        block = f"blocks.{layer}"
        shapes |= _attention(f"{block}.self_attn", dim)
        shapes |= _attention(f"{block}.cross_attn", dim)
        if image_to_video:
            shapes |= _linear(f"{block}.cross_attn.k_img", dim, dim)
            shapes |= _linear(f"{block}.cross_attn.v_img", dim, dim)
            shapes[f"{block}.cross_attn.norm_k_img.weight"] = (dim,)
        shapes |= _layer_norm(f"{block}.norm3", dim)
        shapes |= _linear(f"{block}.ffn.0", dim, ffn)
        shapes |= _linear(f"{block}.ffn.2", ffn, dim)
        shapes[f"{block}.modulation"] = (1, 6, dim)
    return shapes


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _layer_norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _attention(name: str, dim: int) -> Shapes:
    shapes: Shapes = {}
    for projection in "qkvo":
        shapes |= _linear(f"{name}.{projection}", dim, dim)
    shapes[f"{name}.norm_q.weight"] = shapes[f"{name}.norm_k.weight"] = (dim,)
    return shapes


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith(".modulation"):
        return noise * 0.3
    if name.endswith(".bias"):
        return noise * 0.02
    if len(shape) == 1:  # the gain of a norm
        return 1 + noise * 0.02
    fan_in = noise[0].numel()
    return noise * fan_in**-0.5
