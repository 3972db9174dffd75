"""Video models, and those of images that are made like them."""

import torch

from .core import Recipe, Recipes, always, inputs, noise, uniform

_LDM = "comfy.ldm."
TEXT = 64


def _video(channels=16, **further):
    return inputs(
        x=noise(1, channels, 2, 8, 8),
        timestep=uniform(1),
        context=noise(1, 7, TEXT),
        **further,
    )


HUNYUAN = {
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
    "theta": 256,
    "patch_size": [1, 2, 2],
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
_HUNYUAN_15 = {
    **HUNYUAN,
    "in_channels": 16 + 16 + 1,
    "vec_in_dim": None,
    "guidance_embed": False,
    "depth": 6,
    "depth_single_blocks": 0,
    "vision_in_dim": 32,
    "use_cond_type_embedding": True,
}
_HUNYUAN_IMAGE = {
    **HUNYUAN,
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "patch_size": [1, 1],
    "axes_dim": [16, 16],
    "byt5": True,
    "meanflow": True,
}


def _shrink_glyphs(model, operations):
    # The mapper of ByT5 has eleven million weights, whatever the model's width.
    from comfy.ldm.hunyuan_video.model import ByT5Mapper

    model.byt5_in = ByT5Mapper(
        in_dim=24,
        out_dim=48,
        hidden_dim=48,
        out_dim1=model.hidden_size,
        use_res=False,
        dtype=torch.float32,
        device="cpu",
        operations=operations,
    )


def _sigmas(_):
    return {"sigmas": torch.tensor([0.5]), "sample_sigmas": torch.tensor([1.0, 0.5, 0.0])}


LTX = {
    "in_channels": 128,
    "cross_attention_dim": 128,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "caption_channels": TEXT,
    "num_layers": 6,
}
LTXAV = {
    **LTX,
    "audio_cross_attention_dim": 64,
    "audio_attention_head_dim": 16,
    "audio_num_attention_heads": 4,
    # What the text connectors give.
    "caption_channels": 128,
    "connector_attention_head_dim": 32,
    "connector_num_attention_heads": 4,
    "connector_num_layers": 2,
}
_CONNECTORS = (
    "audio_embeddings_connector.transformer_1d_blocks",
    "video_embeddings_connector.transformer_1d_blocks",
)


def _sound_and_vision(text):
    return inputs(
        x=lambda g: [noise(1, 128, 2, 4, 4)(g), noise(1, 8, 5, 16)(g)],
        timestep=lambda g: (uniform(1)(g), uniform(1)(g)),
        context=noise(1, 7, text),
    )


def _text_first(model, arguments):
    """What ComfyUI does when sampling begins, before and outside of any forward; then a step."""
    text = model.preprocess_text_embeds(arguments.pop("context"), unprocessed=True)
    return model(**arguments, context=text)


_COG = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "text_embed_dim": TEXT,
    "time_embed_dim": 64,
    "num_layers": 6,
}
_SEED = {
    "norm_eps": 1e-5,
    "num_layers": 6,
    "mlp_type": "swiglu",
    "vid_dim": 64,
    "txt_in_dim": 5120,
    "heads": 2,
    "head_dim": 32,
    "mm_layers": 3,
    "rope_dim": 32,
    "vid_out_norm": True,
}


def _minimax(model, arguments):
    text = model.preprocess_text_embeds(arguments.pop("context"))
    return model(**arguments, context=text)


RECIPES: Recipes = {
    _LDM + "hunyuan_video.model.HunyuanVideo": {
        "HunyuanVideo": Recipe(
            _video(y=noise(1, 32), guidance=uniform(1, scale=6.0)),
            HUNYUAN,
        ),
        "image to video": Recipe(
            _video(
                y=noise(1, 32),
                guidance=uniform(1, scale=6.0),
                attention_mask=lambda _: torch.ones(1, 7),
                guiding_frame_index=lambda _: torch.tensor([0]),
                ref_latent=noise(1, 16, 1, 8, 8),
            ),
            HUNYUAN,
        ),
        "1.5": Recipe(_video(33, clip_fea=noise(1, 9, 32)), _HUNYUAN_15),
        "image 2.1": Recipe(
            inputs(
                x=noise(1, 64, 4, 4),
                timestep=always(torch.tensor([500.0])),
                context=noise(1, 7, TEXT),
                guidance=uniform(1, scale=6.0),
                txt_byt5=noise(1, 5, 24),
                transformer_options=_sigmas,
            ),
            _HUNYUAN_IMAGE,
            shrink=_shrink_glyphs,
        ),
    },
    _LDM + "lightricks.model.LTXVModel": {
        "video": Recipe(
            inputs(
                x=noise(1, 128, 2, 4, 4),
                timestep=uniform(1),
                context=noise(1, 7, TEXT),
                attention_mask=always(None),
            ),
            LTX,
        ),
        "with a mask": Recipe(
            inputs(
                x=noise(1, 128, 2, 4, 4),
                timestep=uniform(1),
                context=noise(1, 7, TEXT),
                attention_mask=lambda _: torch.ones(1, 7, dtype=torch.int64),
            ),
            LTX,
        ),
    },
    _LDM + "lightricks.av_model.LTXAVModel": {
        "step": Recipe(_sound_and_vision(2 * 128), LTXAV, odd=dict.fromkeys(_CONNECTORS, "never")),
        "text and step": Recipe(_sound_and_vision(128), LTXAV, call=_text_first),
    },
    _LDM + "genmo.joint_model.asymm_models_joint.AsymmDiTJoint": {
        "video": Recipe(
            inputs(
                x=noise(1, 12, 2, 8, 8),
                timestep=uniform(1),
                context=noise(1, 7, TEXT),
                attention_mask=lambda _: torch.ones(1, 7, dtype=torch.bool),
                num_tokens=always(7),
            ),
            {
                "in_channels": 12,
                "hidden_size_x": 48,
                "hidden_size_y": 48,
                "depth": 4,
                "num_heads": 2,
                # Its blocks insist on this product with the width.
                "mlp_ratio_x": 1536 * 8 / 48,
                "learn_sigma": False,
                "use_t5": True,
                "t5_feat_dim": TEXT,
                "t5_token_length": 7,
                "qk_norm": True,
                "qkv_bias": False,
                "out_bias": True,
                "attn_drop": 0.0,
                "posenc_preserve_area": True,
                "timestep_scale": 1000.0,
            },
        ),
    },
    _LDM + "kandinsky5.model.Kandinsky5": {
        "video": Recipe(
            _video(16, y=noise(1, 32)),
            {
                "in_text_dim": TEXT,
                "in_text_dim2": 32,
                "time_dim": 64,
                "model_dim": 96,
                "ff_dim": 256,
                "visual_embed_dim": 64,
                "num_visual_blocks": 6,
                "axes_dims": (8, 8, 8),
            },
        ),
    },
    _LDM + "cogvideo.model.CogVideoXTransformer3DModel": {
        "1.0": Recipe(_video(), {**_COG, "use_rotary_positional_embeddings": True}),
        "1.5": Recipe(
            _video(ofs=uniform(1, scale=2.0)),
            {
                **_COG,
                "use_rotary_positional_embeddings": True,
                "patch_size_t": 2,
                "ofs_embed_dim": 64,
                "patch_bias": False,
            },
        ),
    },
    _LDM + "seedvr.model.NaDiT": {
        "upscaling": Recipe(
            inputs(
                x=noise(1, 16, 2, 8, 8),
                timestep=uniform(1, scale=1000.0),
                context=noise(1, 7, 5120),
                condition=noise(1, 17, 2, 8, 8),
                transformer_options=always({"cond_or_uncond": [0]}),
            ),
            _SEED,
            share=0.3,  # two texts that never change are buffers beside the blocks
        ),
    },
    _LDM + "minimax.model.MiniMaxH3Model": {
        "text and step": Recipe(
            inputs(
                x=lambda g: [noise(1, 24, 2, 8, 8)(g), noise(1, 32, 2, 5)(g)],
                timestep=uniform(1, scale=1000.0),
                context=noise(1, 7, TEXT),
            ),
            {
                "hidden_size": 96,
                "num_layers": 6,
                "num_attention_heads": 3,
                "attention_head_dim": 32,
                "ffn_hidden_size": 192,
                "text_dim": TEXT,
                "timestep_input_dim": 64,
                "time_embed_hidden_size": 64,
                "time_embed_dim": 48,
                "rope_inv_freq_len": 4,
            },
            call=_minimax,
        ),
    },
}
