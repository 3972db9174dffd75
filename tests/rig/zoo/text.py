"""Text encoders: the transformers that `comfy.sd1_clip.SDClipModel` makes and calls."""

from unittest import mock

import torch

from .core import Recipe, Recipes, always, inputs, noise, tokens

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
VISION = {
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


def embeddings(model, ids):
    return model.get_input_embeddings()(ids, out_dtype=torch.float32)


def encode(model, arguments):
    """What `SDClipModel.forward` does: embeddings by itself, then the transformer."""
    ids = arguments["ids"]
    extra = {"embeds_info": []} if arguments.get("layer") is not None else {}
    return model(
        None,
        torch.ones_like(ids),
        embeds=embeddings(model, ids),
        num_tokens=[ids.shape[1]],
        intermediate_output=arguments.get("layer"),
        final_layer_norm_intermediate=False,
        dtype=torch.float32,
        **extra,
    )


def _generate(model, arguments):
    """Three tokens: each is a pass of its own, after the one that reads the prompt."""
    import comfy.utils

    embeds = embeddings(model, arguments["ids"])
    # The hook tells a front end, and takes a prompt for granted.
    with mock.patch.object(comfy.utils, "PROGRESS_BAR_HOOK", None):
        found = model.generate(embeds, do_sample=False, max_length=3, stop_tokens=[])
    return torch.tensor(found)


def words(length=9, **further):
    return inputs(ids=tokens(1, length, vocabulary=WORDS), transformer_options=None, **further)


def llama(name, changes=None, ways=("last",), **further):
    """Recipes of a class that takes its configuration as a dict."""
    arguments = {"config_dict": {**LLAMA, **(changes or {})}}
    found = {
        "last": Recipe(words(), arguments, call=encode, **further),
        "inside": Recipe(words(layer=always(-2)), arguments, call=encode, **further),
        "tokens": Recipe(words(), arguments, call=_generate, **_in_turns(3, further)),
    }
    return {f"{_TEXT}{name}": {way: found[way] for way in ways}}


def _in_turns(passes, further):
    layers = " ".join(str(i) for _ in range(passes) for i in range(6))
    return {**further, "odd": {**further.get("odd", {}), "model.layers": layers}}


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
        "T5": Recipe(words(), {"config_dict": T5}, call=encode),
        "UMT5": Recipe(words(), {"config_dict": {**T5, "model_type": "umt5"}}, call=encode),
    },
    _TEXT + "bert.BertModel": {
        "text": Recipe(words(), {"config_dict": _BERT}, call=encode),
    },
    "comfy.clip_model.CLIPTextModel": {
        "last": Recipe(words(77), {"config_dict": _CLIP}, call=encode, share=0.08),
        "inside": Recipe(
            words(77, layer=always(-2)), {"config_dict": _CLIP}, call=encode, share=0.08
        ),
    },
    "comfy.clip_model.CLIPVisionModelProjection": {
        "image": Recipe(
            inputs(
                pixel_values=noise(1, 3, 56, 56),
                intermediate_output=always(-2),
                transformer_options=None,
            ),
            {"config_dict": {**VISION, "projection_dim": 32, "model_type": "clip_vision_model"}},
        ),
    },
    **llama("llama.Llama2", ways=("last", "inside")),
    **llama("llama.Mistral3Small24B"),
    **llama("llama.Ministral3_3B"),
    **llama("llama.Qwen25_3B"),
    **llama("llama.Qwen3_06B"),
    **llama("llama.Qwen3_06B_ACE15"),
    **llama("llama.Qwen3_2B_ACE15_lm"),
    **llama("llama.Qwen3_4B", ways=("last", "tokens")),
    **llama("llama.Qwen3_4B_ACE15_lm"),
    **llama("llama.Qwen3_8B"),
    **llama("llama.Ovis25_2B"),
    **llama("llama.Gemma2_2B", ways=("last", "inside")),
    **llama("llama.Gemma3_4B", ways=("last", "tokens")),
    **llama("llama.Gemma3_12B", **_NO_TOWER),
}


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
        words(),
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
    "text": Recipe(words(), {"config_dict": {}}, call=encode, shrink=_shrink_t5gemma),
}
RECIPES[_TEXT + "jina_clip_2.XLMRobertaModel"] = {
    "text": Recipe(
        words(),
        {
            "config_dict": {
                "vocab_size": WORDS,
                "hidden_size": 64,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "intermediate_size": 256,
            }
        },
        call=encode,
    ),
}
RECIPES[_TEXT + "qwen35.Qwen35"] = {
    "text": Recipe(
        words(),
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
        call=encode,
        **_NO_TOWER,
    ),
}
for _name, _changes in {
    "Gemma4_E4B": {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16},
    "Gemma4_31B": {},
    "Gemma4_12B": {},
}.items():
    RECIPES |= llama(f"gemma4.{_name}", _changes, ways=("last",), **_NO_TOWER)
