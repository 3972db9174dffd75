"""Flux and what is derived from it: double blocks, then single blocks."""

from .core import Recipe, Recipes, inputs, noise, uniform

_LDM = "comfy.ldm."
TEXT = 64
FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": TEXT,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 4,
    "depth": 4,
    "depth_single_blocks": 6,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
FLUX2 = {
    **FLUX,
    "in_channels": 32,
    "out_channels": 32,
    "vec_in_dim": None,
    "patch_size": 1,
    "axes_dim": [8, 8, 8, 8],
    "theta": 2000,
    "mlp_ratio": 3.0,
    "qkv_bias": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
}
CHROMA = {
    **{key: value for key, value in FLUX.items() if key != "guidance_embed"},
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 128,
    "hidden_dim": 96,
    "n_layers": 3,
}
RADIANCE = {
    **CHROMA,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 4,
    "nerf_hidden_size": 16,
    "nerf_mlp_ratio": 2,
    "nerf_depth": 4,
    "nerf_max_freqs": 4,
    "nerf_tile_size": 8,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": None,
    "use_x0": False,
    "use_sequential_txt_ids": False,
}


def _image(channels=16, **further):
    return inputs(
        x=noise(1, channels, 8, 8),
        timestep=uniform(1),
        context=noise(1, 7, TEXT),
        **{"guidance": uniform(1, scale=4.0), **further},
    )


_pooled = {"y": noise(1, 32)}

RECIPES: Recipes = {
    _LDM + "flux.model.Flux": {
        "dev": Recipe(_image(**_pooled), FLUX),
        "schnell": Recipe(_image(guidance=None, **_pooled), {**FLUX, "guidance_embed": False}),
        "Kontext": Recipe(_image(ref_latents=lambda g: [noise(1, 16, 6, 8)(g)], **_pooled), FLUX),
        "Flux 2": Recipe(_image(32), FLUX2),
        "Ovis": Recipe(
            _image(guidance=None),
            {
                **FLUX,
                "vec_in_dim": None,
                "guidance_embed": False,
                "yak_mlp": True,
                "txt_norm": True,
                "txt_ids_dims": [1, 2],
            },
        ),
        "with a ControlNet": Recipe(
            _image(
                control=lambda g: {
                    "input": [noise(1, 16, 128)(g) for _ in range(4)],
                    "output": [noise(1, 16, 128)(g) for _ in range(2)],
                },
                **_pooled,
            ),
            FLUX,
        ),
    },
    _LDM + "chroma.model.Chroma": {
        "image": Recipe(_image(16), CHROMA),
    },
    _LDM + "chroma_radiance.model.ChromaRadiance": {
        "image": Recipe(_image(3), RADIANCE, newer=frozenset({"use_sequential_txt_ids"})),
    },
    _LDM + "lens.model.LensTransformer2DModel": {
        "image": Recipe(
            inputs(
                x=noise(1, 128, 4, 4),
                timestep=uniform(1),
                context=noise(1, 7, 4 * 32),
            ),
            {
                "in_channels": 128,
                "out_channels": 32,
                "num_layers": 6,
                "attention_head_dim": 32,
                "num_attention_heads": 2,
                "enc_hidden_dim": 32,
                "axes_dims_rope": (8, 12, 12),
            },
        ),
    },
    _LDM + "hunyuan3d.model.Hunyuan3Dv2": {
        "shape": Recipe(
            inputs(
                x=noise(1, 16, 12),
                timestep=uniform(1),
                context=noise(1, 7, TEXT),
                guidance=uniform(1, scale=5.0),
            ),
            {
                "in_channels": 16,
                "context_in_dim": TEXT,
                "hidden_size": 64,
                "num_heads": 2,
                "depth": 4,
                "depth_single_blocks": 6,
                "guidance_embed": True,
            },
        ),
    },
}
