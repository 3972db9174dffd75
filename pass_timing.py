"""Timing of a pass on the device: events around it, its waits and its copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .device_utils import stream_module


@dataclass(frozen=True)
class PassTime:
    """What a timed pass took, in seconds.

    ``total`` from its first to its last computation, ``waiting`` of that for copies to arrive;
    ``copies`` are the donors, bytes and seconds of the copies that were queued in it.
    """

    total: float
    waiting: float
    copies: tuple[tuple[torch.device, int, float], ...]


class PassTimer:
    """Events around a pass, its waits and its copies; the host waits for none of them."""

    def __init__(self, device: torch.device):
        self._module = stream_module(device)
        self._device = device
        self._waits: list[tuple] = []
        self._copies: list[tuple] = []
        self._start = self._mark()
        self._end = None

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

        return PassTime(
            seconds(self._start, self._end),
            sum(seconds(*wait) for wait in self._waits),
            tuple((donor, n, seconds(before, after)) for donor, n, before, after in copies),
        )
