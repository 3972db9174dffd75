"""From an allocation and the sizes of a model to its split: pure arithmetic.

``plan_split`` decides where every block lives. No device, model or ComfyUI is touched here, so that
the same input always gives the same split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations

from .allocation_parser import CPU, Allocation, Mode, Quota
from .split import ModelSizes, Split, format_bytes


def plan_split(
    allocation: Allocation,
    sizes: ModelSizes,
    device_memory: Mapping[str, int],
    spare: Mapping[str, int] | None = None,
) -> Split:
    """Decide the home of every block and embedding.

    Quotas are filled in the order written and never exceeded, except for the wildcard's and
    except that the compute device always gets the floor: non-block weights and slots.
    ``device_memory`` maps device names to their total bytes, ``spare`` those whose amount is
    ``auto`` to the bytes that they have for weights.
    """
    quotas = allocation.quotas(sizes.total_bytes, device_memory, spare)
    compute = allocation.compute_device
    if compute == CPU:
        return Split(allocation, sizes, quotas, (CPU,) * len(sizes.parts), slots=0)
    room = _Room.of(allocation, quotas)
    swapped, slots = _choose_swapped(sizes, room)
    homes = _choose_donors(sizes, swapped, [q for q in quotas if q.device != compute])
    _fill_owed(sizes, homes, slots, room)
    slots = min(slots, len(homes))
    homes_by_index = tuple(homes.get(i, compute) for i in range(len(sizes.parts)))
    split = Split(allocation, sizes, quotas, homes_by_index, slots)
    notes = (*_floor_note(split, room), *_overflow_note(split), *_memory_note(split, device_memory))
    return Split(allocation, sizes, quotas, homes_by_index, slots, notes)


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


@dataclass(frozen=True)
class _Room:
    """What bounds the choice of swapped blocks.

    ``compute_bytes``: the compute device's quota, ``None`` without limit. ``given``: whether there
    is such a quota, and ``firm``: whether the user wrote that number. ``owed``: the donors that are
    filled before the compute device gets anything.
    """

    compute_bytes: int | None
    given: bool
    firm: bool
    owed: tuple[Quota, ...]

    @classmethod
    def of(cls, allocation: Allocation, quotas: Sequence[Quota]) -> _Room:
        named = [quota.device for quota in quotas]
        if allocation.compute_device not in named:
            return cls(0, given=False, firm=False, owed=())
        position = named.index(allocation.compute_device)
        quota = quotas[position]
        # A wildcard is served last, wherever it is written.
        before = quotas if quota.wildcard else quotas[:position]
        owed = tuple(q for q in before if q.device != quota.device and q.nbytes is not None)
        limit = None if quota.wildcard else quota.nbytes
        firm = allocation.mode is not Mode.VIRTUAL_VRAM
        return cls(limit, given=True, firm=firm, owed=owed)

    def holds(self, nbytes: int) -> bool:
        return self.compute_bytes is None or nbytes <= self.compute_bytes


def _choose_swapped(sizes: ModelSizes, room: _Room) -> tuple[tuple[int, ...], int]:
    """The swapped parts and the number of slots.

    With swapped blocks evenly spread, a step costs max(compute, transfer) exactly if block j can
    be placed in a window of (slots - 1) * L / N - 1 blocks: two slots give every window an integer
    while at most half of the L blocks (or all of them) are swapped, three slots always do. Every
    block that the forward holds beside the one that its loop is at takes one slot more.

    One slot does not overlap, which costs more than moving embeddings: they go first.
    """
    count = len(sizes.blocks)
    owed = _count_owed(sizes, room.owed)
    two, three = sizes.min_slots + 1, sizes.min_slots + 2
    if owed == 0 and room.holds(sizes.total_bytes):
        return (), two
    for slots in (two, sizes.min_slots):
        for embeddings in _embedding_choices(sizes):
            swapped = _fewest_swapped(sizes, room, slots, owed, embeddings)
            if swapped is None:
                continue
            if slots == two and not embeddings and count < 2 * len(swapped) < 2 * count:
                more = _fewest_swapped(sizes, room, three, owed, embeddings)
                if more is not None:
                    return more, three
            return swapped, slots
    slots = sizes.min_slots if room.firm else two
    blocks = tuple(range(count))
    if not room.given:
        return blocks, slots
    choices = [blocks + embeddings for embeddings in _embedding_choices(sizes)]
    return min(choices, key=lambda swapped: _compute_bytes(sizes, swapped, slots)), slots


def _embedding_choices(sizes: ModelSizes) -> Iterator[tuple[int, ...]]:
    """Which embeddings to swap: none first, then those that move the fewest bytes."""
    first, last = len(sizes.blocks), len(sizes.parts)
    choices = [
        choice
        for number in range(last - first + 1)
        for choice in combinations(range(first, last), number)
    ]
    yield from sorted(choices, key=lambda choice: sum(sizes.parts[i].nbytes for i in choice))


def _fewest_swapped(
    sizes: ModelSizes, room: _Room, slots: int, owed: int, embeddings: tuple[int, ...]
) -> tuple[int, ...] | None:
    """``embeddings`` and the fewest blocks, at least ``owed``, that leave the rest room."""
    count = len(sizes.blocks)
    for number in range(max(owed, 1), count + 1):
        swapped = spread(number, count)
        if room.holds(_compute_bytes(sizes, swapped + embeddings, slots)):
            break
    else:
        return None
    if number > owed:
        # Blocks of different sizes can leave room for one more: keep it resident.
        for index in sorted(swapped, key=lambda i: -sizes.blocks[i].nbytes):
            fewer = tuple(i for i in swapped if i != index)
            needed = _compute_bytes(sizes, fewer + embeddings, slots)
            if len(fewer) >= owed and room.holds(needed):
                swapped = fewer
    return swapped + embeddings


def _compute_bytes(sizes: ModelSizes, swapped: tuple[int, ...], slots: int) -> int:
    away = [sizes.parts[i].nbytes for i in swapped]
    return sizes.total_bytes - sum(away) + min(slots, len(away)) * max(away, default=0)


def spread(number: int, count: int) -> tuple[int, ...]:
    """``number`` of ``count`` positions, evenly spread, each as late as its share allows.

    Late, because then the copies of a first pass have resident blocks to hide behind.
    """
    return tuple(-(-(j + 1) * count // number) - 1 for j in range(number))


def _count_owed(sizes: ModelSizes, owed: tuple[Quota, ...]) -> int:
    """How many evenly spread blocks fit in the quotas ``owed``, filled one after another."""
    count = len(sizes.blocks)
    for number in range(count, 0, -1):
        left = [quota.nbytes or 0 for quota in owed]
        for index in spread(number, count):
            nbytes = sizes.blocks[index].nbytes
            fitting = next((k for k, room in enumerate(left) if room >= nbytes), None)
            if fitting is None:
                break
            left[fitting] -= nbytes
        else:
            return number
    return 0


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


def _fill_owed(sizes: ModelSizes, homes: dict[int, str], slots: int, room: _Room) -> None:
    """Blocks of different sizes can leave room on donors that come before the compute device."""
    for quota in room.owed:
        placed = (sizes.parts[i].nbytes for i, home in homes.items() if home == quota.device)
        left = (quota.nbytes or 0) - sum(placed)
        for index, block in enumerate(sizes.blocks):
            more = (*homes, index)
            if index in homes or block.nbytes > left:
                continue
            if room.holds(_compute_bytes(sizes, more, slots)):
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


def _floor_note(split: Split, room: _Room) -> tuple[str, ...]:
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
