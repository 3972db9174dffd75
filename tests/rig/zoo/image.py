"""Image models with one or two lists of transformer blocks."""

import torch

from .core import Recipe, Recipes, always, inputs, noise, uniform

_LDM = "comfy.ldm."
TEXT = 64


def _image(channels=16, **further):
    return inputs(
        x=noise(1, channels, 8, 8),
        timesteps=uniform(1),
        context=noise(1, 7, TEXT),
        **further,
    )


MMDIT = {
    "input_size": None,
    "in_channels": 16,
    "out_channels": 16,
    "depth": 4,  # the width is 64 times that
    "num_patches": 16,
    "pos_embed_max_size": 4,
    "adm_in_channels": 32,
    "context_size": TEXT,
    "qk_norm": "rms",
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": TEXT, "out_features": 256},
    },
}
_LUMINA = {
    "in_channels": 16,
    "dim": 96,
    "n_layers": 6,
    "n_refiner_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 32,
    "ffn_dim_multiplier": 4.0,
    "qk_norm": True,
    "cap_feat_dim": TEXT,
    "axes_dims": [8, 8, 8],
    "axes_lens": [300, 512, 512],
}
ZIMAGE = {
    **_LUMINA,
    "dim": 256,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 8,
    "axes_dims": [8, 12, 12],
    "ffn_dim_multiplier": 1.0,
    "rope_theta": 256.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
QWEN = {
    "in_channels": 64,
    "num_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": TEXT,
    "axes_dims_rope": (8, 12, 12),
}
_OMNIGEN = {
    "hidden_size": 96,
    "num_layers": 6,
    "num_refiner_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 32,
    "axes_dim_rope": (8, 8, 8),
    "axes_lens": (64, 64, 64),
}
_HIDREAM = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 4,
    "num_single_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "caption_channels": [TEXT, TEXT],
    "text_emb_dim": 32,
    "axes_dims_rope": [8, 12, 12],
    "max_resolution": [128, 128],
    "llama_layers": [0, 1, 2, 3, 4, 4, 4, 4, 4, 4],
}


def _references(generator):
    return [noise(1, 16, 6, 8)(generator)]


RECIPES: Recipes = {
    _LDM + "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": {
        "SD 3": Recipe(_image(y=noise(1, 32)), {**MMDIT, "qk_norm": None}),
        "SD 3.5 medium": Recipe(
            _image(y=noise(1, 32)),
            {**MMDIT, "x_block_self_attn": True, "x_block_self_attn_layers": [0, 1, 2]},
        ),
        "with a ControlNet": Recipe(
            _image(
                y=noise(1, 32),
                control=lambda g: {"output": [noise(1, 16, 256)(g) for _ in range(3)]},
            ),
            MMDIT,
        ),
    },
    _LDM + "aura.mmdit.MMDiT": {
        "image": Recipe(
            inputs(x=noise(1, 4, 8, 8), timestep=uniform(1), context=noise(1, 7, TEXT)),
            {
                "dim": 128,
                "n_layers": 8,
                "n_double_layers": 3,
                "n_heads": 4,
                "global_conddim": 128,
                "cond_seq_dim": TEXT,
                "max_seq": 64,
            },
        ),
    },
    _LDM + "lumina.model.NextDiT": {
        "Lumina 2": Recipe(_image(num_tokens=always(7)), _LUMINA),
        "Z-Image": Recipe(_image(num_tokens=always(7)), ZIMAGE),
        "Z-Image with references": Recipe(
            _image(
                num_tokens=always(7),
                ref_latents=_references,
                siglip_feats=lambda g: [noise(1, 4, 4, 24)(g)],
                ref_contexts=lambda g: [noise(1, 5, TEXT)(g)],
            ),
            {**ZIMAGE, "siglip_feat_dim": 24},
        ),
        "NewBie": Recipe(
            _image(num_tokens=always(7), clip_text_pooled=noise(1, 24)),
            {**_LUMINA, "clip_text_dim": 24},
        ),
    },
    _LDM + "qwen_image.model.QwenImageTransformer2DModel": {
        "image": Recipe(
            inputs(x=noise(1, 16, 1, 8, 8), timestep=uniform(1), context=noise(1, 7, TEXT)), QWEN
        ),
        "edit": Recipe(
            inputs(
                x=noise(1, 16, 1, 8, 8),
                timestep=uniform(1),
                context=noise(1, 7, TEXT),
                ref_latents=lambda g: [noise(1, 16, 1, 6, 8)(g)],
            ),
            QWEN,
        ),
    },
    _LDM + "mage_flow.model.MageFlowTransformer2DModel": {
        "image": Recipe(
            inputs(x=noise(1, 128, 4, 4), timestep=uniform(1), context=noise(1, 7, TEXT)),
            {**QWEN, "in_channels": 128, "out_channels": 128},
        ),
    },
    _LDM + "hidream.model.HiDreamImageTransformer2DModel": {
        "image": Recipe(
            inputs(
                x=noise(1, 16, 8, 8),
                t=uniform(1, scale=1000.0),
                y=noise(1, 32),
                context=noise(1, 7, TEXT),
                encoder_hidden_states_llama3=noise(1, 5, 6, TEXT),
            ),
            _HIDREAM,
        ),
    },
    _LDM + "hydit.models.HunYuanDiT": {
        "image": Recipe(
            lambda g: {
                "x": noise(1, 4, 8, 8)(g),
                "t": uniform(1, scale=1000.0)(g),
                "context": noise(1, 7, 32)(g),
                "text_embedding_mask": torch.ones(1, 7),
                "encoder_hidden_states_t5": noise(1, 9, 48)(g),
                "text_embedding_mask_t5": torch.ones(1, 9),
                "image_meta_size": noise(1, 6)(g),
                "transformer_options": {},
            },
            {
                "input_size": None,
                "hidden_size": 64,
                "depth": 8,
                "num_heads": 4,
                "text_states_dim": 32,
                "text_states_dim_t5": 48,
                "text_len": 7,
                "text_len_t5": 9,
            },
        ),
    },
    _LDM + "pixart.pixartms.PixArtMS": {
        "sigma": Recipe(
            inputs(x=noise(1, 4, 36, 36), timesteps=uniform(1), context=noise(1, 7, TEXT)),
            {
                "input_size": 8,
                "hidden_size": 128,
                "depth": 6,
                "num_heads": 4,
                "caption_channels": TEXT,
                "model_max_length": 7,
                "micro_condition": False,
                "pe_interpolation": 1,
            },
        ),
    },
    _LDM + "omnigen.omnigen2.OmniGen2Transformer2DModel": {
        "image": Recipe(
            _image(num_tokens=always(7)),
            {**_OMNIGEN, "text_feat_dim": TEXT},
            odd={"ref_image_refiner": "never"},
        ),
        "edit": Recipe(
            _image(num_tokens=always(7), ref_latents=_references),
            {**_OMNIGEN, "text_feat_dim": TEXT},
        ),
    },
    _LDM + "boogu.model.BooguTransformer2DModel": {
        "image": Recipe(
            _image(num_tokens=always(7)),
            {**_OMNIGEN, "num_double_stream_layers": 3, "instruction_feat_dim": TEXT},
            odd={"ref_image_refiner": "never"},
        ),
    },
    _LDM + "joyimage.model.JoyImageTransformer3DModel": {
        "image": Recipe(
            inputs(
                hidden_states=noise(1, 16, 1, 8, 8),
                timestep=uniform(1),
                context=noise(1, 7, TEXT),
            ),
            {
                "hidden_size": 128,
                "num_attention_heads": 4,
                "text_dim": TEXT,
                "num_layers": 6,
                "rope_dim_list": [8, 12, 12],
            },
        ),
    },
    _LDM + "ideogram4.model.Ideogram4Transformer2DModel": {
        "text": Recipe(
            _image(32),
            {
                "in_channels": 32,
                "num_layers": 6,
                "num_attention_heads": 4,
                "attention_head_dim": 32,
                "intermediate_size": 256,
                "adaln_dim": 32,
                "llm_features_dim": TEXT,
                "mrope_section": (6, 5, 5),
            },
        ),
    },
    _LDM + "krea2.model.SingleStreamDiT": {
        "image": Recipe(
            inputs(x=noise(1, 16, 8, 8), timesteps=uniform(1), context=noise(1, 7, 3 * 32)),
            {
                "features": 128,
                "heads": 4,
                "kvheads": 2,
                "layers": 6,
                "txtdim": 32,
                "txtlayers": 3,
                "txtheads": 2,
                "txtkvheads": 2,
            },
        ),
    },
    _LDM + "ernie.model.ErnieImageModel": {
        "image": Recipe(
            _image(32),
            {
                "hidden_size": 96,
                "num_attention_heads": 4,
                "num_layers": 6,
                "ffn_hidden_size": 256,
                "in_channels": 32,
                "out_channels": 32,
                "text_in_dim": TEXT,
                "rope_axes_dim": (8, 8, 8),
            },
        ),
    },
}
