"""From an allocation and the sizes of a model to its split: pure arithmetic.

``plan_split`` decides where every block lives. No device, model or ComfyUI is touched here, so that
the same input always gives the same split.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate

from .allocation_parser import CPU, Allocation, Mode, Quota
from .pass_schedule import Timing, assumed_timing, predict
from .split import ModelSizes, Split, format_bytes
from .swap_choice import Choice, Room, choices, compute_bytes

# How long a block computes against how long it is copied, where no pass was timed yet: the sum of
# the times decides. With 0 the fewest bytes are best. With 1 they may lie anywhere, but not where a
# block waits for one that is larger. (Between these, copies that are spread over all of the pass
# take up to a quarter less: that is left to the first timed pass.)
ASSUMED_RATIOS = (0.0, 1.0)

# As a share of a slot: what is smaller is not moved back for the room that is left.
WORTH_RETURNING = 1 / 16


def plan_split(
    allocation: Allocation,
    sizes: ModelSizes,
    device_memory: Mapping[str, int],
    spare: Mapping[str, int] | None = None,
    timing: Timing | None = None,
) -> Split:
    """Decide the home of every block and embedding.

    Quotas are filled in the order written and never exceeded, except for the wildcard's and
    except that the compute device always gets the floor: non-block weights and slots.
    ``device_memory`` maps device names to their total bytes, ``spare`` those whose amount is
    ``auto`` to the bytes that they have for weights. ``timing``, where it is known, decides between
    large slots and small ones for blocks of different sizes.
    """
    quotas = allocation.quotas(sizes.total_bytes, device_memory, spare)
    compute = allocation.compute_device
    if compute == CPU:
        return Split(allocation, sizes, quotas, (CPU,) * len(sizes.parts), slots=0)
    room = Room.of(allocation, quotas)
    split = _best_split(Split(allocation, sizes, quotas, (), slots=0), room, timing)
    notes = (*_floor_note(split, room), *_overflow_note(split), *_memory_note(split, device_memory))
    return replace(split, notes=notes)


def replan_split(split: Split, timing: Timing) -> Split:
    """The split that is best by ``timing``, with no more on the compute device than ``split``."""
    room = Room.of(split.allocation, split.quotas)
    room = replace(room, compute_bytes=split.compute_bytes, given=True)
    return _best_split(split, room, timing)


def _best_split(frame: Split, room: Room, timing: Timing | None) -> Split:
    """``frame`` with the homes and slots that take the least time, by ``timing`` or as assumed."""
    splits = [_placed(frame, choice, room) for choice in choices(frame.sizes, room)]
    if len(splits) == 1:
        return splits[0]
    times = [timing] if timing else [assumed_timing(frame.sizes, ratio) for ratio in ASSUMED_RATIOS]
    return min(splits, key=lambda split: sum(predict(split, each) for each in times))


def _placed(frame: Split, choice: Choice, room: Room) -> Split:
    """``frame`` with the swapped parts of ``choice`` on its donors."""
    sizes, compute = frame.sizes, frame.compute_device
    donors = [quota for quota in frame.quotas if quota.device != compute]
    homes = _choose_donors(sizes, choice.swapped, donors)
    _fill_owed(sizes, homes, choice.slots, room)
    # No more than take turns, though what never runs needs some to be called in.
    running = sum(index not in sizes.idle for index in homes)
    slots = min(choice.slots, max(running, min(sizes.min_slots, len(homes))))
    homes_by_index = tuple(homes.get(i, compute) for i in range(len(sizes.parts)))
    return replace(frame, homes=homes_by_index, slots=slots, notes=())


def refit_split(split: Split, wanted: Split) -> Split:
    """``wanted`` with as few bytes moved from where ``split`` has them as its bytes allow.

    Both are splits of one model by one allocation, for other amounts of memory. Blocks leave the
    compute device, or return to it, where that spreads the swapped ones most evenly. ``wanted``
    itself, where the embeddings move or the number of slots changes.
    """
    count = len(split.sizes.blocks)
    if split.homes[count:] != wanted.homes[count:] or split.slots != wanted.slots:
        return wanted
    return fit_split(replace(wanted, homes=split.homes), wanted.compute_bytes) or wanted


def fit_split(split: Split, limit: int) -> Split | None:
    """``split`` with as few blocks moved as it takes for ``limit`` bytes on the compute device.

    Less than a block less, where one could return. Slots grow no larger; ``None`` where nothing
    that fits them is left to be swapped, or no donor has room.
    """
    blocks, compute, slot = split.sizes.blocks, split.compute_device, split.slot_bytes
    left: list[int] = []
    while (missing := split.compute_bytes - limit) > 0:
        may = [i for i, b in enumerate(blocks) if split.homes[i] == compute and b.nbytes <= slot]
        # One that suffices or is a large part of that, so that few move.
        enough = min(missing, max((blocks[i].nbytes for i in may), default=0)) / 2
        may = [i for i in may if blocks[i].nbytes > enough]
        if not may:
            return None
        index = most_apart(split, may)[0]
        donor = donor_with_room(split, blocks[index].nbytes)
        if donor is None:
            return None
        left.append(index)
        split = with_home(split, index, donor)
    while True:
        swapped = [i for i in left or split.swapped if i < len(blocks)]
        fitting = _fitting_back(split, limit)
        may = [i for i in swapped if i in fitting]
        largest = max((blocks[i].nbytes for i in may), default=0)
        if not largest > WORTH_RETURNING * slot or len(swapped) <= 1:
            return split
        may = [i for i in may if blocks[i].nbytes > largest / 2]
        split = with_home(split, most_crowded(split, may)[0], compute)


def with_home(split: Split, index: int, home: str) -> Split:
    """``split`` with one part moved."""
    return replace(split, homes=(*split.homes[:index], home, *split.homes[index + 1 :]))


def most_apart(split: Split, blocks: Sequence[int]) -> list[int]:
    """``blocks`` from the one that is farthest from any swapped one; first what never runs."""
    gaps, idle = _gaps(split, blocks), split.sizes.idle
    return sorted(blocks, key=lambda i: (i not in idle, -min(gaps[i])))


def most_crowded(split: Split, blocks: Sequence[int]) -> list[int]:
    """``blocks`` from the one that has others swapped next to it; last what never runs."""
    gaps, idle = _gaps(split, blocks), split.sizes.idle
    return sorted(blocks, key=lambda i: (i in idle, sum(gaps[i])))


def _gaps(split: Split, blocks: Sequence[int]) -> dict[int, tuple[int, int]]:
    """From each block to the other swapped ones before and behind, around the end of the pass.

    In bytes of what runs, which stand for time.
    """
    sizes = split.sizes
    counted = (0 if i in sizes.idle else block.nbytes for i, block in enumerate(sizes.blocks))
    *starts, whole = accumulate(counted, initial=0)
    swapped = [i for i in split.running if i < len(sizes.blocks)]
    if not swapped or not whole:
        return dict.fromkeys(blocks, (whole, whole))
    gaps = {}
    for index in blocks:
        position = bisect_left(swapped, index)
        behind = position + (position < len(swapped) and swapped[position] == index)
        # Around the end: the last one comes before the first.
        others = swapped[position - 1], swapped[behind % len(swapped)]
        before, after = starts[index] - starts[others[0]], starts[others[1]] - starts[index]
        gaps[index] = (before % whole or whole, after % whole or whole)
    return gaps


def _fitting_back(split: Split, limit: int) -> set[int]:
    """The swapped parts that the compute device has room for; slots may get smaller by one."""
    nbytes = {i: split.sizes.parts[i].nbytes for i in split.swapped}
    largest, next_largest = (*sorted(nbytes.values(), reverse=True), 0, 0)[:2]
    spare = limit - split.compute_bytes
    smaller = split.slots * (largest - next_largest)
    return {i for i, n in nbytes.items() if n - (smaller if n == largest else 0) <= spare}


def donor_with_room(split: Split, nbytes: int) -> str | None:
    """The first donor whose quota has room for ``nbytes``, the wildcard's last."""
    donors = [quota for quota in split.quotas if quota.device != split.compute_device]
    for quota in sorted(donors, key=lambda quota: quota.wildcard):
        has_room = quota.nbytes is None or split.bytes_on(quota.device) + nbytes <= quota.nbytes
        if quota.wildcard or has_room:
            return quota.device
    return None


def _choose_donors(
    sizes: ModelSizes, swapped: tuple[int, ...], donors: Sequence[Quota]
) -> dict[int, str]:
    """The home of every swapped part, donors interleaved so that their links work together."""
    shares = _donor_shares([sizes.parts[i].nbytes for i in swapped], donors)
    used = dict.fromkeys(shares, 0)
    limits = {q.device: None if q.wildcard else q.nbytes for q in donors}

    def fits(device: str, nbytes: int) -> bool:
        limit = limits[device]
        return limit is None or used[device] + nbytes <= limit

    homes: dict[int, str] = {}
    for index in swapped:
        nbytes = sizes.parts[index].nbytes
        candidates = [device for device in shares if shares[device] and fits(device, nbytes)]
        candidates = candidates or [device for device in shares if fits(device, nbytes)]
        if not candidates:
            continue  # The compute device is the wildcard: what no donor can hold stays there.
        home = candidates[0]
        if len(candidates) > 1:
            home = min(candidates, key=lambda d: Fraction(used[d] + nbytes, shares[d] or 1))
        homes[index] = home
        used[home] += nbytes
    # Rounding to whole blocks may leave room on a donor that comes first: fill it, from what comes
    # later or has found no donor yet.
    order = [quota.device for quota in donors]
    for position, device in enumerate(order):
        if limits[device] is None:
            continue
        # Of a wildcard that comes first, only what exceeds the amount written for it.
        keeps = dict.fromkeys(order, 0) | {q.device: q.nbytes or 0 for q in donors[:position]}
        sources = {q.device for q in donors if q.wildcard}.union(order[position + 1 :])
        for index in swapped:
            nbytes, home = sizes.parts[index].nbytes, homes.get(index)
            spare = home is None or (home in sources and used[home] - nbytes >= keeps[home])
            if spare and fits(device, nbytes):
                homes[index] = device
                used[device] += nbytes
                if home is not None:
                    used[home] -= nbytes
    return homes


def _fill_owed(sizes: ModelSizes, homes: dict[int, str], slots: int, room: Room) -> None:
    """Blocks of different sizes can leave room on donors that come before the compute device."""
    for quota in room.owed:
        placed = (sizes.parts[i].nbytes for i, home in homes.items() if home == quota.device)
        left = (quota.nbytes or 0) - sum(placed)
        for index, block in enumerate(sizes.blocks):
            more = (*homes, index)
            if index in homes or block.nbytes > left:
                continue
            if room.holds(compute_bytes(sizes, more, slots)):
                homes[index] = quota.device
                left -= block.nbytes


def _donor_shares(sizes: Sequence[int], donors: Sequence[Quota]) -> dict[str, int]:
    """Bytes of the blocks that each donor gets: quotas in the order written, then the rest."""
    shares = {quota.device: 0 for quota in donors}
    left = list(sizes)
    for quota in donors:
        for nbytes in list(left):
            if shares[quota.device] + nbytes <= (quota.nbytes or 0):
                shares[quota.device] += nbytes
                left.remove(nbytes)
    for quota in donors:
        if quota.wildcard:
            shares[quota.device] += sum(left)
    return shares


def _floor_note(split: Split, room: Room) -> tuple[str, ...]:
    named = any(quota.device == split.compute_device for quota in split.quotas)
    if not named or room.holds(split.compute_bytes):
        return ()
    quota, needed = format_bytes(room.compute_bytes or 0), format_bytes(split.compute_bytes)
    what = (
        "is to hold" if split.compute_device in split.allocation.auto_devices else "has a quota of"
    )
    note = f"below the floor: {split.compute_device} {what} {quota}, "
    return (f"{note}the model runs with {needed} of non-block weights and slots",)


def _memory_note(split: Split, device_memory: Mapping[str, int]) -> tuple[str, ...]:
    """Warnings where more weights are placed than a device has memory."""
    return tuple(
        f"warning: {device} has {format_bytes(device_memory[device])} of memory in all"
        for device in split.devices()
        if split.bytes_on(device) > device_memory.get(device, split.bytes_on(device)) > 0
    )


def _overflow_note(split: Split) -> tuple[str, ...]:
    """In fraction mode, a warning where the CPU holds more than was written for it."""
    if split.allocation.mode is not Mode.FRACTION or split.compute_device == CPU:
        return ()
    cpu = next((entry for entry in split.allocation.entries if entry.device == CPU), None)
    quota = next((quota for quota in split.quotas if quota.device == CPU), None)
    if cpu is None or quota is None or not cpu.wildcard or "*" in split.allocation.source:
        return ()
    written = quota.nbytes or 0
    if split.bytes_on(CPU) <= written:
        return ()
    over = split.bytes_on(CPU) - written
    return (f"warning: {format_bytes(over)} did not fit the fractions and went to {CPU}",)
