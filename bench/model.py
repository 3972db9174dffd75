"""Random weights for a model under measurement, and the models that use them.

``Weights`` holds one copy of the weights in RAM; every way gets a model of its own whose tensors
are views of it, so that loading starts from weights in RAM and never reads a file.
"""

from __future__ import annotations

import types

import torch
from shapes import Shape

from block_swap.model_blocks import parts_of

POOL = 1 << 24  # values of noise, of which every weight is a stretch
FORMATS = ("bf16", "q8_0", "q4_0")
CODE_SPREAD = {"q8_0": 74.0, "q4_0": 4.6}  # standard deviation of ggml's codes, if all are likely


class Weights:
    """The weights of a model of ``shape`` in one format, and the models that use them.

    ``operations`` are ComfyUI's for bf16, ComfyUI-GGUF's for the others: its package in ``gguf``.
    """

    def __init__(self, shape: Shape, form: str, gguf: types.ModuleType | None = None):
        import comfy.ops

        self.shape, self.form = shape, form
        self.operations = gguf.ops.GGMLOps if gguf else comfy.ops.disable_weight_init
        self._gguf = gguf
        generator = torch.Generator().manual_seed(0)
        self._noise = torch.randn(POOL, generator=generator).bfloat16()
        self._codes = torch.randint(256, (POOL,), dtype=torch.uint8, generator=generator)
        self._used = 0
        empty = shape.build(comfy.ops.disable_weight_init)
        self._blocks = tuple(f"{part.name}." for part in parts_of(empty).blocks)
        self._state = {name: self._weight(name, to) for name, to in empty.state_dict().items()}
        del self._noise, self._codes

    def _weight(self, name: str, empty: torch.Tensor) -> torch.Tensor:
        linear = name.startswith(self._blocks) and name.endswith(".weight") and empty.ndim == 2
        if self._gguf and linear:
            return self._quantised(tuple(empty.shape))
        weight = self._stretch(self._noise, tuple(empty.shape))
        if name.endswith(".modulation"):
            weight *= 0.3
        elif name.endswith(".bias"):
            weight *= 0.02
        elif empty.ndim == 1:  # the gain of a norm
            weight = 1 + weight * 0.02
        else:
            weight *= weight[0].numel() ** -0.5
        return weight.to(empty.dtype)

    def _stretch(self, pool: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """A copy of a stretch of ``pool``, from another place on for every weight."""
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
        model = self.shape.build(self.operations)
        model.load_state_dict(self._state, assign=True)
        return model.eval().requires_grad_(False)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.nbytes for tensor in self._state.values())
