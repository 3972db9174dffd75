"""The models under measurement: ComfyUI's own classes at the shapes that people load, and small.

Wan and Qwen-Image are lists of equal blocks. Flux and HunyuanVideo are double blocks and then
single ones, of 2.4 times fewer bytes that compute as long: a double block multiplies each token
with one half of its weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

LATENT_CHANNELS = 16
PIXELS = {"480p": (480, 832), "720p": (720, 1280), "1024p": (1024, 1024)}


@dataclass(frozen=True)
class Length:
    """What one forward pass computes: a latent of ``frames`` x ``height`` x ``width``.

    ``ratio`` is the time of computing the blocks over that of moving them all, for simulated
    devices.
    """

    name: str
    frames: int
    height: int
    width: int
    ratio: float = 1.0

    @property
    def tokens(self) -> int:
        """Length of the sequence: a token is one frame of 2 x 2 latent values."""
        return self.frames * (self.height // 2) * (self.width // 2)


def length_of(name: str) -> Length:
    """The length named ``<size>-<frames of video>``: 8 pixels and 4 frames a latent value.

    Raises:
        ValueError: the name is no such one.
    """
    size, _, frames = name.partition("-")
    if size not in PIXELS or not frames.isdecimal() or int(frames) % 4 != 1:
        known = "|".join(PIXELS)
        raise ValueError(f"{name}: write <{known}>-<frames>, with 1, 5, 9, ... 81 frames")
    height, width = PIXELS[size]
    return Length(name, (int(frames) - 1) // 4 + 1, height // 8, width // 8)


@dataclass(frozen=True)
class Shape:
    """A class of ComfyUI and what it is built with.

    ``depths`` names the arguments that count blocks. ``sizes`` makes the shapes of what the forward
    takes beside the timestep, which is ``timestep``; ``text`` is how many tokens of text that has.
    An image model takes single frames only.
    """

    name: str
    cls: str
    arguments: Mapping[str, object] = field(hash=False)
    depths: tuple[str, ...]
    sizes: Callable[[Shape, Length], dict[str, tuple[int, ...]]]
    lengths: tuple[Length, ...]
    text: int = 512
    timestep: float = 0.5
    image: bool = False

    @property
    def layers(self) -> int:
        """How many blocks it has."""
        return sum(self.arguments[depth] for depth in self.depths)

    def with_layers(self, layers: int) -> Shape:
        """The same with about so many blocks, one of each kind at least, in the same proportion."""
        each = {
            depth: max(1, round(self.arguments[depth] * layers / self.layers))
            for depth in self.depths
        }
        return replace(self, arguments={**self.arguments, **each})

    def build(self, operations: type) -> torch.nn.Module:
        """The model without weights."""
        module, _, name = self.cls.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        arguments = {**self.arguments, "device": "meta", "dtype": torch.bfloat16}
        return cls(**arguments, operations=operations).eval().requires_grad_(False)

    def inputs(self, length: Length, device: torch.device) -> dict[str, object]:
        """What one pass is given, the same in every process."""
        generator = torch.Generator().manual_seed(1)
        given: dict[str, object] = {
            name: torch.randn(size, generator=generator).to(device, torch.bfloat16)
            for name, size in self.sizes(self, length).items()
        }
        given["timestep"] = torch.full((1,), self.timestep).to(device)
        given["transformer_options"] = {}
        return given

    def flops(self, length: Length) -> int:
        """Floating point operations of one pass, 2*m*n*k per matrix product, by a dry run."""
        from comfy.ldm.modules.attention import attention_pytorch
        from comfy.ops import disable_weight_init

        nowhere = torch.device("meta")
        given = self.inputs(length, nowhere)
        # The others ask the device for its free memory.
        plain = {
            "optimized_attention_override": lambda _, *args, **kw: attention_pytorch(*args, **kw)
        }
        given["transformer_options"] = plain
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            self.build(disable_weight_init)(**given)
        return counter.get_total_flops()


def _wan_sizes(shape: Shape, length: Length) -> dict[str, tuple[int, ...]]:
    return {
        "x": (1, LATENT_CHANNELS, length.frames, length.height, length.width),
        "context": (1, shape.text, 4096),
    }


def _flux_sizes(shape: Shape, length: Length) -> dict[str, tuple[int, ...]]:
    frames = () if shape.image else (length.frames,)
    return {
        "x": (1, LATENT_CHANNELS, *frames, length.height, length.width),
        "context": (1, shape.text, shape.arguments["context_in_dim"]),
        "y": (1, shape.arguments["vec_in_dim"]),
        "guidance": (1,),
    }


def _qwen_sizes(shape: Shape, length: Length) -> dict[str, tuple[int, ...]]:
    return {
        "x": (1, LATENT_CHANNELS, 1, length.height, length.width),
        "context": (1, shape.text, shape.arguments["joint_attention_dim"]),
    }


def _lengths(*names: str) -> tuple[Length, ...]:
    return tuple(length_of(name) for name in names)


VIDEO_LENGTHS = _lengths("480p-1", "480p-17", "480p-81", "720p-81")
IMAGE_LENGTHS = _lengths("480p-1", "1024p-1")

WAN = Shape(
    "Wan 14B",
    "comfy.ldm.wan.model.WanModel",
    {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "text_len": 512},
    ("num_layers",),
    _wan_sizes,
    VIDEO_LENGTHS,
    timestep=500.0,
)

_FLUX = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "axes_dim": [16, 56, 56],
    "qkv_bias": True,
    "guidance_embed": True,
}
FLUX = Shape(
    "Flux.1 dev",
    "comfy.ldm.flux.model.Flux",
    {
        **_FLUX,
        "depth": 19,
        "depth_single_blocks": 38,
        "theta": 10000,
        "patch_size": 2,
        "txt_ids_dims": [],
    },
    ("depth", "depth_single_blocks"),
    _flux_sizes,
    IMAGE_LENGTHS,
    image=True,
)

HUNYUAN = Shape(
    "HunyuanVideo",
    "comfy.ldm.hunyuan_video.model.HunyuanVideo",
    {
        **_FLUX,
        "depth": 20,
        "depth_single_blocks": 40,
        "theta": 256,
        "patch_size": [1, 2, 2],
        "byt5": False,
        "meanflow": False,
        "use_cond_type_embedding": False,
        "vision_in_dim": None,
        "meanflow_sum": False,
    },
    ("depth", "depth_single_blocks"),
    _flux_sizes,
    VIDEO_LENGTHS,
    text=256,
    timestep=500.0,
)

QWEN = Shape(
    "Qwen-Image",
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
    {
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": 60,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
    },
    ("num_layers",),
    _qwen_sizes,
    IMAGE_LENGTHS,
    text=256,
    image=True,
)

SHAPES = {"wan": WAN, "flux": FLUX, "qwen": QWEN, "hunyuan": HUNYUAN}


def _small(shape: Shape, layers: int, frames: int, text: int, **arguments: object) -> Shape:
    """``shape`` for simulated devices: narrow, with few blocks and short sequences.

    Computing the blocks takes half as long as moving them, as long, and twice as long: longer
    sequences compute longer.
    """
    lengths = tuple(
        Length(f"compute : transfer {ratio:g}", frames, 16, width, ratio)
        for ratio, width in ((0.5, 12), (1.0, 16), (2.0, 20))
    )
    narrow = replace(shape, arguments={**shape.arguments, **arguments}, lengths=lengths, text=text)
    return narrow.with_layers(layers)


# Two heads, as what crosses the link along with the commands, for free, is no whole weight then.
_NARROW = {"hidden_size": 256, "num_heads": 2, "context_in_dim": 256, "vec_in_dim": 64}
SMALL = {
    "wan": _small(WAN, 8, 4, 64, dim=256, ffn_dim=512, num_heads=2, text_len=64),
    "flux": _small(FLUX, 12, 1, 8, **_NARROW),
    "qwen": _small(QWEN, 6, 1, 8, num_attention_heads=2, joint_attention_dim=256),
    "hunyuan": _small(HUNYUAN, 12, 1, 8, **_NARROW),
}


def shapes_at(names: Sequence[str], simulated: bool) -> list[Shape]:
    """The shapes called ``names``, as they are measured on a real or on a simulated device."""
    return [(SMALL if simulated else SHAPES)[name] for name in names]
