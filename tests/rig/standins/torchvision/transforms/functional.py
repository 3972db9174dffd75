"""Stand-in for torchvision.transforms.functional: importable; of its functions, only `resize`."""

import torch
from _standin import missing_attributes

__getattr__ = missing_attributes(__name__)


def resize(img: torch.Tensor, size: list[int], interpolation) -> torch.Tensor:
    """`img`, [..., height, width], by nearest neighbours: what Cosmos does with a mask."""
    if interpolation != "nearest":
        raise NotImplementedError(f"the stand-in for torchvision cannot resize by {interpolation}")
    return torch.nn.functional.interpolate(img, size, mode="nearest")
