"""Stand-in for torchaudio: importable, not usable."""

from _standin import missing_attributes

__getattr__ = missing_attributes(__name__)
