"""Which passes are timed, whose peak of memory is taken, and who is told.

The first pass of a shape of inputs shows what memory it takes, and warms up what it runs through;
the second one is timed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from . import device_utils
from .device_utils import stream_module
from .pass_timing import PassTime, PassTimer

logger = logging.getLogger("MultiGPU")


class PassWatch:
    """Watches the passes on one device; never the reason that one fails."""

    def __init__(self, device: torch.device):
        self._device = device
        self._on_pass_time: Callable[[PassTime], None] | None = None
        self._on_peak: Callable[..., None] | None = None
        self._to_come: dict[object, int] = {}  # passes until one is timed, by shape of inputs
        self._peaks: set = set()  # shapes whose peak is known
        self._timer: PassTimer | None = None
        self._earlier = None  # the mark that ended the last pass
        self._shape: object = None  # of the pass that runs

    def time_passes(self, on_pass_time: Callable[[PassTime], None] | None) -> None:
        """Call ``on_pass_time`` with what the second pass took, once for every shape of inputs.

        It is called between passes, and may move packs.
        """
        self._on_pass_time = on_pass_time
        self._to_come.clear()
        self._timer = self._earlier = None

    def time_again(self, shape: object) -> None:
        """Time the next pass but one of ``shape`` as well."""
        self._to_come[shape] = 2

    def take_peaks(self, on_peak: Callable[..., None]) -> None:
        """Call ``on_peak(shape, nbytes, failed=...)`` for the first pass of a shape of inputs.

        ``nbytes`` is the most that was allocated on the device while it ran; where it ``failed``,
        it would have taken that much at least.
        """
        self._on_peak = on_peak
        self._peaks.clear()

    def before_pass(self) -> None:
        """Tell what the timed pass took, once that is over on the device too."""
        timer, self._timer = self._timer, None
        if timer is None:
            return
        with self._never_fails():
            result = timer.result()
            if result is None:
                self._timer = timer
            else:
                self._to_come[timer.shape] = 0
                self._on_pass_time(result)

    def begin(self, shape: object) -> None:
        """A pass with inputs of ``shape`` begins; with ``None`` one that is not watched."""
        self._shape = shape
        if self._on_peak is not None:
            device_utils.reset_peak_memory(self._device)
        if self._on_pass_time is None or shape is None or stream_module(self._device) is None:
            return
        to_come = self._to_come.setdefault(shape, 2)
        if to_come == 2:
            self._to_come[shape] = 1
        elif to_come == 1 and self._timer is None:  # due until it was told of
            with self._never_fails():
                self._timer = PassTimer(self._device, shape, self._earlier)

    def restart(self) -> None:
        """What the pass did so far is done again: it has no time, and its peak begins anew."""
        self._timer = None
        self._peaks.discard(self._shape)  # it takes more than was known
        device_utils.reset_peak_memory(self._device)

    def end(self, completed: bool) -> None:
        """The pass is over; what it took counts if it was completed."""
        self._earlier = None
        if self.timer is not None:
            if completed:
                self._timer.stop()
            else:
                self._timer = None
        module = stream_module(self._device)
        if completed and self._on_pass_time is not None and module is not None:
            with self._never_fails():
                self._earlier = module.Event(enable_timing=True)
                self._earlier.record(module.current_stream(self._device))

    def report_peak(self, completed: bool) -> None:
        """Tell the peak of the pass that is over, if it is the first of its shape."""
        if completed and self._shape not in self._peaks:
            self._tell_peak(0, failed=False)

    def report_missing(self, nbytes: int) -> None:
        """The pass fails for want of ``nbytes``: its peak is that much higher, at least."""
        self._peaks.discard(self._shape)
        self._tell_peak(nbytes, failed=True)

    def _tell_peak(self, more: int, failed: bool) -> None:
        peak = device_utils.peak_memory(self._device)
        if self._on_peak is None or peak is None or self._shape is None or len(self._shape) < 2:
            return
        if not more:
            self._peaks.add(self._shape)
        try:
            self._on_peak(self._shape, peak + more, failed=failed)
        except Exception as error:  # nothing that is learnt is worth a run
            logger.warning(f"[MultiGPU] block swap: memory is not learnt any more: {error!r}")
            self._on_peak = None

    @property
    def timer(self) -> PassTimer | None:
        """The timer of the pass that runs, if it is timed."""
        return self._timer if self._timer is not None and self._timer.running else None

    def wait(self) -> AbstractContextManager:
        """Around what makes the computation wait."""
        return nullcontext() if self.timer is None else self.timer.wait()

    def drop_timer(self) -> None:
        """The pass that was timed is not what it was planned to be any more."""
        self._timer = None

    @contextmanager
    def _never_fails(self) -> Iterator[None]:
        """Inside, an error ends the timing and never the run: not every backend can be timed."""
        try:
            yield
        except Exception as error:
            logger.warning(f"[MultiGPU] block swap: passes are not timed any more: {error!r}")
            self.time_passes(None)
