"""How long a forward pass of a split takes: the order of copies and computation, in numbers.

Pure arithmetic over a ``Split``: ``predict`` follows the rules of ``swap_executor``, ``improve``
exchanges slots for resident blocks where that pays, ``cheapest_quota`` says how little memory costs
no time. Nothing is measured or moved here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .allocation_parser import GIB, MIB, Allocation, Entry, Mode
from .pass_schedule import ASSUMED_BANDWIDTH, Timing, assumed_timing, predict, transfer_seconds
from .split import Split
from .split_planner import donor_with_room, plan_split

# As a share of a pass: less is not worth moving a block for, more is not free.
WORTH = 0.02
FREE = 0.02


def transfer_line(split: Split) -> str:
    """For the table, before any pass was timed: how long the copies of a pass take."""
    seconds = transfer_seconds(split, assumed_timing(split.sizes))
    return f"  that takes {seconds:.3g} s at {ASSUMED_BANDWIDTH / 1e9:.0f} GB/s (assumed)"


def improve(split: Split, timing: Timing) -> Split:
    """The split with slots and resident blocks exchanged, one at a time, while that saves time.

    No device holds more than before, but donors within their quotas. The same split where nothing
    is saved.
    """
    best, seconds = split, predict(split, timing)
    while True:
        candidates = [(predict(other, timing), other) for other in _exchanges(best)]
        faster, other = min(candidates, key=lambda c: c[0], default=(seconds, best))
        if not faster < (1 - WORTH) * seconds:  # nor where a time is no number
            return best
        best, seconds = other, faster


def _exchanges(split: Split) -> Iterator[Split]:
    """Splits with one slot less and one resident block more, and the reverse."""
    least = split.sizes.min_slots
    blocks = range(len(split.sizes.blocks))
    compute = split.compute_device
    if split.slots > least:
        for index in blocks:
            if split.homes[index] != compute:
                yield from _within(split, index, compute, split.slots - 1)
    if 0 < split.slots < least + 2:
        for index in blocks:
            if split.homes[index] == compute:
                donor = donor_with_room(split, split.sizes.blocks[index].nbytes)
                if donor is not None:
                    yield from _within(split, index, donor, split.slots + 1)


def _within(split: Split, index: int, home: str, slots: int) -> Iterator[Split]:
    homes = (*split.homes[:index], home, *split.homes[index + 1 :])
    other = replace(split, homes=homes, slots=slots)
    if other.swapped and other.compute_bytes <= split.compute_bytes:
        yield other


def cheapest_quota(split: Split, timing: Timing) -> Split | None:
    """The split of the same model with the least on the compute device that costs no time.

    Everything that is swapped lives on the first donor. ``None`` where the CPU computes.
    """
    donor = next((d for d in split.devices() if d != split.compute_device), None)
    if donor is None:
        return None
    block = max(part.nbytes for part in split.sizes.blocks)
    for number in range(1, len(split.sizes.blocks) + 1):
        quota = split.sizes.total_bytes - (len(split.sizes.blocks) - number) * block
        entries = (Entry(split.compute_device, quota), Entry(donor, None, wildcard=True))
        text = f"{split.compute_device},{quota}b;{donor},*"
        allocation = Allocation(text, split.compute_device, Mode.BYTES, entries)
        other = plan_split(allocation, split.sizes, {})
        if predict(other, timing) <= (1 + FREE) * timing.resident:
            return other
    return other


def report(split: Split, timing: Timing, cheapest: Split | None) -> str:
    """One line about a timed pass: what it costs, and what would cost nothing (``cheapest``)."""
    seconds = predict(split, timing)
    links = ", ".join(
        f"{donor} {bandwidth / 1e9:.1f} GB/s" for donor, bandwidth in timing.bandwidth.items()
    )
    line = (
        f"a pass takes {seconds:.3g} s, {seconds / timing.resident:.2f} times that with everything "
        f"resident"
    )
    if links:
        line += f" ({links})"
    if cheapest is not None:
        quota = f"{split.compute_device},{as_amount(cheapest.compute_bytes)}"
        line += f"; a quota of {quota} would cost no time"
    return line


def as_amount_within(nbytes: int) -> str:
    """The largest amount of an allocation string that ``nbytes`` hold, with three figures or so."""
    if nbytes < GIB:
        return f"{nbytes // MIB}mb"
    hundredths = nbytes * 100 // GIB
    return f"{hundredths // 100}.{hundredths % 100:02}gb"


def as_amount(nbytes: int) -> str:
    """The least amount of an allocation string that holds ``nbytes``, with three figures or so."""
    if nbytes < GIB:
        return f"{-(-nbytes // MIB)}mb"
    hundredths = -(-nbytes * 100 // GIB)
    return f"{hundredths // 100}.{hundredths % 100:02}gb"
