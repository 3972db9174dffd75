"""Stand-in for torchvision.ops: importable, not usable."""

from _standin import missing_attributes

__getattr__ = missing_attributes(__name__)
