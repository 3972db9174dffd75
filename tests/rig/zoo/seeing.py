"""Text encoders that see images, too: a vision tower beside a language model."""

import torch

from .core import Recipe, Recipes, uniform
from .text import LLAMA, VISION, embeddings, encode, llama, words

_TEXT = "comfy.text_encoders."


def _see(model, arguments):
    """An image among the words: the vision tower runs before the language model, by itself."""
    ids, start = arguments["ids"], 3
    image = {"type": "image", "data": arguments["image"]}
    seen, grid = model.preprocess_embed(image, ids.device)
    if isinstance(seen, tuple):
        seen = seen[0]
    seen = seen.reshape(1, -1, seen.shape[-1])
    words = embeddings(model, ids)
    return model(
        None,
        None,
        embeds=torch.cat((words[:, :start], seen, words[:, start:]), dim=1),
        intermediate_output=None,
        dtype=torch.float32,
        embeds_info=[{"type": "image", "index": start, "size": seen.shape[1], "extra": grid}],
    )


def _seen(size=56):
    return words(image=uniform(1, size, size, 3))


def _shrink_qwen_vision(model, operations):
    model.visual = type(model.visual)(
        hidden_size=64,
        output_hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        num_layers=4,
        dtype=torch.float32,
        device="cpu",
        ops=operations,
    )


def _shrink_qwen3_vision(model, operations):
    configuration = {
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "depth": 4,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [1, 2],
        "out_hidden_size": 64,
    }
    model.visual = type(model.visual)(
        configuration, dtype=torch.float32, device="cpu", ops=operations
    )


def _shrink_gemma_vision(model, operations):
    from comfy.clip_model import CLIPVision

    model.vision_model = CLIPVision(VISION, torch.float32, "cpu", operations)
    model.image_size = VISION["image_size"]
    projector = model.multi_modal_projector
    projector.patches_per_image, projector.tokens_per_side, projector.kernel_size = 4, 2, 2
    projector.avg_pool = torch.nn.AvgPool2d(kernel_size=2, stride=2)
    width = VISION["hidden_size"]
    projector.mm_input_projection_weight = torch.nn.Parameter(torch.empty(width, 64))
    projector.mm_soft_emb_norm.weight = torch.nn.Parameter(torch.empty(width))


RECIPES: Recipes = {}
RECIPES[_TEXT + "llama.Qwen25_7BVLI"] = {
    "text": Recipe(
        words(),
        {"config_dict": LLAMA},
        call=encode,
        shrink=_shrink_qwen_vision,
        odd={"visual.blocks": "never"},
    ),
    "image": Recipe(_seen(112), {"config_dict": LLAMA}, call=_see, shrink=_shrink_qwen_vision),
}
RECIPES[_TEXT + "llama.Gemma3_4B_Vision"] = {
    "text": Recipe(
        words(),
        {"config_dict": LLAMA},
        call=encode,
        shrink=_shrink_gemma_vision,
        odd={"vision_model.encoder.layers": "never"},
    ),
    "image": Recipe(_seen(), {"config_dict": LLAMA}, call=_see, shrink=_shrink_gemma_vision),
}
_UNSEEN = {"visual.blocks": "never", "visual.deepstack_merger_list": "never"}
RECIPES[_TEXT + "qwen3vl.Qwen3VL"] = {
    "text": Recipe(
        words(),
        {"config_dict": LLAMA},
        call=encode,
        shrink=_shrink_qwen3_vision,
        odd=_UNSEEN,
    ),
    "image": Recipe(_seen(64), {"config_dict": LLAMA}, call=_see, shrink=_shrink_qwen3_vision),
}
for _name in ("minimax.MiniMaxQwen3VL", "joyimage.Qwen3VL8B_JoyImage"):
    RECIPES |= llama(_name, shrink=_shrink_qwen3_vision, odd=_UNSEEN)
