"""The model under measurement: a real comfy.ldm.wan.model.WanModel with random weights.

``Weights`` holds one copy of the weights in RAM; every way gets a model of its own whose tensors
are views of it, so that loading starts from weights in RAM and never reads a file.
"""

from __future__ import annotations

import importlib
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch

from rig import tiny_wan

TEXT_TOKENS = 512
POOL = 1 << 24  # values of noise, of which every weight is a stretch
FORMATS = ("bf16", "q8_0", "q4_0")
CODE_SPREAD = {"q8_0": 74.0, "q4_0": 4.6}  # standard deviation of ggml's codes, if all are likely


@dataclass(frozen=True)
class Shape:
    """Width of the model and of its feed-forward layers; a head is 128 wide."""

    dim: int
    ffn: int


WAN_14B = Shape(5120, 13824)
TINY = Shape(256, 512)


@dataclass(frozen=True)
class Length:
    """What one forward pass computes: a latent of ``frames`` x ``height`` x ``width``.

    ``ratio`` is the time of computing a block over that of moving it, for simulated devices.
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


SIZES = {"480p": (480, 832), "720p": (720, 1280)}


def length_of(name: str) -> Length:
    """The length named ``<480p|720p>-<frames of video>``: 8 pixels and 4 frames a latent value.

    Raises:
        ValueError: the name is no such one.
    """
    size, _, frames = name.partition("-")
    if size not in SIZES or not frames.isdecimal() or int(frames) % 4 != 1:
        known = ", ".join(SIZES)
        raise ValueError(f"{name}: write <{known}>-<frames>, with 1, 5, 9, ... 81 frames")
    height, width = SIZES[size]
    return Length(name, (int(frames) - 1) // 4 + 1, height // 8, width // 8)


class Weights:
    """The weights of a Wan of ``layers`` blocks in one format, and the models that use them.

    ``operations`` are ComfyUI's for bf16, ComfyUI-GGUF's for the others: its package in ``gguf``.
    """

    def __init__(self, shape: Shape, layers: int, form: str, gguf: types.ModuleType | None = None):
        import comfy.ops

        self.shape, self.layers, self.form = shape, layers, form
        self.operations = gguf.ops.GGMLOps if gguf else comfy.ops.disable_weight_init
        self._gguf = gguf
        generator = torch.Generator().manual_seed(0)
        self._noise = torch.randn(POOL, generator=generator).bfloat16()
        self._codes = torch.randint(256, (POOL,), dtype=torch.uint8, generator=generator)
        self._used = 0
        shapes = tiny_wan._model_shapes(layers, shape.dim, shape.ffn, image_to_video=False)
        self._state = {name: self._weight(name, size) for name, size in shapes.items()}
        del self._noise, self._codes

    def _weight(self, name: str, size: tuple[int, ...]) -> torch.Tensor:
        linear = name.startswith("blocks.") and name.endswith(".weight") and len(size) == 2
        if self._gguf and linear:
            return self._quantised(size)
        weight = self._random(size)
        if name.endswith(".modulation"):
            weight *= 0.3
        elif name.endswith(".bias"):
            weight *= 0.02
        elif len(size) == 1:  # the gain of a norm
            weight = 1 + weight * 0.02
        else:
            weight *= weight[0].numel() ** -0.5
        # ComfyUI keeps this layer in fp32.
        return weight.float() if name.startswith("patch_embedding") else weight

    def _random(self, size: tuple[int, ...]) -> torch.Tensor:
        """A copy of a stretch of the noise, from another place on for every weight."""
        return self._stretch(self._noise, size)

    def _stretch(self, pool: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        self._used = (self._used + 104729) % POOL
        out = torch.empty(size, dtype=pool.dtype)
        flat, done, start = out.view(-1), 0, self._used
        while done < flat.numel():
            part = min(flat.numel() - done, POOL - start)
            flat[done : done + part] = pool[start : start + part]
            done, start = done + part, 0
        return out

    def _quantised(self, size: tuple[int, int]) -> torch.Tensor:
        """A random weight as ggml stores it: groups of 32 values, an fp16 scale and their codes."""
        import gguf

        kind = getattr(gguf.GGMLQuantizationType, self.form.upper())
        group, nbytes = gguf.GGML_QUANT_SIZES[kind]
        rows, columns = size
        raw = self._stretch(self._codes, (rows, columns // group, nbytes))
        scale = torch.full((1,), columns**-0.5 / CODE_SPREAD[self.form], dtype=torch.float16)
        raw[..., :2] = scale.view(torch.uint8)
        return self._gguf.ops.GGMLTensor(
            raw.view(rows, -1), tensor_type=kind, tensor_shape=torch.Size(size)
        )

    def model(self) -> torch.nn.Module:
        """A model whose tensors are views of the weights, on the CPU."""
        from comfy.ldm.wan.model import WanModel

        model = WanModel(
            dim=self.shape.dim,
            ffn_dim=self.shape.ffn,
            num_heads=self.shape.dim // 128,
            num_layers=self.layers,
            text_len=TEXT_TOKENS,
            device="meta",
            dtype=torch.bfloat16,
            operations=self.operations,
        )
        model.load_state_dict(self._state, assign=True)
        return model.eval().requires_grad_(False)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.nbytes for tensor in self._state.values())

    def flops(self, length: Length) -> int:
        """Floating point operations of one pass: 2*m*n*k per matrix product of the blocks."""
        dim, ffn, tokens = self.shape.dim, self.shape.ffn, length.tokens
        linear = tokens * (6 * dim * dim + 2 * dim * ffn) + TEXT_TOKENS * 2 * dim * dim
        attention = tokens * (tokens + TEXT_TOKENS) * 2 * dim
        return 2 * self.layers * (linear + attention)


def inputs(length: Length, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Latent, timestep and text of one pass, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    size = (1, tiny_wan.LATENT_CHANNELS, length.frames, length.height, length.width)
    latent = torch.randn(size, generator=generator).to(device, torch.bfloat16)
    text = torch.randn(1, TEXT_TOKENS, tiny_wan.TEXT_DIM, generator=generator)
    return latent, torch.full((1,), 500.0).to(device), text.to(device, torch.bfloat16)


def import_package(name: str, folder: Path, *modules: str) -> types.ModuleType:
    """Import some modules of a custom node package in ``folder``, and not its ``__init__``."""
    if name not in sys.modules:
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(folder)]
    for module in modules:
        importlib.import_module(f"{name}.{module}")
    return sys.modules[name]
