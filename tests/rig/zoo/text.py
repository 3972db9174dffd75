"""Text encoders: the transformers that `comfy.sd1_clip.SDClipModel` makes and calls."""

from unittest import mock

import torch

from .core import Recipe, Recipes, always, inputs, noise, tokens, uniform

_TEXT = "comfy.text_encoders."
WORDS = 300

T5 = {
    "num_layers": 6,
    "d_model": 64,
    "d_kv": 16,
    "num_heads": 4,
    "d_ff": 256,
    "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True,
    "model_type": "t5",
    "vocab_size": WORDS,
}
_BERT = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "vocab_size": WORDS,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "layer_norm_eps": 1e-12,
}
_CLIP = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
_VISION = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "model_type": "siglip_vision_model",
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 56,
}
# The width of a head is of the class: 128, or 256 in Gemma.
LLAMA = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def _embeddings(model, ids):
    return model.get_input_embeddings()(ids, out_dtype=torch.float32)


def _encode(model, arguments):
    """What `SDClipModel.forward` does: embeddings by itself, then the transformer."""
    ids = arguments["ids"]
    extra = {"embeds_info": []} if arguments.get("layer") is not None else {}
    return model(
        None,
        torch.ones_like(ids),
        embeds=_embeddings(model, ids),
        num_tokens=[ids.shape[1]],
        intermediate_output=arguments.get("layer"),
        final_layer_norm_intermediate=False,
        dtype=torch.float32,
        **extra,
    )


def _generate(model, arguments):
    """Three tokens: each is a pass of its own, after the one that reads the prompt."""
    import comfy.utils

    embeds = _embeddings(model, arguments["ids"])
    # The hook tells a front end, and takes a prompt for granted.
    with mock.patch.object(comfy.utils, "PROGRESS_BAR_HOOK", None):
        found = model.generate(embeds, do_sample=False, max_length=3, stop_tokens=[])
    return torch.tensor(found)


def _see(model, arguments):
    """An image among the words: the vision tower runs before the language model, by itself."""
    ids, start = arguments["ids"], 3
    image = {"type": "image", "data": arguments["image"]}
    seen, grid = model.preprocess_embed(image, ids.device)
    if isinstance(seen, tuple):
        seen = seen[0]
    seen = seen.reshape(1, -1, seen.shape[-1])
    words = _embeddings(model, ids)
    return model(
        None,
        None,
        embeds=torch.cat((words[:, :start], seen, words[:, start:]), dim=1),
        intermediate_output=None,
        dtype=torch.float32,
        embeds_info=[{"type": "image", "index": start, "size": seen.shape[1], "extra": grid}],
    )


def _text(length=9, **further):
    return inputs(ids=tokens(1, length, vocabulary=WORDS), transformer_options=None, **further)


def _seen(size=56):
    return _text(image=uniform(1, size, size, 3))


def _llama(name, changes=None, ways=("last",), **further):
    """Recipes of a class that takes its configuration as a dict."""
    arguments = {"config_dict": {**LLAMA, **(changes or {})}}
    found = {
        "last": Recipe(_text(), arguments, call=_encode, **further),
        "inside": Recipe(_text(layer=always(-2)), arguments, call=_encode, **further),
        "tokens": Recipe(_text(), arguments, call=_generate, **_in_turns(3, further)),
    }
    return {f"{_TEXT}{name}": {way: found[way] for way in ways}}


def _in_turns(passes, further):
    layers = " ".join(str(i) for _ in range(passes) for i in range(6))
    return {**further, "odd": {**further.get("odd", {}), "model.layers": layers}}


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

    model.vision_model = CLIPVision(_VISION, torch.float32, "cpu", operations)
    model.image_size = _VISION["image_size"]
    projector = model.multi_modal_projector
    projector.patches_per_image, projector.tokens_per_side, projector.kernel_size = 4, 2, 2
    projector.avg_pool = torch.nn.AvgPool2d(kernel_size=2, stride=2)
    width = _VISION["hidden_size"]
    projector.mm_input_projection_weight = torch.nn.Parameter(torch.empty(width, 64))
    projector.mm_soft_emb_norm.weight = torch.nn.Parameter(torch.empty(width))


def _drop(*names):
    """Towers for images and sound are larger than the rest, and text does without."""

    def shrink(model, _):
        for name in names:
            if hasattr(model, name):
                delattr(model, name)

    return shrink


_NO_TOWER = {
    "shrink": _drop(
        "vision_model", "visual", "multi_modal_projector", "audio_model", "audio_projector"
    )
}

RECIPES: Recipes = {
    _TEXT + "t5.T5": {
        "T5": Recipe(_text(), {"config_dict": T5}, call=_encode),
        "UMT5": Recipe(_text(), {"config_dict": {**T5, "model_type": "umt5"}}, call=_encode),
    },
    _TEXT + "bert.BertModel": {
        "text": Recipe(_text(), {"config_dict": _BERT}, call=_encode),
    },
    "comfy.clip_model.CLIPTextModel": {
        "last": Recipe(_text(77), {"config_dict": _CLIP}, call=_encode, share=0.08),
        "inside": Recipe(
            _text(77, layer=always(-2)), {"config_dict": _CLIP}, call=_encode, share=0.08
        ),
    },
    "comfy.clip_model.CLIPVisionModelProjection": {
        "image": Recipe(
            inputs(
                pixel_values=noise(1, 3, 56, 56),
                intermediate_output=always(-2),
                transformer_options=None,
            ),
            {"config_dict": {**_VISION, "projection_dim": 32, "model_type": "clip_vision_model"}},
        ),
    },
    **_llama("llama.Llama2", ways=("last", "inside")),
    **_llama("llama.Mistral3Small24B"),
    **_llama("llama.Ministral3_3B"),
    **_llama("llama.Qwen25_3B"),
    **_llama("llama.Qwen3_06B"),
    **_llama("llama.Qwen3_06B_ACE15"),
    **_llama("llama.Qwen3_2B_ACE15_lm"),
    **_llama("llama.Qwen3_4B", ways=("last", "tokens")),
    **_llama("llama.Qwen3_4B_ACE15_lm"),
    **_llama("llama.Qwen3_8B"),
    **_llama("llama.Ovis25_2B"),
    **_llama("llama.Gemma2_2B", ways=("last", "inside")),
    **_llama("llama.Gemma3_4B", ways=("last", "tokens")),
    **_llama("llama.Gemma3_12B", **_NO_TOWER),
}
RECIPES[_TEXT + "llama.Qwen25_7BVLI"] = {
    "text": Recipe(
        _text(),
        {"config_dict": LLAMA},
        call=_encode,
        shrink=_shrink_qwen_vision,
        odd={"visual.blocks": "never"},
    ),
    "image": Recipe(_seen(112), {"config_dict": LLAMA}, call=_see, shrink=_shrink_qwen_vision),
}
RECIPES[_TEXT + "llama.Gemma3_4B_Vision"] = {
    "text": Recipe(
        _text(),
        {"config_dict": LLAMA},
        call=_encode,
        shrink=_shrink_gemma_vision,
        odd={"vision_model.encoder.layers": "never"},
    ),
    "image": Recipe(_seen(), {"config_dict": LLAMA}, call=_see, shrink=_shrink_gemma_vision),
}
_UNSEEN = {"visual.blocks": "never", "visual.deepstack_merger_list": "never"}
RECIPES[_TEXT + "qwen3vl.Qwen3VL"] = {
    "text": Recipe(
        _text(),
        {"config_dict": LLAMA},
        call=_encode,
        shrink=_shrink_qwen3_vision,
        odd=_UNSEEN,
    ),
    "image": Recipe(_seen(64), {"config_dict": LLAMA}, call=_see, shrink=_shrink_qwen3_vision),
}
for _name in ("minimax.MiniMaxQwen3VL", "joyimage.Qwen3VL8B_JoyImage"):
    RECIPES |= _llama(_name, shrink=_shrink_qwen3_vision, odd=_UNSEEN)


def _gpt_oss():
    from comfy.text_encoders.gpt_oss import GptOss20BConfig

    return {
        "config": GptOss20BConfig(
            vocab_size=WORDS,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    }


def _with_experts(operations):
    """Its experts are made by operations for mixed precision only, which wait for a file."""
    import comfy.ops

    experts = comfy.ops.mixed_precision_ops({}, torch.float32).MoEExperts
    return type("Operations", (operations,), {"MoEExperts": experts})


def _hire_experts(model, _):
    for module in model.modules():
        if hasattr(module, "expert_weight"):
            module.weight = torch.nn.Parameter(torch.empty(module._orig_shape))


def _capture(model, arguments):
    """What Lens takes from GPT-OSS: some layers, and the last ones are not run at all."""
    ids = arguments["ids"]
    return model(ids, torch.ones_like(ids), capture_layers=[1, 3])


RECIPES[_TEXT + "gpt_oss.GptOssModel"] = {
    "some layers": Recipe(
        _text(),
        _gpt_oss,
        call=_capture,
        shrink=_hire_experts,
        operations=_with_experts,
        odd={"layers": "0 1 2 3"},
    ),
}


def _shrink_t5gemma(model, operations):
    configuration = model.model.encoder.config
    configuration.vocab_size, configuration.num_hidden_layers = WORDS, 6
    configuration.hidden_size, configuration.intermediate_size = 64, 192
    configuration.num_attention_heads, configuration.num_key_value_heads = 2, 1
    configuration.head_dim = 32
    model.num_layers = 6
    model.model = type(model.model)(configuration, "cpu", torch.float32, operations)


RECIPES[_TEXT + "sa3.T5GemmaModel"] = {
    "text": Recipe(_text(), {"config_dict": {}}, call=_encode, shrink=_shrink_t5gemma),
}
RECIPES[_TEXT + "jina_clip_2.XLMRobertaModel"] = {
    "text": Recipe(
        _text(),
        {
            "config_dict": {
                "vocab_size": WORDS,
                "hidden_size": 64,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "intermediate_size": 256,
            }
        },
        call=_encode,
    ),
}
RECIPES[_TEXT + "qwen35.Qwen35"] = {
    "text": Recipe(
        _text(),
        {
            "config_dict": {
                **LLAMA,
                "head_dim": 64,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 32,
                "linear_value_head_dim": 32,
                "layer_types": ["linear_attention"] * 3
                + ["full_attention"]
                + ["linear_attention"] * 2,
            }
        },
        call=_encode,
        **_NO_TOWER,
    ),
}
for _name, _changes in {
    "Gemma4_E4B": {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16},
    "Gemma4_31B": {},
    "Gemma4_12B": {},
}.items():
    RECIPES |= _llama(f"gemma4.{_name}", _changes, ways=("last",), **_NO_TOWER)
