"""Which split is faster by the time of a forward pass, and how little memory costs no time.

Pure arithmetic over a ``Split`` and what ``pass_schedule`` predicts of it: ``improve`` exchanges
slots for resident blocks where that pays, ``cheapest_quota`` says how little memory costs no time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from statistics import median_low

from .allocation_parser import GIB, MIB, Allocation, Entry, Mode
from .pass_schedule import ASSUMED_BANDWIDTH, Timing, assumed_timing, predict, transfer_seconds
from .split import Split
from .split_planner import (
    donor_with_room,
    fit_split,
    most_apart,
    most_crowded,
    plan_split,
    replan_split,
    with_home,
)
from .swap_choice import first_that

# As a share of a pass: less is not worth moving a block for, more is not free.
WORTH = 0.02
FREE = 0.02

# Three slots meet the bound for blocks of one size. Parts of blocks compute for very different
# times (attention is most of a long video's), and some more slots even that out.
MOST_SLOTS = 6

# Exchanges that are tried: as many as a few milliseconds allow.
TRIED_STEPS = 2400
LEAST_TRIED = 10


def transfer_line(split: Split) -> str:
    """For the table, before any pass was timed: how long the copies of a pass take."""
    seconds = transfer_seconds(split, assumed_timing(split.sizes, 0.0))
    return f"  that takes {seconds:.3g} s at {ASSUMED_BANDWIDTH / 1e9:.0f} GB/s (assumed)"


def improve(split: Split, timing: Timing) -> Split:
    """The split with slots and resident blocks exchanged while that saves time.

    One slot at a time; where blocks differ in size, also all slots for smaller or larger ones. No
    device holds more than before, but donors within their quotas. The same split where nothing is
    saved.
    """
    best, seconds = split, predict(split, timing)
    others = list(_other_slots(split, timing))
    while True:
        candidates = [(predict(other, timing), other) for other in (*others, *_exchanges(best))]
        faster, other = min(candidates, key=lambda c: c[0], default=(seconds, best))
        if not faster < (1 - WORTH) * seconds:  # nor where a time is no number
            return best
        best, seconds, others = other, faster, []


def _other_slots(split: Split, timing: Timing) -> Iterator[Split]:
    """The split that a plan by ``timing`` gives, where its slots are of another size."""
    if split.swapped:
        other = replan_split(split, timing)
        if other.slot_bytes != split.slot_bytes and other.compute_bytes <= split.compute_bytes:
            yield other


def _exchanges(split: Split) -> Iterator[Split]:
    """Splits with one slot less and one resident block more, and the reverse.

    Of many blocks the most promising. Where they differ in size, also as many blocks as it takes.
    """
    least, compute, blocks = split.sizes.min_slots, split.compute_device, split.sizes.blocks
    few = max(LEAST_TRIED, TRIED_STEPS // len(blocks))
    others: list[tuple[Split | None, int]] = []
    if split.slots > least:
        swapped = [i for i in split.swapped if i < len(blocks)]
        likely = sorted(most_crowded(split, swapped)[:few])
        others += ((with_home(split, i, compute), split.slots - 1) for i in likely)
        others.append((split, split.slots - 1))
    if 0 < split.slots < least + MOST_SLOTS - 1:
        resident = [i for i in range(len(blocks)) if split.homes[i] == compute]
        for index in sorted(most_apart(split, resident)[:few]):
            donor = donor_with_room(split, blocks[index].nbytes)
            if donor is not None:
                others.append((with_home(split, index, donor), split.slots + 1))
        others.append((split, split.slots + 1))
    for other, slots in others:
        changed = replace(other, slots=slots)
        if other is split:
            changed = fit_split(changed, split.compute_bytes)
        if changed and changed.swapped and changed.compute_bytes <= split.compute_bytes:
            yield changed


def cheapest_quota(split: Split, timing: Timing) -> Split | None:
    """The split of the same model with the least on the compute device that costs no time.

    Everything that is swapped lives on the first donor. ``None`` where the CPU computes.
    """
    sizes, compute = split.sizes, split.compute_device
    donor = next((d for d in split.devices() if d != compute), None)
    if donor is None:
        return None
    nbytes = [block.nbytes for block in sizes.blocks]
    step = max(1, median_low(nbytes), max(nbytes) // 4)
    steps = -(-sum(nbytes) // step)
    idle = sum(sizes.parts[i].nbytes for i in sizes.idle)
    free = (1 + FREE) * timing.resident

    def quota(number: int) -> int:
        return max(0, sizes.total_bytes - (steps - number) * step)

    @cache
    def plan(number: int) -> Split:
        entries = (Entry(compute, quota(number)), Entry(donor, None, wildcard=True))
        text = f"{compute},{quota(number)}b;{donor},*"
        allocation = Allocation(text, compute, Mode.BYTES, entries)
        return plan_split(allocation, sizes, {}, timing=timing)

    # While no block computes, no more is copied than slots hold, and the embeddings.
    around = timing.before + timing.after
    ahead = (sizes.min_slots + 2) * max(part.nbytes for part in sizes.parts)
    ahead += sum(part.nbytes for part in sizes.embeddings)
    hidden = free - around + min(around + timing.between, timing.transfer(donor, ahead))

    def may_be_free(number: int) -> bool:
        moved = sizes.total_bytes - idle - quota(number) + min(nbytes)
        return not timing.transfer(donor, moved) > hidden

    def is_free(number: int) -> bool:
        return predict(plan(number), timing) <= free

    # Mostly one of the first that the link allows.
    first = min(steps, 1 + bisect_left(range(1, steps + 1), True, key=may_be_free))
    return plan(first_that(is_free, first, steps))


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
