"""Timing of a pass on the device: events around it, its blocks, its waits and its copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .device_utils import stream_module


@dataclass(frozen=True)
class PassTime:
    """What a timed pass took, in seconds.

    ``total`` is from its first to its last computation. Of that, the computation was ``waiting``
    for copies to arrive, ``before`` is what it did before the first block, ``after`` what it did
    behind the last one, neither with waiting; ``between`` is the time since the pass before.
    ``copies`` are the donors, bytes and seconds of the copies that were queued in it, ``each`` the
    seconds of the blocks that were called, by their indices; ``shape`` tells what passes take the
    same time.
    """

    shape: object
    total: float
    waiting: float
    before: float
    after: float
    between: float
    copies: tuple[tuple[torch.device, int, float], ...]
    each: Mapping[int, float] = field(default_factory=dict)

    @property
    def blocks(self) -> float:
        """Seconds that the blocks computed."""
        return self.total - self.waiting - self.before - self.after


class PassTimer:
    """Events around a pass and what happens in it; the host waits for none of them.

    ``earlier`` is the mark that ended the pass before, if there was one.
    """

    def __init__(self, device: torch.device, shape: object = None, earlier=None):
        self._module = stream_module(device)
        self._device = device
        self.shape = shape
        self._waits: list[tuple] = []
        self._copies: list[tuple] = []
        self._earlier = earlier
        self._start = self._mark()
        self._blocks: list[tuple] = []  # indices, with the marks before and behind
        self._end = None
        self._waits_before = 0

    def _mark(self, stream=None):
        event = self._module.Event(enable_timing=True)
        event.record(self._module.current_stream(self._device) if stream is None else stream)
        return event

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Around what makes the computation wait."""
        before = self._mark()
        yield
        self._waits.append((before, self._mark()))

    def block_begins(self, index: int) -> None:
        """A block may compute; what it waited for has been waited for."""
        if not self._blocks:
            self._waits_before = len(self._waits)
        self._blocks.append((index, self._mark(), None))

    def block_ends(self, index: int) -> None:
        """The computation of a block is queued."""
        for position in reversed(range(len(self._blocks))):
            begun, before, after = self._blocks[position]
            if begun == index and after is None:
                self._blocks[position] = (index, before, self._mark())
                return

    @contextmanager
    def copy(self, donor: torch.device, nbytes: int, stream) -> Iterator[None]:
        """Around what is queued on the copy stream for one block."""
        before = self._mark(stream)
        yield
        self._copies.append((donor, nbytes, before, self._mark(stream)))

    @property
    def running(self) -> bool:
        return self._end is None

    def stop(self) -> None:
        """The pass is complete."""
        self._end = self._mark()

    def result(self) -> PassTime | None:
        """What it took; ``None`` while that is not over on the device."""
        copies = tuple(self._copies)  # a worker may still add to them
        events = [self._end, *(after for *_, after in copies)]
        if not all(event.query() for event in events):
            return None

        def seconds(before, after) -> float:
            return before.elapsed_time(after) / 1000

        waits = [seconds(*wait) for wait in self._waits]
        blocks = [block for block in self._blocks if block[2] is not None]
        first = blocks[0][1] if blocks else self._end
        last = blocks[-1][2] if blocks else self._end
        each: dict[int, float] = {}
        for index, before, after in blocks:
            each[index] = each.get(index, 0.0) + seconds(before, after)
        return PassTime(
            shape=self.shape,
            total=seconds(self._start, self._end),
            waiting=sum(waits),
            before=seconds(self._start, first) - sum(waits[: self._waits_before]),
            after=seconds(last, self._end),
            between=0.0 if self._earlier is None else seconds(self._earlier, self._start),
            copies=tuple((donor, n, seconds(before, after)) for donor, n, before, after in copies),
            each=each,
        )
