"""Stand-in for torchvision: importable, and hardly usable."""

from _standin import missing_attributes

# The attribute is the module: `from torchvision import transforms` asks `__getattr__` before it
# looks for a file.
from . import transforms as transforms

__getattr__ = missing_attributes(__name__)
