"""Small random models of many kinds as files that ComfyUI loads like any other.

ComfyUI tells a model by the names and shapes of its weights, and takes for granted what all models
of a kind have in common: 24 heads of 128 for Qwen-Image, 5120 inside Chroma's guidance. A file says
in its metadata what is narrower in it, and what the detection is to be shown instead; `install`
makes ComfyUI listen. What it then builds, loads and runs is its own affair.
"""

import contextlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from .zoo import core, flux, text, video
from .zoo.core import Recipe

_LDM = "comfy.ldm."
_TEXT = "comfy.text_encoders.llama."
TEXT = 64


@dataclass(frozen=True)
class Tiny:
    """A file of a diffusion model, and how it is sampled.

    Attributes:
        cls, arguments: what has the weights that the file has.
        shown: name -> shape that the detection sees instead of the file's.
        narrow: what replaces the detected configuration, once the kind is known.
        config: the configuration that a file of this kind has in its metadata, as in ComfyUI.
        latent: the node of the empty latent.
        width, pooled: of the text.
        masked: a text comes with a mask, as its encoder gives one.
    """

    cls: str
    arguments: Mapping
    shown: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    narrow: Mapping = field(default_factory=dict)
    config: Mapping | None = None
    latent: str = "EmptySD3LatentImage"
    width: int = TEXT
    pooled: int = 0
    masked: bool = False


_IMAGE = {"width": 64, "height": 64, "batch_size": 1}
_VIDEO = {**_IMAGE, "length": 5}
LATENTS = {
    "EmptySD3LatentImage": _IMAGE,
    "EmptyHunyuanLatentVideo": _VIDEO,
    "EmptyLTXVLatentVideo": {**_VIDEO, "length": 9},
    "EmptyCosmosLatentVideo": {**_VIDEO, "length": 9},
}

_WIDE = {"hidden_size": 256, "num_heads": 2, "axes_dim": [16, 56, 56]}
_CHROMA = {"out_dim": 256, "hidden_dim": 96, "n_layers": 3}
_QWEN = {"num_attention_heads": 2, "joint_attention_dim": TEXT}
_ZIMAGE = {
    "dim": 256,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "ffn_dim_multiplier": 1.0,
    "rope_theta": 256.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_MMDIT = {
    "input_size": None,
    "in_channels": 16,
    "out_channels": 16,
    "depth": 4,
    "num_patches": 36864,
    "pos_embed_max_size": 192,
    "pos_embed_scaling_factor": None,
    "adm_in_channels": 2048,
    "qk_norm": "rms",
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 4096, "out_features": 256},
    },
}
_COSMOS = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 256,
    "num_blocks": 10,
    "num_heads": 16,
    "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "use_adaln_lora": True,
}
_LTXAV = {**video.LTXAV, "num_layers": 4}

MODELS = {
    "Flux": Tiny(
        _LDM + "flux.model.Flux",
        {**flux.FLUX, **_WIDE, "vec_in_dim": 32},
        pooled=32,
    ),
    "Chroma": Tiny(
        _LDM + "chroma.model.Chroma",
        {**flux.CHROMA, **_WIDE, **_CHROMA},
        narrow=_CHROMA,
        pooled=32,  # which older versions ask for, and leave
    ),
    "Qwen-Image": Tiny(
        _LDM + "qwen_image.model.QwenImageTransformer2DModel",
        {**_QWEN, "in_channels": 64, "num_layers": 6},
        narrow=_QWEN,
    ),
    "HunyuanVideo": Tiny(
        _LDM + "hunyuan_video.model.HunyuanVideo",
        {**video.HUNYUAN, **_WIDE, "vec_in_dim": 32},
        narrow={"num_heads": 2, "context_in_dim": TEXT, "vec_in_dim": 32, "hidden_size": 256},
        latent="EmptyHunyuanLatentVideo",
        pooled=32,
    ),
    "LTX-2": Tiny(
        _LDM + "lightricks.av_model.LTXAVModel",
        _LTXAV,
        config={"transformer": _LTXAV},
        latent="EmptyLTXVLatentVideo",
        width=128,
    ),
    "LTXV": Tiny(
        _LDM + "lightricks.model.LTXVModel",
        {**video.LTX, "num_layers": 4},
        config={"transformer": {**video.LTX, "num_layers": 4}},
        latent="EmptyLTXVLatentVideo",
        masked=True,
    ),
    "Z-Image": Tiny(
        _LDM + "lumina.model.NextDiT",
        {
            **_ZIMAGE,
            "in_channels": 16,
            "n_layers": 4,
            "qk_norm": True,
            "cap_feat_dim": TEXT,
        },
        shown={"cap_embedder.1.weight": (3840, TEXT)},
        narrow=_ZIMAGE,
    ),
    "SD3.5": Tiny(
        _LDM + "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
        _MMDIT,
        width=4096,
        pooled=2048,
    ),
    "Cosmos-Predict2": Tiny(
        _LDM + "cosmos.predict2.MiniTrainDIT",
        _COSMOS,
        latent="EmptyCosmosLatentVideo",
        width=1024,
    ),
}


@dataclass(frozen=True)
class TinyText:
    """A file of a text encoder: `name` is what ComfyUI calls it, `kind` what the loader is told."""

    cls: str
    config: Mapping
    name: str
    kind: str
    spiece: bool = False


TEXTS = {
    # 24 layers and 10240 make it an XXL.
    "UMT5": TinyText(
        "comfy.text_encoders.t5.T5",
        {
            **text.T5,
            "model_type": "umt5",
            "num_layers": 24,
            "d_model": 8,
            "d_kv": 4,
            "num_heads": 2,
            "d_ff": 10240,
        },
        "umt5xxl",
        "wan",
        spiece=True,
    ),
    # Four heads of 128 for keys make it the 7B.
    "Qwen2.5-VL": TinyText(
        _TEXT + "Qwen25_7BVLI",
        {
            **text.LLAMA,
            "vocab_size": 152064,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        "qwen25_7b",
        "qwen_image",
    ),
    "Gemma": TinyText(_TEXT + "Gemma2_2B", text.LLAMA, "gemma2_2b", "lumina2", spiece=True),
}

# An XLabs ControlNet, which takes a picture as it is, without a VAE.
CONTROL = {**flux.FLUX, **_WIDE, "vec_in_dim": 32, "depth_single_blocks": 0}


def write_model(path: Path, key: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write the model `MODELS[key]` in bf16 to `path` and return its weights."""
    tiny = MODELS[key]
    weights = _weights(tiny.cls, tiny.arguments, seed)
    metadata = {"tiny": json.dumps({"shown": dict(tiny.shown), "narrow": dict(tiny.narrow)})}
    if tiny.config is not None:
        metadata["config"] = json.dumps(tiny.config)
    save_file(weights, path, metadata)
    return weights


def write_text(path: Path, key: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write the text encoder `TEXTS[key]` in bf16 to `path` and return its weights."""
    tiny = TEXTS[key]
    with _small_towers():
        weights = _weights(tiny.cls, {"config_dict": dict(tiny.config)}, seed)
    note = json.dumps({f"{tiny.name}_model_config": dict(tiny.config)}).encode()
    extra = {"tiny": torch.frombuffer(bytearray(note), dtype=torch.uint8)}
    if tiny.spiece:
        extra["spiece_model"] = torch.frombuffer(bytearray(_spiece()), dtype=torch.uint8)
    save_file({**weights, **extra}, path)
    return weights


def write_control(path: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a ControlNet for the Flux of `MODELS` in bf16 to `path` and return its weights."""
    weights = _weights(_LDM + "flux.controlnet.ControlNetFlux", CONTROL, seed)
    norms = re.compile(r"((?:query|key)_norm)\.weight$")
    save_file({norms.sub(r"\1.scale", name): weight for name, weight in weights.items()}, path)
    return weights


def _weights(cls: str, arguments: Mapping, seed: int) -> dict[str, torch.Tensor]:
    recipe = Recipe(inputs=core.inputs(), arguments=arguments)
    model = core.build(core.find(cls), recipe, seed=seed).model
    return {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}


def _spiece() -> bytes:
    """A sentence-piece tokenizer of a few words."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat sits on the mat", "the dog runs to a tree", "red blue"]),
        model_writer=written,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return written.getvalue()


# ------------------------------------------------------------------------------ detection


class _Shown(dict):
    """A state dict in which some weights have another shape."""

    def __init__(self, weights, shapes):
        super().__init__(weights)
        self._shapes = shapes

    def __getitem__(self, name):
        if name in self._shapes:
            return torch.empty(self._shapes[name], device="meta")
        return super().__getitem__(name)


@contextlib.contextmanager
def _small_towers() -> Iterator[None]:
    """The vision tower of Qwen2.5-VL is of one size, 600 million weights."""
    from comfy.text_encoders import qwen_vl

    tower = qwen_vl.Qwen2VLVisionTransformer

    def small(hidden_size, **arguments):
        return tower(hidden_size=64, intermediate_size=128, num_heads=4, num_layers=4, **arguments)

    with mock.patch.object(qwen_vl, "Qwen2VLVisionTransformer", small):
        yield


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """ComfyUI takes the files of this module for what they are, only narrower."""
    import comfy.model_detection
    import comfy.sd

    detect = comfy.model_detection.model_config_from_unet
    load_text = comfy.sd.load_text_encoder_state_dicts

    def model_config_from_unet(state_dict, prefix, *args, metadata=None, **kwargs):
        tiny = json.loads((metadata or {}).get("tiny", "null"))
        if tiny is None:
            return detect(state_dict, prefix, *args, metadata=metadata, **kwargs)
        shown = _Shown(state_dict, {prefix + k: tuple(v) for k, v in tiny["shown"].items()})
        config = detect(shown, prefix, *args, metadata=metadata, **kwargs)
        config.unet_config.update(tiny["narrow"])
        return config

    def load_text_encoder_state_dicts(state_dicts, *args, model_options, **kwargs):
        options = dict(model_options)
        for weights in state_dicts:
            if (note := weights.pop("tiny", None)) is not None:
                options |= json.loads(bytes(note.tolist()))
        with _small_towers():
            return load_text(state_dicts, *args, model_options=options, **kwargs)

    with (
        mock.patch.object(comfy.model_detection, "model_config_from_unet", model_config_from_unet),
        mock.patch.object(comfy.sd, "load_text_encoder_state_dicts", load_text_encoder_state_dicts),
    ):
        yield


# -------------------------------------------------------------------------------- prompts


def sampling(key: str, loader: dict, seed: int = 1, control: dict | None = None) -> dict:
    """The prompt that samples `MODELS[key]` two steps; `control` is a loader of the ControlNet.

    Without classifier-free guidance, so that a step is one pass. Node 1 is the model.
    """
    from . import prompts

    tiny = MODELS[key]
    text_of = {"width": tiny.width, "pooled": tiny.pooled, "masked": tiny.masked}
    nodes = {
        "1": loader,
        "2": {"class_type": "ProbeConditioning", "inputs": {"seed": 3, "length": 7, **text_of}},
        "4": {"class_type": tiny.latent, "inputs": LATENTS[tiny.latent]},
    }
    positive = "2"
    if control is not None:
        image = {"class_type": "EmptyImage", "inputs": {**_IMAGE, "color": 8421504}}
        applied = {
            "positive": ["2", 0],
            "negative": ["2", 0],
            "control_net": ["5", 0],
            "image": ["6", 0],
            "strength": 1.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
        }
        apply = {"class_type": "ControlNetApplyAdvanced", "inputs": applied}
        nodes |= {"5": control, "6": image, "7": apply}
        positive = "7"
    return {
        **nodes,
        "8": prompts.sampler("1", positive, "2", "4", seed, steps=2, cfg=1.0),
        "9": prompts.probe("8", "out"),
    }


def encoding(loader: dict, words: str = "a cat sits on the mat") -> dict:
    """The prompt that encodes some words with the text encoder of a loader."""
    return {
        "1": loader,
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 0], "text": words}},
        "3": {"class_type": "ProbeEncoding", "inputs": {"conditioning": ["2", 0], "key": "text"}},
    }
