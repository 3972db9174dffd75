"""Weights as they lie in a GGUF file, and what they mean."""

import logging
import warnings

import gguf
import torch
from gguf import GGMLQuantizationType as Kind

PLAIN = (None, Kind.F32, Kind.F16)


class GGMLTensor(torch.Tensor):
    """The bytes of one weight, whose `shape` is that of the weight they stand for.

    `tensor_type` and `tensor_shape` describe that weight; `patches` are applied to it whenever it
    is dequantised. What an operation makes of such a tensor has the class but not the attributes.
    """

    def __new__(cls, data, *, tensor_type, tensor_shape, patches=()):
        return data.as_subclass(cls)

    def __init__(self, data, *, tensor_type, tensor_shape, patches=()):
        super().__init__()
        self._describe(tensor_type, tensor_shape, patches)

    def _describe(self, tensor_type, tensor_shape, patches):
        self.tensor_type, self.tensor_shape = tensor_type, tensor_shape
        self.patches = list(patches)

    @property
    def shape(self):
        if not hasattr(self, "tensor_shape"):
            self.tensor_shape = self.size()
        return self.tensor_shape

    def to(self, *args, **kwargs):
        moved = super().to(*args, **kwargs)
        moved._describe(getattr(self, "tensor_type", None), self.shape, self._patches())
        return moved

    def new_empty(self, size, *args, **kwargs):
        empty = super().new_empty(size, *args, **kwargs)
        empty._describe(getattr(self, "tensor_type", None), size, self._patches())
        return empty

    def clone(self, *_args, **_kwargs):
        return self

    def detach(self, *_args, **_kwargs):
        return self

    def copy_(self, *args, **kwargs):
        try:
            return super().copy_(*args, **kwargs)
        except Exception as error:
            logging.warning(f"GGUF: a weight is not copied: {error}")
            return None

    def _patches(self):
        return getattr(self, "patches", [])


def is_quantized(tensor) -> bool:
    """Say whether `tensor` (or None) has to be dequantised before it can be computed with."""
    return getattr(tensor, "tensor_type", None) not in PLAIN


def dequantize(tensor: GGMLTensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight that `tensor` stands for, as a plain tensor on the same device.

    A block of 32 values is a float16 factor and then 32 signed bytes (Q8_0), or 16 bytes (Q4_0)
    whose low halves are its first 16 values and whose high halves the others, each less 8.
    """
    data = tensor.as_subclass(torch.Tensor)
    if not is_quantized(tensor):
        return data.to(dtype)
    length, nbytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    blocks = data.reshape(-1, nbytes)
    factor, values = blocks[:, :2].contiguous().view(torch.float16), blocks[:, 2:].contiguous()
    if tensor.tensor_type == Kind.Q8_0:
        values = values.view(torch.int8)
    elif tensor.tensor_type == Kind.Q4_0:
        values = torch.cat([values & 15, values >> 4], dim=1).view(torch.int8) - 8
    else:
        raise NotImplementedError(f"this double does not know {tensor.tensor_type.name}")
    assert values.shape[1] == length
    return (factor * values).reshape(tensor.tensor_shape).to(dtype)


def read(path: str) -> dict[str, GGMLTensor]:
    """Return the weights of the file at `path` by name; their memory is the mapped file's.

    The largest quantised one is marked with `is_largest_weight`.
    """
    weights = {}
    for entry in gguf.GGUFReader(path).tensors:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            data = torch.from_numpy(entry.data)
        shape = torch.Size(int(length) for length in reversed(entry.shape))
        if entry.tensor_type in PLAIN:
            data = data.view(shape)
        kind = {"tensor_type": entry.tensor_type, "tensor_shape": shape}
        weights[entry.name] = GGMLTensor(data, **kind)
    quantized = [weight for weight in weights.values() if is_quantized(weight)]
    if quantized:
        max(quantized, key=torch.Tensor.numel).is_largest_weight = True
    return weights
