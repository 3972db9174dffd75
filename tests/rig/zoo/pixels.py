"""Image models without a VAE: they make pixels."""

from .core import Recipe, Recipes, always, inputs, noise, tokens, uniform
from .image import ZIMAGE

_LDM = "comfy.ldm."
TEXT = 64

_PIXELS = {
    "num_groups": 2,
    "hidden_size": 64,
    "pixel_hidden_size": 8,
    "pixel_attn_hidden_size": 32,
    "pixel_num_groups": 2,
    "patch_depth": 6,
    "pixel_depth": 2,
    "patch_size": 4,
    "txt_embed_dim": TEXT,
    "txt_max_length": 16,
}

_TIMESTEP = 999  # the token that stands for it, of a vocabulary of 1000


def _fewer_words(model, _):
    model.tms_token_id = _TIMESTEP


def _hidream_o1(generator):
    from comfy.ldm.hidream_o1.conditioning import build_extra_conds

    x = noise(1, 3, 64, 64)(generator)
    text = tokens(1, 8, vocabulary=_TIMESTEP)(generator)
    text[:, -1] = _TIMESTEP
    conditions = build_extra_conds(text, x)
    conditions = {k: v for k, v in conditions.items() if k != "token_types"}
    return {"x": x, "timesteps": uniform(1, scale=1000.0)(generator) + 1, **conditions}


def _forget(model, arguments):
    """One call without what an earlier one has left."""
    model.clear_kv_cache()
    return model(**arguments)


def _warm(model, arguments):
    """The second of two calls, which takes keys and values of the text from the first."""
    model.clear_kv_cache()
    model(**arguments)
    return model(**arguments)


_O1 = {
    "text_config_overrides": {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,  # older versions cannot share them on a CPU
        "head_dim": 128,
    },
    "vision_config_overrides": {
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "depth": 3,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": (),
    },
}

RECIPES: Recipes = {
    _LDM + "lumina.model.NextDiTPixelSpace": {
        "image": Recipe(
            inputs(
                x=noise(1, 3, 16, 16),
                timesteps=uniform(1),
                context=noise(1, 7, TEXT),
                num_tokens=always(7),
            ),
            {
                **ZIMAGE,
                "in_channels": 3,
                "patch_size": 4,
                "decoder_hidden_size": 32,
                "decoder_num_res_blocks": 4,
                "decoder_max_freqs": 4,
                "decoder_in_channels": 48,
            },
        ),
    },
    _LDM + "hidream_o1.model.HiDreamO1Transformer": {
        "text to image": Recipe(_hidream_o1, _O1, call=_forget, shrink=_fewer_words),
        "second step": Recipe(
            _hidream_o1,
            _O1,
            call=_warm,
            shrink=_fewer_words,
            odd={"language_model.layers": "0 1 2 3 4 5 0 1 2 3 4 5"},
        ),
    },
    _LDM + "pixeldit.model.PixDiT_T2I": {
        "image": Recipe(
            inputs(
                x=noise(1, 3, 16, 16),
                timesteps=uniform(1, scale=1000.0),
                context=noise(1, 7, TEXT),
            ),
            _PIXELS,
        ),
    },
    _LDM + "pixeldit.pid.PidNet": {
        "decoder": Recipe(
            inputs(
                x=noise(1, 3, 16, 16),
                timesteps=uniform(1, scale=1000.0),
                context=noise(1, 7, TEXT),
                lq_latent=noise(1, 16, 4, 4),
                degrade_sigma=uniform(1),
            ),
            {**_PIXELS, "lq_hidden_dim": 32, "lq_num_res_blocks": 2},
        ),
    },
}
