"""Stand-in for torchvision.transforms: importable; usable for `functional.resize` alone."""

import enum

from _standin import missing_attributes

from . import functional as functional

__getattr__ = missing_attributes(__name__)


class InterpolationMode(str, enum.Enum):
    """Ways to resize; a `str`, as in torchvision."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
