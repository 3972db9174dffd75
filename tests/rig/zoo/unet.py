"""Models whose blocks are not transformer blocks alone: U-Nets and Stable Cascade."""

import torch

from .core import Recipe, Recipes, inputs, noise, uniform

_LDM = "comfy.ldm."
TEXT = 64

_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 3],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": 2,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": TEXT,
    "use_temporal_attention": False,
    "legacy": False,
}
SDXL = {**_UNET, "adm_in_channels": 48, "num_classes": "sequential"}
# The members are `Sequential`s that `forward_timestep_embed` goes through: none is called.
_OPENED = {"input_blocks": "from inside: 0 1", "output_blocks": "from inside: 0 1 2"}
# The members are lists.
_LISTS = dict.fromkeys(("down_blocks", "up_blocks"), "from inside: 0 1 2 3 4 5 6 7 8 9 10 11")


def _unet(**further):
    return inputs(
        x=noise(1, 4, 16, 16),
        timesteps=uniform(1, scale=999.0),
        context=noise(1, 7, TEXT),
        **further,
    )


_STAGE = {"c_cond": 64, "c_hidden": [64, 64], "nhead": [4, 4], "blocks": [[2, 4], [4, 2]]}

RECIPES: Recipes = {
    _LDM + "modules.diffusionmodules.openaimodel.UNetModel": {
        "SDXL": Recipe(_unet(y=noise(1, 48)), SDXL, odd=_OPENED),
        "SD 1.5": Recipe(_unet(), {**_UNET, "use_linear_in_transformer": False}, odd=_OPENED),
        "SVD": Recipe(
            inputs(
                x=noise(2, 8, 16, 16),
                timesteps=uniform(2, scale=9.0),
                context=noise(2, 1, TEXT),
                y=noise(2, 48),
                num_video_frames=lambda _: 2,
                image_only_indicator=lambda _: torch.zeros(1, 2),
            ),
            {
                **SDXL,
                "transformer_depth": [0, 0, 1, 1, 1, 1],
                "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
                "transformer_depth_middle": 1,
                "in_channels": 8,
                "use_temporal_attention": True,
                "use_temporal_resblock": True,
                "extra_ff_mix_layer": True,
                "use_spatial_context": True,
                "merge_strategy": "learned_with_images",
                "merge_factor": 0.0,
                "video_kernel_size": [3, 1, 1],
            },
            odd=_OPENED,
        ),
    },
    _LDM + "cascade.stage_c.StageC": {
        "image": Recipe(
            inputs(
                x=noise(1, 16, 8, 8),
                r=uniform(1),
                clip_text=noise(1, 7, 32),
                clip_text_pooled=noise(1, 1, 32),
                clip_img=noise(1, 1, 24),
            ),
            {**_STAGE, "c_clip_text": 32, "c_clip_text_pooled": 32, "c_clip_img": 24},
            odd=_LISTS,
        ),
    },
    _LDM + "cascade.stage_b.StageB": {
        "image": Recipe(
            inputs(
                x=noise(1, 4, 16, 16), r=uniform(1), effnet=noise(1, 16, 2, 2), clip=noise(1, 1, 32)
            ),
            {
                "c_cond": 64,
                "c_hidden": [32, 64],
                "nhead": [-1, 4],
                "blocks": [[2, 4], [4, 2]],
                "block_repeat": [[1, 1], [2, 2]],
                "level_config": ["CT", "CTA"],
                "c_clip": 32,
                "dropout": [0, 0],
            },
            odd=_LISTS,
            rounds=True,
        ),
    },
}
