"""Every Wan diffusion model class of a ComfyUI: found, built small, and given inputs.

`find` reads the sources, so that a class that ComfyUI adds is noticed before anything is booted.
`CASES` says how each class is built with few and narrow layers and what its forward takes; shapes
follow `comfy/ldm/wan/` and the `extra_conds` of `comfy/model_base.py`.
"""

import ast
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PACKAGE = "comfy.ldm.wan"
DIM, FFN, HEADS, TEXT = 256, 512, 2, 64
FRAMES, HEIGHT, WIDTH = 2, 8, 8


def find(source: Path) -> list[str]:
    """The classes under `comfy.ldm.wan` that make themselves a `ModuleList` named `blocks`.

    Classes count that inherit it, too. Returns "module.Class", modules relative to the package.
    """
    makes_blocks: set[str] = set()
    found = []
    definitions = [
        (path.stem, node)
        for path in sorted((source / PACKAGE.replace(".", "/")).glob("**/*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    while True:
        new = [
            (module, node)
            for module, node in definitions
            if node.name not in makes_blocks
            and (
                _assigns_blocks(node)
                or any(ast.unparse(base).split(".")[-1] in makes_blocks for base in node.bases)
            )
        ]
        if not new:
            return found
        makes_blocks |= {node.name for _, node in new}
        found += [f"{module}.{node.name}" for module, node in new]


def _assigns_blocks(node: ast.ClassDef) -> bool:
    return any(
        isinstance(item, ast.Assign)
        and ast.unparse(item.targets[0]) == "self.blocks"
        and "ModuleList" in ast.unparse(item.value)
        for item in ast.walk(node)
    )


def load(name: str) -> type:
    """The class that `find` named; the host must be booted."""
    module, _, class_name = name.rpartition(".")
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), class_name)


Inputs = Callable[[torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One way to build and call a class.

    `arguments` go to its constructor, `inputs` makes the arguments of one call, `shrink` replaces
    what the constructor would make too large, `call` is what one call is, and `uses` is how often
    it uses each block.
    """

    inputs: Inputs
    arguments: Mapping[str, Any] = field(default_factory=dict)
    shrink: Callable[[torch.nn.Module, Any], None] | None = None
    call: Callable[[torch.nn.Module, dict], torch.Tensor] = lambda model, inputs: model(**inputs)
    uses: int = 1


def build(cls: type, case: Case, seed: int = 0, layers: int = 6) -> torch.nn.Module:
    """A small model of the class on the CPU, fp32, with random weights."""
    import comfy.ops

    operations = comfy.ops.disable_weight_init
    arguments = {
        "dim": DIM,
        "ffn_dim": FFN,
        "num_heads": HEADS,
        "num_layers": layers,
        "text_dim": TEXT,
        "dtype": torch.float32,
        "device": "cpu",
        "operations": operations,
        **case.arguments,
    }
    model = cls(**arguments)
    if case.shrink is not None:
        case.shrink(model, operations)
    randomise(model, seed)
    return model.eval().requires_grad_(False)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Random weights that keep activations near 1 and let every block show in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("modulation"):
                noise = noise * 0.3
            elif name.endswith("bias"):
                noise = noise * 0.02
            elif parameter.numel() == parameter.shape[-1]:  # the gain of a norm
                noise = 1 + noise * 0.02
            else:
                noise = noise * noise[0].numel() ** -0.5
            parameter.copy_(noise)


def at(value, device):
    """`value`, an argument of a forward, with every tensor in it on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: at(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [at(item, device) for item in value]
    return value


def latent(generator, channels=16, frames=FRAMES, height=HEIGHT, width=WIDTH):
    return torch.randn((1, channels, frames, height, width), generator=generator)


def inputs(channels: int = 16, **further: Callable[[torch.Generator], Any]) -> Inputs:
    """The arguments that every Wan takes, and those of one class, each from a generator."""

    def make(generator):
        return {
            "x": latent(generator, channels),
            "timestep": torch.rand((1,), generator=generator) * 1000,
            "context": torch.randn((1, 7, TEXT), generator=generator),
            **{name: of(generator) for name, of in further.items()},
            "transformer_options": {},
        }

    return make


def _clip(generator, tokens=9):
    return torch.randn((1, tokens, 1280), generator=generator)


def _noise(*shape):
    return lambda generator: torch.randn(shape, generator=generator)


def _shrink_humo(model, operations):
    # Its audio projection has 40 million weights, whatever the model's width.
    model.audio_proj = type(model.audio_proj)(
        seq_len=2, blocks=2, channels=8, intermediate_dim=16, operations=operations
    )


class _Motion(torch.nn.Module):
    """Stands in for the motion encoder of Animate, which takes 512 x 512 pixels."""

    def __init__(self, operations):
        super().__init__()
        self.fc = operations.Linear(3 * 8 * 8, 512)

    def get_motion(self, image):
        return self.fc(image.flatten(1))


def _shrink_animate(model, operations):
    model.motion_encoder = _Motion(operations)


def _autoregressive(model, arguments):
    """Two temporal blocks through `forward`, with caches, as the sampler of ComfyUI does it."""
    x = arguments.pop("x")
    caches = _caches(model, x)
    out = []
    for frame in range(2):
        state = {"start_frame": frame, **caches}
        options = {"ar_state": state}
        one = x[:, :, frame : frame + 1]
        out.append(model(x=one, **{**arguments, "transformer_options": options}))
    return torch.cat(out, dim=2)


def _forward_block(model, arguments):
    x = arguments["x"]
    caches = _caches(model, x)
    timestep = arguments["timestep"].unsqueeze(1)
    out = [
        model.forward_block(
            x[:, :, frame : frame + 1], timestep, arguments["context"], frame, **caches
        )
        for frame in range(2)
    ]
    return torch.cat(out, dim=2)


def _caches(model, x):
    tokens = FRAMES * HEIGHT * WIDTH // 4
    return {
        "kv_caches": model.init_kv_caches(1, tokens, x.device, x.dtype),
        "crossattn_caches": model.init_crossattn_caches(1, x.device, x.dtype),
    }


_first_last = {"model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": 18}
_audio = _noise(1, 25, 32, 4 * FRAMES)
_s2v = {"audio_dim": 32, "audio_inject_layers": [0, 2, 5]}
_scail = {"pose_latents": _noise(1, 20, FRAMES, 4, 4), "reference_latent": _noise(1, 20, 1, 8, 8)}
_masks = {
    "ref_mask_latents": _noise(1, 28, FRAMES + 1, 8, 8),
    "sam_latents": _noise(1, 28, FRAMES, 4, 4),
}
_animate = {
    "pose_latents": _noise(1, 16, 1, 8, 8),
    "face_pixel_values": _noise(1, 3, 4, 8, 8),
    "clip_fea": _clip,
}
_dancer = {"clip_fea": _clip, "clip_fea_ref": _clip, "audio_embed": _noise(1, 12, 35)}
_dancer_arguments = {"in_dim": 36, "audio_inject_layers": [0, 3]}

CASES: dict[str, dict[str, Case]] = {
    "WanModel": {
        "t2v": Case(inputs()),
        "5B": Case(inputs(48), {"in_dim": 48, "out_dim": 48}),
        "i2v": Case(inputs(36, clip_fea=_clip), {"model_type": "i2v", "in_dim": 36}),
        "first and last frame": Case(
            inputs(36, clip_fea=lambda generator: _clip(generator, 18)), _first_last
        ),
        "Fun Control": Case(
            inputs(48, clip_fea=_clip, reference_latent=_noise(1, 16, 8, 8)),
            {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16},
        ),
        "more frames at the end": Case(inputs(time_dim_concat=_noise(1, 16, 1, 8, 8))),
        "odd size": Case(lambda g: {**inputs()(g), "x": latent(g, height=7, width=5)}),
    },
    "VaceWanModel": {
        "one context": Case(
            inputs(vace_context=_noise(1, 1, 96, FRAMES, 8, 8), vace_strength=lambda _: [0.8]),
            {"vace_layers": 3, "vace_in_dim": 96},
        ),
        "two contexts": Case(
            inputs(vace_context=_noise(1, 2, 96, FRAMES, 8, 8), vace_strength=lambda _: [0.8, 0.5]),
            {"vace_layers": 3, "vace_in_dim": 96},
        ),
    },
    "CameraWanModel": {
        "camera": Case(
            inputs(32, camera_conditions=_noise(1, 24, FRAMES, 64, 64), clip_fea=_clip),
            {"in_dim": 32},
        ),
        "Wan 2.2": Case(
            inputs(32, camera_conditions=_noise(1, 24, FRAMES, 64, 64)),
            {"model_type": "camera_2.2", "in_dim": 32},
        ),
    },
    "WanModel_S2V": {
        "audio": Case(
            inputs(
                audio_embed=_audio,
                reference_latent=_noise(1, 16, 1, 8, 8),
                control_video=_noise(1, 16, FRAMES, 8, 8),
            ),
            _s2v,
        ),
        "motion": Case(
            inputs(
                audio_embed=_audio,
                reference_latent=_noise(1, 16, 1, 8, 8),
                reference_motion=_noise(1, 16, 19, 8, 8),
            ),
            _s2v,
        ),
    },
    "HumoWanModel": {
        "audio": Case(
            inputs(
                36,
                audio_embed=_noise(1, FRAMES, 2, 2, 8),
                reference_latent=_noise(1, 36, 1, 8, 8),
            ),
            {"in_dim": 36},
            shrink=_shrink_humo,
        ),
        "no audio": Case(inputs(36), {"in_dim": 36}, shrink=_shrink_humo),
    },
    "AnimateWanModel": {
        # One face adapter for every five layers.
        "pose and face": Case(
            inputs(36, **_animate), {"in_dim": 36, "num_layers": 10}, shrink=_shrink_animate
        ),
        "pose": Case(
            inputs(36, pose_latents=_animate["pose_latents"]),
            {"in_dim": 36, "num_layers": 5},
            shrink=_shrink_animate,
        ),
    },
    "SCAILWanModel": {
        "pose": Case(inputs(20, clip_fea=_clip, **_scail)),
        "nothing": Case(inputs(20)),
    },
    "SCAIL2WanModel": {
        "animation": Case(inputs(20, clip_fea=_clip, **_scail, **_masks)),
        "replacement": Case(
            inputs(20, clip_fea=_clip, ref_mask_flag=lambda _: False, **_scail, **_masks)
        ),
    },
    "CausalWanModel": {
        "forward": Case(inputs()),
        "ar_state": Case(inputs(), call=_autoregressive, uses=2),
        "forward_block": Case(inputs(), call=_forward_block, uses=2),
    },
    "WanDancerModel": {
        "30 frames a second": Case(inputs(36, **_dancer), _dancer_arguments),
        "24 frames a second": Case(inputs(36, fps=lambda _: 24, **_dancer), _dancer_arguments),
    },
}
