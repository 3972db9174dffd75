"""What timed passes say about a split, and which one follows from that. Moves nothing."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from . import device_utils, step_time
from .pass_timing import PassTime
from .split import Split

logger = logging.getLogger("MultiGPU")


@dataclass(frozen=True)
class _Trial:
    """The split before an improvement, and what a pass of ``shape`` took with it, in seconds."""

    split: Split
    shape: object
    seconds: float


def timing_of(
    pass_time: PassTime, known: step_time.Timing | None, blocks: int
) -> step_time.Timing | None:
    """What a timed pass of so many blocks says; ``None`` where its times make no sense.

    A link of which nothing was copied keeps the bandwidth that is ``known``.
    """
    moved: dict[str, list[float]] = {}
    for donor, nbytes, seconds in pass_time.copies:
        sums = moved.setdefault(device_utils.name_of(donor), [0, 0.0])
        sums[0] += nbytes
        sums[1] += seconds
    bandwidth = {} if known is None else dict(known.bandwidth)
    bandwidth |= {
        donor: nbytes / seconds
        for donor, (nbytes, seconds) in moved.items()
        if 0 < seconds < math.inf
    }
    around = [max(0.0, t) for t in (pass_time.before, pass_time.after, pass_time.between)]
    if not 0 < pass_time.blocks < math.inf or not all(map(math.isfinite, around)):
        return None
    shares = tuple(max(0.0, pass_time.each.get(index, 0.0)) for index in range(blocks))
    known_shares = shares if 0 < sum(shares) < math.inf else None
    return step_time.Timing(pass_time.blocks, bandwidth, *around, shares=known_shares)


class SplitTuner:
    """Learns from timed passes, and chooses splits by what it has learnt.

    ``timing`` is what is known, ``None`` before the first timed pass; ``cheapest_bytes`` what the
    compute device has to hold at least for the pass to cost no time. An improvement is on trial
    until a pass of the same shape was timed with it, through as many loads as it takes; where that
    was not faster, or could not be tried, nothing else is tried for this split.
    """

    def __init__(self) -> None:
        self.timing: step_time.Timing | None = None
        self.cheapest_bytes: int | None = None
        self._shape: object = None  # of the pass that ``timing`` is of
        self._trial: _Trial | None = None
        self._given_up = False
        self._rejected: set[tuple[tuple[str, ...], int]] = set()  # homes, slots

    def begin(self) -> None:
        """There is another split, for other reasons: what was on trial is no more."""
        self._trial, self._given_up = None, False

    @property
    def on_trial(self) -> object:
        """The shape of the passes that decide on an improvement; ``None`` where there is none."""
        return None if self._trial is None else self._trial.shape

    @property
    def given_up(self) -> bool:
        """Whether nothing is tried any more before the next load."""
        return self._given_up

    def decide(self, pass_time: PassTime, split: Split, may_change: bool) -> Split:
        """The split to have from now on, after a pass with ``split`` was timed.

        Without ``may_change`` nothing new is tried.
        """
        trial, self._trial = self._trial, None
        if trial is not None and trial.shape == pass_time.shape:
            if pass_time.total < trial.seconds:
                return split
            self._rejected.add((split.homes, split.slots))
            self._given_up = True
            logger.info(
                f"[MultiGPU] block swap: the split is what it was: a pass took "
                f"{trial.seconds:.3g} s with it, and {pass_time.total:.3g} s with the other"
            )
            return trial.split
        if trial is not None:  # other passes come now: for them it was not made
            split = trial.split
        timing = timing_of(pass_time, self.timing, len(split.sizes.blocks))
        if timing is None:
            return split
        self.timing, self._shape = timing, pass_time.shape
        better = step_time.improve(split, timing) if may_change else split
        if better is split or (better.homes, better.slots) in self._rejected:
            return split
        self._trial = _Trial(split, pass_time.shape, pass_time.total)
        return better

    def is_worth(self, other: Split, split: Split, latent: tuple[int, ...]) -> bool:
        """Whether ``other`` may be faster than ``split`` for a pass over ``latent``.

        It may as long as no pass over that was timed. ``latent`` is without batch and channels.
        """
        if self.timing is None or not latent or tuple(self._shape or ())[2:] != latent:
            return True
        seconds = step_time.predict(split, self.timing)
        return step_time.predict(other, self.timing) < (1 - step_time.FREE) * seconds

    def give_up(self) -> None:
        """What was chosen could not be had."""
        self._trial, self._given_up = None, True

    def report(self, split: Split) -> str | None:
        """One line on what a pass costs, and what would cost no time; ``None`` if not known."""
        if self.timing is None:
            return None
        cheapest = step_time.cheapest_quota(split, self.timing)
        self.cheapest_bytes = None if cheapest is None else cheapest.compute_bytes
        return step_time.report(split, self.timing, cheapest)
