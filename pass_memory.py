"""What passes need of the compute device beside the weights: estimated, and learnt. Pure.

ComfyUI estimates it from the shape of the latent, with a factor per model that can be off by a
multiple. The allocator's peak in the first pass of a shape is exact; it is kept as long as the
process lives, by class of model, type of number and shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .split import format_bytes

# Pixels and frames of one latent position, where a model does not say.
SPATIAL = 8
TEMPORAL = 4

# What is learnt is asked for with this much more: allocators round, and fragment.
SLACK = 0.03

# What a pass that failed would have needed: it shows no more than where it stopped.
BEYOND = 1.5


@dataclass(frozen=True)
class PassKind:
    """Passes that need the same memory: of one class of model, in one dtype, on one latent.

    ``latent`` is the shape without its channels, [batch, (frames,) height, width]: models get
    further channels from conditioning.
    """

    model: str
    dtype: str
    latent: tuple[int, ...]

    @classmethod
    def of(cls, model: str, dtype: object, shape: Sequence[int]) -> PassKind:
        """The kind of a pass over a latent of ``shape``, [batch, channels, ...]."""
        return cls(model, str(dtype), (int(shape[0]), *(int(n) for n in shape[2:])))

    def batched(self, batch: int) -> PassKind:
        """The same with another number of latents at once."""
        return PassKind(self.model, self.dtype, (batch, *self.latent[1:]))

    def describe(self, spatial: int = SPATIAL, temporal: int = TEMPORAL) -> str:
        """The latent as a user knows it: ``81 frames at 832x480``, ``1024x1024``."""
        *_, height, width = self.latent if len(self.latent) > 2 else (1, *self.latent)
        size = f"{width * spatial}x{height * spatial}"
        if len(self.latent) == 4:
            frames = (self.latent[1] - 1) * temporal + 1
            size = f"{frames} frames at {size}"
        elif len(self.latent) < 3:
            size = f"a latent of {'x'.join(map(str, self.latent))}"
        return size


class PassMemory:
    """What was learnt of the memory that passes need, in bytes."""

    def __init__(self) -> None:
        self._peaks: dict[PassKind, int] = {}
        self._failed: dict[PassKind, float] = {}
        self._least: dict[PassKind, int] = {}

    def learn(self, kind: PassKind, nbytes: int, least: int = 0) -> None:
        """A pass has needed ``nbytes`` beside the weights; the most of all counts.

        With less than ``least`` to have it has failed, whatever the allocator counts: what is free
        in pieces fits nothing.
        """
        self._peaks[kind] = max(nbytes, self._peaks.get(kind, 0))
        self._least[kind] = max(least, self._least.get(kind, 0))
        self._failed.pop(kind, None)

    def fail(self, kind: PassKind, nbytes: int, least: int = 0) -> None:
        """A pass has failed that needed ``nbytes`` at least: more is kept until one runs."""
        self._failed[kind] = BEYOND * max(nbytes, self._failed.get(kind, 0))
        self._least[kind] = max(least, self._least.get(kind, 0))

    def knows(self, kind: PassKind) -> bool:
        """Whether a pass of this kind, in a batch of any size, was seen."""
        return any(known.batched(0) == kind.batched(0) for known in self._seen())

    def _seen(self) -> dict[PassKind, float]:
        """What passes need that were seen: where one has failed since, what that has shown."""
        seen = {kind: nbytes * (1 + SLACK) for kind, nbytes in self._peaks.items()}
        seen |= {k: max(nbytes, self._peaks.get(k, 0)) for k, nbytes in self._failed.items()}
        return {kind: max(nbytes, self._least[kind]) for kind, nbytes in seen.items()}

    def need(self, kind: PassKind, estimate: float) -> float:
        """Bytes that a pass needs; ``estimate`` where nothing is known.

        A batch of another size needs in proportion.
        """
        seen = self._seen()
        if kind in seen:
            return seen[kind]
        others = [
            nbytes * kind.latent[0] / known.latent[0]
            for known, nbytes in seen.items()
            if known.batched(0) == kind.batched(0)
        ]
        return max(others, default=estimate)


@dataclass(frozen=True)
class Room:
    """What a device has for weights, in bytes, and why.

    ``free`` is what is free there with no weights of this model, ``need`` what a pass needs beside
    them, for ``what``: a ``latent`` of that shape, without batch and channels.
    """

    free: float
    need: float
    what: str = ""
    latent: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes for weights; none where a pass needs more than there is."""
        return int(max(0.0, min(self.free - self.need, 1e18)))

    def __str__(self) -> str:
        if not math.isfinite(self.free) or self.free > 1e18:
            return "everything, as ComfyUI was told"
        free, need = format_bytes(int(self.free)), format_bytes(int(max(0, self.need)))
        what = f"{self.what}" if self.what else "passes"
        return f"{format_bytes(self.nbytes)}: {free} free, {need} for {what}"
