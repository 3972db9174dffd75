"""Cosmos, and Anima, which is made of it."""

import torch

from .core import Recipe, Recipes, inputs, noise, tokens, uniform

_LDM = "comfy.ldm."
TEXT = 64

_COSMOS = {
    "max_img_h": 32,
    "max_img_w": 32,
    "max_frames": 8,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 128,
    "num_blocks": 6,
    "num_heads": 4,
    "crossattn_emb_channels": TEXT,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 32,
}


def _cosmos(**further):
    return inputs(
        x=noise(1, 16, 2, 8, 8),
        timesteps=uniform(1),
        context=noise(1, 7, TEXT),
        padding_mask=lambda _: torch.zeros(1, 1, 8, 8),
        fps=lambda _: torch.tensor([24]),
        **further,
    )


def _shrink_adapter(model, operations):
    from comfy.ldm.anima.model import LLMAdapter

    model.llm_adapter = LLMAdapter(
        source_dim=TEXT,
        target_dim=TEXT,
        model_dim=TEXT,
        num_layers=4,
        num_heads=4,
        dtype=torch.float32,
        device="cpu",
        operations=operations,
    )
    model.llm_adapter.embed = operations.Embedding(500, TEXT, dtype=torch.float32)


RECIPES: Recipes = {
    _LDM + "cosmos.model.GeneralDIT": {
        "video": Recipe(
            _cosmos(),
            {
                **_COSMOS,
                "block_x_format": "THWBD",
                "affline_emb_norm": True,
                "extra_per_block_abs_pos_emb": True,
                "extra_per_block_abs_pos_emb_type": "learnable",
            },
            rounds=True,
        ),
    },
    _LDM + "cosmos.predict2.MiniTrainDIT": {
        "video": Recipe(_cosmos(), {**_COSMOS, "rope_enable_fps_modulation": False}),
    },
    _LDM + "anima.model.Anima": {
        "text in the step": Recipe(
            _cosmos(t5xxl_ids=tokens(1, 9, vocabulary=500)), _COSMOS, shrink=_shrink_adapter
        ),
        "step": Recipe(
            _cosmos(), _COSMOS, shrink=_shrink_adapter, odd={"llm_adapter.blocks": "never"}
        ),
    },
}
