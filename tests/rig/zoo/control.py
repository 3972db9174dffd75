"""ControlNets: what a ControlNet loader puts beside a diffusion model."""

import torch

from . import core, image
from .core import Recipe, Recipes, inputs, noise, uniform
from .flux import FLUX
from .image import MMDIT, QWEN
from .unet import SDXL

_LDM = "comfy.ldm."
_CLDM = "comfy.cldm."
TEXT = 64


def _control(hint, channels=16, **further):
    return inputs(
        x=noise(1, channels, 8, 8),
        timesteps=uniform(1),
        context=noise(1, 7, TEXT),
        hint=noise(*hint),
        **{"transformer_options": None, **further},
    )


_FLUX = {"y": noise(1, 32), "guidance": uniform(1, scale=4.0)}


def _beside_qwen(model, arguments):
    """A Fun ControlNet asks the diffusion model that it controls for its embeddings."""
    name = _LDM + "qwen_image.model.QwenImageTransformer2DModel"
    base = core.build(core.find(name), image.RECIPES[name]["image"]).model
    return model(**arguments, base_model=base.to(arguments["x"].device))


def _beside_zimage(model, arguments):
    """What `ZImageControlPatch` of ComfyUI does: refiner blocks, then one block at a time."""
    feats, embedding, freqs = (arguments[key] for key in ("feats", "embedding", "freqs"))
    context = model(feats, arguments["hint"], freqs, embedding)
    x, found = arguments["x"], []
    for layer in range(2):
        out, context = model.forward_noise_refiner_block(layer, context, x, None, freqs, embedding)
        if out is not None:
            found.append(out)
    for layer in range(model.n_control_layers):
        out, context = model.forward_control_block(layer, context, x, None, freqs, embedding)
        found.append(out)
    return found


def _rotations(generator):
    angles = torch.rand((1, 16, 1, 16), generator=generator)
    rows = [
        torch.stack(pair, -1)
        for pair in ((angles.cos(), -angles.sin()), (angles.sin(), angles.cos()))
    ]
    return torch.stack(rows, -2)


_ZIMAGE = inputs(
    feats=noise(1, 7, 256),
    hint=noise(1, 16, 8, 8),
    freqs=_rotations,
    embedding=noise(1, 256),
    x=noise(1, 16, 256),
)
_ZIMAGE_ARGUMENTS = {
    "dim": 256,
    "n_heads": 8,
    "n_kv_heads": 8,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.0,
    "n_control_layers": 4,
}
_HYDIT = {
    "input_size": None,
    "hidden_size": 64,
    "depth": 8,
    "num_heads": 4,
    "text_states_dim": 32,
    "text_states_dim_t5": 48,
    "text_len": 7,
    "text_len_t5": 9,
}

RECIPES: Recipes = {
    _LDM + "flux.controlnet.ControlNetFlux": {
        "of a picture": Recipe(_control((1, 3, 64, 64), **_FLUX), {**FLUX}),
        "of a latent": Recipe(_control((1, 16, 8, 8), **_FLUX), {**FLUX, "latent_input": True}),
        "union": Recipe(
            _control((1, 16, 8, 8), control_type=lambda _: [1], **_FLUX),
            {**FLUX, "latent_input": True, "num_union_modes": 3},
        ),
        "MistoLine": Recipe(_control((1, 3, 64, 64), **_FLUX), {**FLUX, "mistoline": True}),
    },
    _CLDM + "mmdit.ControlNet": {
        "SD 3": Recipe(_control((1, 16, 8, 8), y=noise(1, 32)), {**MMDIT, "num_blocks": 4}),
    },
    _CLDM + "dit_embedder.ControlNetEmbedder": {
        "SD 3.5": Recipe(
            _control((1, 16, 8, 8), y=noise(1, 32)),
            {
                "img_size": None,
                "patch_size": 2,
                "in_chans": 16,
                "attention_head_dim": 32,
                "num_attention_heads": 4,
                "adm_in_channels": 32,
                "num_layers": 5,
                "main_model_double": 10,
                "double_y_emb": False,
            },
        ),
    },
    _LDM + "hydit.controlnet.HunYuanControlNet": {
        "image": Recipe(
            inputs(
                x=noise(1, 4, 8, 8),
                hint=noise(1, 4, 8, 8),
                timesteps=uniform(1, scale=1000.0),
                context=noise(1, 7, 32),
                text_embedding_mask=lambda _: torch.ones(1, 7),
                encoder_hidden_states_t5=noise(1, 9, 48),
                text_embedding_mask_t5=lambda _: torch.ones(1, 9),
                transformer_options=None,
            ),
            _HYDIT,
        ),
    },
    _LDM + "qwen_image.controlnet.QwenImageControlNetModel": {
        "image": Recipe(
            inputs(
                x=noise(1, 16, 1, 8, 8),
                timesteps=uniform(1),
                context=noise(1, 7, TEXT),
                hint=noise(1, 16, 1, 8, 8),
            ),
            QWEN,
        ),
    },
    _LDM + "qwen_image.controlnet.QwenImageFunControlNetModel": {
        "image": Recipe(
            inputs(
                x=noise(1, 16, 1, 8, 8),
                timesteps=uniform(1),
                context=noise(1, 7, TEXT),
                hint=noise(1, 16, 1, 8, 8),
            ),
            {
                "inner_dim": 128,
                "num_attention_heads": 4,
                "attention_head_dim": 32,
                "num_control_blocks": 5,
            },
            call=_beside_qwen,
            odd={"control_blocks": "once in order, from inside: before_proj after_proj"},
        ),
    },
    _LDM + "lumina.controlnet.ZImage_Control": {
        "image": Recipe(_ZIMAGE, _ZIMAGE_ARGUMENTS, call=_beside_zimage),
        "refiner": Recipe(
            _ZIMAGE, {**_ZIMAGE_ARGUMENTS, "refiner_control": True}, call=_beside_zimage
        ),
    },
    _CLDM + "cldm.ControlNet": {
        "SDXL": Recipe(
            inputs(
                x=noise(1, 4, 16, 16),
                timesteps=uniform(1, scale=999.0),
                context=noise(1, 7, TEXT),
                y=noise(1, 48),
                hint=noise(1, 3, 128, 128),
                transformer_options=None,
            ),
            {
                **{k: v for k, v in SDXL.items() if k != "transformer_depth_output"},
                "hint_channels": 3,
            },
        ),
    },
}
