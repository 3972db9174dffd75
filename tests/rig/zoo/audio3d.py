"""Models of sound and of shapes in space."""

import torch

from .core import Recipe, Recipes, always, inputs, noise, tokens, uniform

_LDM = "comfy.ldm."
TEXT = 64

_STABLE = {
    "io_channels": 16,
    "embed_dim": 128,
    "cond_token_dim": TEXT,
    "global_cond_dim": 48,
    "project_cond_tokens": False,
    "depth": 6,
    "num_heads": 4,
}
_ACE = {
    "num_layers": 6,
    "inner_dim": 128,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "mlp_ratio": 2.5,
    "speaker_embedding_dim": 24,
    "text_embedding_dim": TEXT,
    "ssl_latent_dims": [48, 32],
    "lyric_encoder_vocab_size": 100,
    "lyric_hidden_size": 32,
    "max_position": 256,
}
_ACE15 = {
    "hidden_size": 128,
    "text_hidden_dim": TEXT,
    "num_dit_layers": 6,
    "num_lyric_layers": 3,
    "num_timbre_layers": 2,
    "num_tokenizer_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "fsq_dim": 128,
    "encoder_hidden_size": 128,
    "encoder_intermediate_size": 96,
    "encoder_num_heads": 4,
}


def _shrink_lyrics(model, operations):
    # Its encoder is 1024 wide, whatever is asked for.
    from comfy.ldm.ace.lyric_encoder import ConformerEncoder

    model.lyric_encoder = ConformerEncoder(
        input_size=32,
        output_size=32,
        attention_heads=2,
        linear_units=64,
        num_blocks=4,
        static_chunk_size=0,
        dtype=torch.float32,
        device="cpu",
        operations=operations,
    )


_SEPARATE = frozenset({"encoder_hidden_size", "encoder_intermediate_size", "encoder_num_heads"})


def _shrink_tables(model, operations):
    # Rotations of 32768 positions, seven times, and a book of 64000 codes.
    for module in model.modules():
        if hasattr(module, "cos_cached"):
            module._set_cos_sin_cache(256, "cpu", torch.float32)


def _song(**further):
    return inputs(
        x=noise(1, 64, 20),
        timestep=uniform(1),
        context=noise(1, 7, TEXT),
        lyric_embed=noise(1, 9, TEXT),
        refer_audio=noise(1, 64, 20),
        **further,
    )


RECIPES: Recipes = {
    _LDM + "audio.dit.AudioDiffusionTransformer": {
        "Stable Audio": Recipe(
            inputs(
                x=noise(1, 16, 24),
                timestep=uniform(1),
                context=noise(1, 7, TEXT),
                global_embed=noise(1, 48),
            ),
            _STABLE,
        ),
    },
    _LDM + "ace.model.ACEStepTransformer2DModel": {
        "song": Recipe(
            inputs(
                x=noise(1, 8, 16, 12),
                timestep=uniform(1, scale=1000.0),
                context=noise(1, 7, TEXT),
                speaker_embeds=noise(1, 24),
                lyric_token_idx=tokens(1, 9, vocabulary=100),
                lyrics_strength=always(0.9),
            ),
            _ACE,
            shrink=_shrink_lyrics,
            odd={"projectors": "never"},
        ),
    },
    _LDM + "ace.ace_step15.AceStepConditionGenerationModel": {
        "cover": Recipe(
            _song(is_covers=always(True)), _ACE15, shrink=_shrink_tables, newer=_SEPARATE
        ),
        "text to music": Recipe(
            _song(is_covers=always(False)),
            _ACE15,
            shrink=_shrink_tables,
            # The hints that the tokenizer gives are made, and left.
            mute=frozenset(
                {
                    "tokenizer.attention_pooler.layers",
                    "tokenizer.quantizer.layers",
                    "detokenizer.layers",
                }
            ),
            newer=_SEPARATE,
        ),
        "with codes": Recipe(
            _song(audio_codes=tokens(1, 4, vocabulary=1000)),
            _ACE15,
            shrink=_shrink_tables,
            newer=_SEPARATE,
            # A code is looked up in the table of its layer, without a call.
            odd={
                "tokenizer.attention_pooler.layers": "never",
                "tokenizer.quantizer.layers": "never",
            },
        ),
    },
    _LDM + "hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain": {
        "shape": Recipe(
            # Older versions insist on the two halves of classifier-free guidance.
            inputs(x=noise(2, 16, 12), t=uniform(2), context=noise(2, 7, TEXT)),
            {
                "in_channels": 16,
                "hidden_size": 64,
                "context_dim": TEXT,
                "depth": 7,
                "num_heads": 4,
                "num_moe_layers": 3,
                "guidance_cond_proj_dim": None,
                "num_experts": 4,
            },
        ),
    },
    _LDM + "triposplat.model.LatentSeqMMFlowModel": {
        "shape": Recipe(
            inputs(
                x=lambda g: [noise(1, 24, 16)(g), noise(1, 1, 5)(g)],
                t=uniform(1),
                context=noise(1, 9, TEXT),
            ),
            {
                "q_token_length": 24,
                "model_channels": 96,
                "cond_channels": TEXT,
                "num_blocks": 6,
                "num_head_channels": 32,
            },
        ),
    },
}
