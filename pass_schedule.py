"""How long a forward pass of a split takes: the order of copies and computation, in numbers.

Pure arithmetic over a ``Split``, by the rules of ``swap_executor``. Nothing is measured or moved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .split import ModelSizes, Split

# Passes until the schedule repeats; the order of copies goes on from one pass to the next.
WARM_UP = 4
MEASURED = 2

# A link that nobody has timed yet: PCIe 4.0 with eight lanes, in bytes per second.
ASSUMED_BANDWIDTH = 12e9


@dataclass(frozen=True)
class Timing:
    """What a timed forward pass has shown, in seconds; waiting for copies is counted nowhere.

    ``compute`` is what the blocks take, ``before`` and ``after`` what the forward does before the
    first and behind the last of them, ``between`` the pause until the next pass begins.
    ``bandwidth`` is that of the link from each donor, in bytes a second. ``shares`` are those of
    the blocks in ``compute``, in their order and in any unit; ``None``: as their bytes are.
    """

    compute: float
    bandwidth: Mapping[str, float]
    before: float = 0.0
    after: float = 0.0
    between: float = 0.0
    shares: tuple[float, ...] | None = None

    @property
    def resident(self) -> float:
        """Seconds of a pass with everything resident."""
        return self.before + self.compute + self.after

    def transfer(self, donor: str, nbytes: int) -> float:
        """Seconds that ``nbytes`` from ``donor`` are under way."""
        return nbytes / self.bandwidth.get(donor, ASSUMED_BANDWIDTH)

    def block_seconds(self, sizes: ModelSizes) -> list[float]:
        """Seconds that each block computes; what never runs takes none."""
        shares = self.shares or tuple(block.nbytes for block in sizes.blocks)
        shares = [0 if i in sizes.idle else share for i, share in enumerate(shares)]
        whole = sum(shares)
        if not whole:
            return [self.compute / len(shares)] * len(shares)
        return [self.compute / (whole / share) if share else 0.0 for share in shares]


def assumed_timing(sizes: ModelSizes, ratio: float) -> Timing:
    """Before any pass was timed: a block computes for ``ratio`` of the time that it is copied."""
    running = sum(block.nbytes for i, block in enumerate(sizes.blocks) if i not in sizes.idle)
    return Timing(ratio * running / ASSUMED_BANDWIDTH, {})


def transfer_seconds(split: Split, timing: Timing) -> float:
    """Seconds that the link which moves longest is busy in a pass."""
    moved = split.moved_from()
    return max((timing.transfer(donor, nbytes) for donor, nbytes in moved.items()), default=0.0)


def predict(split: Split, timing: Timing) -> float:
    """Seconds of a forward pass in the steady state, the pause between passes not counted.

    Blocks compute for their shares of ``timing.compute``, swapped embeddings for equal shares of
    ``timing.before``. Copies of one link queue up behind each other; each waits until its slot is
    free, each block for its copy.
    """
    sizes = split.sizes
    if not split.bytes_per_pass:
        return timing.resident
    uses, rest = _uses(split, timing)
    link_free = dict.fromkeys((home for _, home, _, _ in uses), 0.0)
    # In the order in which they are taken. What the forward holds beside the block that its loop is
    # at keeps a slot each.
    slot_free = deque([0.0] * max(1, split.slots - sizes.min_slots + 1))
    now, passes, state = 0.0, [], None
    for _ in range(WARM_UP + MEASURED):
        start = now
        for lead, home, transfer, seconds in uses:
            now += lead
            arrival = max(link_free[home], slot_free.popleft()) + transfer
            link_free[home] = arrival
            if arrival > now:
                now = arrival
            now += seconds
            slot_free.append(now)
        now += rest
        passes.append(now - start)
        now += timing.between
        before, state = state, [now - t for t in (*link_free.values(), *slot_free)]
        if before is not None and _same(before, state, now):
            return passes[-1]
    return sum(passes[-MEASURED:]) / MEASURED


def _uses(split: Split, timing: Timing) -> tuple[list[tuple[float, str, float, float]], float]:
    """What a pass does with slots, in order, and what it computes behind the last of them.

    Of each: seconds of computing before it, the link, seconds of the copy and of computing in it.
    """
    sizes, swapped = split.sizes, split.running
    first = len(sizes.blocks)
    leading = [i for i in swapped if i >= first]
    lead = 0.0 if leading else timing.before
    uses = []
    for index, seconds in _computing(leading, timing, sizes):
        if split.homes[index] == split.compute_device or index in sizes.idle:
            lead += seconds
            continue
        home, nbytes = split.homes[index], sizes.parts[index].nbytes
        uses.append((lead, home, timing.transfer(home, nbytes), seconds))
        lead = 0.0
    return uses, lead + timing.after


def _computing(
    leading: list[int], timing: Timing, sizes: ModelSizes
) -> Iterator[tuple[int, float]]:
    for index in leading:
        yield index, timing.before / len(leading)
    yield from enumerate(timing.block_seconds(sizes))


def _same(before: list[float], now: list[float], scale: float) -> bool:
    """Whether the schedule repeats from here on."""
    return all(abs(a - b) <= 1e-9 * scale for a, b in zip(before, now, strict=True))
