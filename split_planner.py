"""From an allocation and the sizes of a model to its split: pure arithmetic.

``plan_split`` decides where every block lives. No device, model or ComfyUI is touched here, so that
the same input always gives the same split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from .allocation_parser import CPU, Allocation, Mode, Quota
from .pass_schedule import Timing, assumed_timing, predict, transfer_seconds
from .split import ModelSizes, Split, format_bytes
from .swap_choice import Choice, Room, choices, compute_bytes


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
    """``frame`` with the homes and slots that take the least time; some, if not more than one.

    Without ``timing``, by the sum of what a pass takes where it computes for as long as its weights
    are copied, and of what it takes where it hardly computes at all.
    """
    splits = [_placed(frame, choice, room) for choice in choices(frame.sizes, room)]
    if len(splits) == 1:
        return splits[0]
    if timing is not None:
        return min(splits, key=lambda split: predict(split, timing))
    assumed = assumed_timing(frame.sizes)
    return min(splits, key=lambda s: predict(s, assumed) + transfer_seconds(s, assumed))


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
    """``wanted`` with as few blocks moved from where ``split`` has them as its bytes allow.

    Both are splits of one model by one allocation, for other amounts of memory. Blocks leave the
    compute device, or return to it, where that spreads the swapped ones most evenly. ``wanted``
    itself, where the embeddings move or the number of slots changes.
    """
    sizes, compute, count = split.sizes, split.compute_device, len(split.sizes.blocks)
    if split.homes[count:] != wanted.homes[count:] or split.slots != wanted.slots:
        return wanted
    homes, limit = list(split.homes), wanted.compute_bytes

    def fitted() -> Split:
        return replace(wanted, homes=tuple(homes))

    def gaps(index: int) -> tuple[int, int]:
        """Distances to the other swapped blocks before and behind, around the end of the pass."""
        others = [i for i in range(count) if homes[i] != compute and i != index]
        before = min(((index - i) % count for i in others), default=count)
        return before, min(((i - index) % count for i in others), default=count)

    while fitted().compute_bytes > limit:
        resident = [i for i in range(count) if homes[i] == compute]
        if not resident:  # blocks of very different sizes: a slot is as large as the largest
            return wanted
        index = max(resident, key=lambda i: min(gaps(i)))
        donor = donor_with_room(fitted(), sizes.blocks[index].nbytes)
        if donor is None:
            return wanted
        homes[index] = donor
    while True:
        swapped = [i for i in range(count) if homes[i] != compute]
        if len(swapped) <= 1:
            return fitted()
        index = min(swapped, key=lambda i: sum(gaps(i)))
        before, homes[index] = homes[index], compute
        if fitted().compute_bytes > limit:
            homes[index] = before
            return fitted()


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
