"""Wan models and LoRAs of real size for tests of memory: all zeros, so that files have no content.

A file is one hole behind its header: written at once, empty on the disk. Read through a mapping, it
takes pages in RAM like any other.
"""

import json
import math
import os
from pathlib import Path

from .tiny_wan import Shapes, _model_shapes

BYTES = 2  # of one bf16


def write_wan(path: Path, *, layers: int, dim: int, ffn: int) -> Path:
    """Write a bf16 Wan 2.1 t2v to `path` (.safetensors), sized as in `tiny_wan`; return `path`."""
    return _write_zeros(path, _model_shapes(layers, dim, ffn, image_to_video=False))


def write_lora(path: Path, *, layers: int, dim: int, ffn: int, rank: int = 4) -> Path:
    """Write a LoRA for every linear layer in the blocks of such a model; return `path`."""
    shapes: Shapes = {}
    for name, shape in _model_shapes(layers, dim, ffn, image_to_video=False).items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
            target = f"diffusion_model.{name.removesuffix('.weight')}"
            shapes[f"{target}.lora_A.weight"] = (rank, shape[1])
            shapes[f"{target}.lora_B.weight"] = (shape[0], rank)
    return _write_zeros(path, shapes)


def _write_zeros(path: Path, shapes: Shapes) -> Path:
    """Write bf16 zeros in the format of safetensors: length of the header, header, tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * BYTES
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as safetensors aligns the tensors
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path
