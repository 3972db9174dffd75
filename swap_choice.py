"""Which blocks are swapped, and how many slots they take turns in: pure arithmetic.

A slot is as large as the largest swapped block, so blocks of different sizes leave a choice: small
slots, and the large blocks resident, move the fewest bytes; large slots let every block be swapped,
and the copies be spread over all of the pass. ``choices`` gives one way for each of a few sizes of
slots; which of them is best is a question of time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import chain, combinations, groupby, zip_longest

from .allocation_parser import Allocation, Mode, Quota
from .split import ModelSizes

# Of the sizes that slots may have, so many are looked at.
SIZES = 3

# Blocks smaller than this share of a slot stay resident where they can: while one of them is in a
# slot, nothing else is copied into it.
SMALL = 0.25

# Embeddings of which every subset is looked at.
FEW = 4

# Of the largest block that may be swapped, where blocks are spread by their lengths.
LENGTH = 1 << 12

# Steps of the search for the fewest blocks that give the rest room, as a share of the largest.
STEPS = 4


@dataclass(frozen=True)
class Room:
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
    def of(cls, allocation: Allocation, quotas: Sequence[Quota]) -> Room:
        named = [quota.device for quota in quotas]
        if allocation.compute_device not in named:
            return cls(0, given=False, firm=False, owed=())
        position = named.index(allocation.compute_device)
        quota = quotas[position]
        # A wildcard is served last, wherever it is written.
        before = quotas if quota.wildcard else quotas[:position]
        owed = tuple(q for q in before if q.device != quota.device and q.nbytes)
        limit = None if quota.wildcard else quota.nbytes
        firm = allocation.mode is not Mode.VIRTUAL_VRAM
        return cls(limit, given=True, firm=firm, owed=owed)

    def holds(self, nbytes: int) -> bool:
        return self.compute_bytes is None or nbytes <= self.compute_bytes


@dataclass(frozen=True)
class Choice:
    """The indices of the swapped parts, those that never run last, and the number of slots."""

    swapped: tuple[int, ...]
    slots: int


def choices(sizes: ModelSizes, room: Room) -> list[Choice]:
    """The ways to give the compute device no more than its room; one, for blocks of one size.

    With swapped blocks evenly spread, a step costs max(compute, transfer) exactly if block j can
    be placed in a window of (slots - 1) * L / N - 1 blocks: two slots give every window an integer
    while at most half of the L blocks (or all of them) are swapped, three slots always do. Every
    block that the forward holds beside the one that its loop is at takes one slot more. Blocks of
    different sizes are counted by their bytes.

    One slot does not overlap, which costs more than moving embeddings: they go first. What never
    runs goes before all else, as its copies cost nothing.
    """
    two = sizes.min_slots + 1
    whole = _Kind(sizes, room, two)
    if not whole.owed_step:
        if room.holds(sizes.total_bytes):
            return [Choice(tuple(_packed(sizes, whole.unused, room.owed)), two)]
        for limit in sorted({sizes.parts[i].nbytes for i in whole.unused}):
            unused = replace(whole, slots=sizes.min_slots, limit=limit).fewest_unused()
            if unused is not None:
                return [Choice(unused, sizes.min_slots)]
    for slots in (two, sizes.min_slots):
        for embeddings in _embedding_choices(sizes):
            found = [kind.choice() for kind in _kinds(sizes, room, slots, embeddings)]
            if found:
                return list(dict.fromkeys(found))
    return [_least(sizes, room)]


def compute_bytes(sizes: ModelSizes, swapped: Iterable[int], slots: int) -> int:
    """Bytes on the compute device with these parts swapped."""
    away = [sizes.parts[i].nbytes for i in swapped]
    return sizes.total_bytes - sum(away) + min(slots, len(away)) * max(away, default=0)


def spread(lengths: Sequence[int], may: Sequence[bool], share: Fraction, ahead: int) -> list[int]:
    """Indices of those of ``may`` that are swapped when ``share`` of all lengths is to be.

    Lengths are bytes, in any unit, and stand for time as well: while blocks compute the link gains
    its share of them, and a block that it could have copied by then is swapped, as late as that, so
    that the copies of a first pass have resident blocks to hide behind. What could not be copied,
    with ``ahead`` under way, is lost. Of equal blocks, N of L are blocks ceil(j * L / N) - 1 for
    j = 1 ... N.
    """
    gain, cost, most = share.numerator, share.denominator, ahead * share.denominator
    gained, chosen = 0, []
    for index, size in enumerate(lengths):
        gained += size * gain
        if may[index] and gained >= size * cost:
            gained -= size * cost
            chosen.append(index)
        if gained > most:
            gained = most
    return chosen


def first_that(holds: Callable[[int], bool], start: int, stop: int) -> int:
    """The first number from ``start`` on that ``holds``, or ``stop``; with few tries where near.

    Where one holds, those behind it should: or else it is not the first.
    """
    below, number = start - 1, start
    while number < stop and not holds(number):
        below, number = number, min(stop, 2 * number - start + 1)
    between = range(below + 1, number)
    return below + 1 + bisect_left(between, True, key=holds)


@dataclass(frozen=True)
class _Kind:
    """A way to choose: blocks of which sizes, through how many slots, and what goes anyway.

    ``limit`` and ``floor`` bound the sizes; ``None``: nothing is too large.
    """

    sizes: ModelSizes
    room: Room
    slots: int
    embeddings: tuple[int, ...] = ()
    limit: int | None = None
    floor: int = 1

    @cached_property
    def nbytes(self) -> list[int]:
        """Bytes of the blocks, as far as they stand for time: none, of what never runs."""
        idle = self.sizes.idle
        return [0 if i in idle else block.nbytes for i, block in enumerate(self.sizes.blocks)]

    @cached_property
    def may(self) -> list[bool]:
        """Which blocks may be swapped, of those that run."""
        limit = max(self.nbytes) if self.limit is None else self.limit
        return [self.floor <= n <= limit for n in self.nbytes]

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest block that may be swapped."""
        return max((n for n, may in zip(self.nbytes, self.may, strict=True) if may), default=1)

    @cached_property
    def unused(self) -> tuple[int, ...]:
        """What never runs and may be swapped."""
        parts, limit = self.sizes.parts, self.limit
        idle = sorted(self.sizes.idle)
        return tuple(i for i in idle if limit is None or parts[i].nbytes <= limit)

    @cached_property
    def steps(self) -> int:
        """Shares of all bytes that are tried, in steps of equal size; with the last, all go."""
        return -(-STEPS * sum(self.lengths) // LENGTH)

    @cached_property
    def lengths(self) -> list[int]:
        """``nbytes`` in small numbers, which are fast to count with."""
        return [n and max(1, n * LENGTH // self.largest) for n in self.nbytes]

    def blocks(self, step: int) -> tuple[int, ...]:
        """The blocks that are swapped at a step."""
        share = Fraction(step * LENGTH, STEPS * max(1, sum(self.lengths)))
        return tuple(spread(self.lengths, self.may, share, (self.slots + 1) * LENGTH))

    def moved(self, blocks: tuple[int, ...]) -> int:
        """Bytes of these blocks."""
        return sum(self.nbytes[i] for i in blocks)

    def fits(self, blocks: tuple[int, ...]) -> bool:
        """Whether the compute device has room with these blocks swapped."""
        swapped = blocks + self.embeddings + self.unused
        return self.room.holds(compute_bytes(self.sizes, swapped, self.slots))

    @cached_property
    def owed_step(self) -> int:
        """The step at which the quotas of donors that are filled first hold no more."""
        if not self.room.owed:
            return 0

        def too_many(step: int) -> bool:
            blocks = self.blocks(step)
            return not set(blocks) <= {*_packed(self.sizes, self.unused + blocks, self.room.owed)}

        last = bisect_left(range(1, self.steps + 1), True, key=too_many)
        most = self.moved(self.blocks(last))
        return bisect_left(range(last), most, key=lambda step: self.moved(self.blocks(step)))

    def choice(self) -> Choice:
        """The fewest bytes that leave the rest room, and that donors are owed."""
        blocks, slots = self.fewest(), self.slots
        all_bytes, moved = sum(self.nbytes), self.moved(blocks)
        if slots == self.sizes.min_slots + 1 and not self.embeddings:
            more = replace(self, slots=slots + 1)
            if all_bytes < 2 * moved < 2 * all_bytes and more.fits(more.blocks(more.steps)):
                blocks, slots = more.fewest(), more.slots
        return Choice(blocks + self.embeddings + self.unused, slots)

    def fewest(self) -> tuple[int, ...]:
        """The fewest blocks, at least those owed, that leave the rest room, where all do."""

        def enough(step: int) -> bool:
            blocks = self.blocks(step)
            return bool(blocks) and self.fits(blocks)

        start = 0
        if not self.room.holds(self.sizes.total_bytes):
            # So many bytes have to go, with slots as large as can be.
            always = [self.sizes.parts[i].nbytes for i in self.embeddings + self.unused]
            slots = self.slots * max(self.largest, *always, 0)
            missing = self.sizes.total_bytes - sum(always) + slots - self.room.compute_bytes
            start = min(STEPS * missing // self.largest, self.steps)
        step = first_that(enough, max(start, self.owed_step), self.steps)
        blocks = self.blocks(step)
        if step == self.owed_step:
            return blocks
        owed = self.moved(self.blocks(self.owed_step))
        return self._without_spare(blocks, self.embeddings + self.unused, owed)

    def fewest_unused(self) -> tuple[int, ...] | None:
        """What never runs, as far as it has to go; ``None`` where that is not enough."""
        if not self.fits(()):
            return None
        owed = sum(
            self.sizes.parts[i].nbytes for i in _packed(self.sizes, self.unused, self.room.owed)
        )
        return self._without_spare(self.unused, (), owed)

    def _without_spare(
        self, swapped: tuple[int, ...], always: tuple[int, ...], least: int
    ) -> tuple[int, ...]:
        """``swapped`` without those that the room holds, the largest first, ``least`` bytes left.

        Blocks of different sizes can leave room for one more.
        """
        nbytes = {i: self.sizes.parts[i].nbytes for i in (*swapped, *always)}
        order = sorted(swapped, key=lambda i: -nbytes[i])
        left, count = sum(nbytes[i] for i in swapped), len(nbytes)
        resident = self.sizes.total_bytes - sum(nbytes.values())
        largest = max((nbytes[i] for i in always), default=0)
        kept: set[int] = set()
        for index, behind in zip_longest(order, order[1:]):
            # In this order, the first that is kept is the largest.
            slot = largest if kept or behind is None else max(largest, nbytes[behind])
            needed = resident + nbytes[index] + min(self.slots, count - 1) * slot
            if left - nbytes[index] >= least and self.room.holds(needed):
                left, count = left - nbytes[index], count - 1
                resident += nbytes[index]
            else:
                kept.add(index)
                largest = max(largest, nbytes[index])
        return tuple(i for i in swapped if i in kept)


def _kinds(
    sizes: ModelSizes, room: Room, slots: int, embeddings: tuple[int, ...]
) -> Iterator[_Kind]:
    """Those that fit the room, for a few sizes of slots: the largest, the smallest, and between."""
    owed = sum(quota.nbytes or 0 for quota in room.owed)
    reached = list(_reached(sizes, slots, embeddings))
    limits = [
        limit
        for limit, away, needed in reached
        if room.holds(needed) and (away >= owed or limit == reached[-1][0])
    ]
    last = len(limits) - 1
    some = {limits[round(k * last / (SIZES - 1))] for k in range(SIZES)} if limits else ()
    for limit in sorted(some, reverse=True):
        kind = _Kind(sizes, room, slots, embeddings, limit)
        large = replace(kind, floor=max(1, int(SMALL * limit)))
        yield large if large.fits(large.blocks(large.steps)) else kind


def _reached(
    sizes: ModelSizes, slots: int, embeddings: tuple[int, ...]
) -> Iterator[tuple[int, int, int]]:
    """Sizes that a slot may have, the smallest first, and what follows with all that fits swapped.

    Of each: the size, the bytes that are swapped, and those that the compute device has to hold.
    """
    fixed = [sizes.parts[i].nbytes for i in embeddings]
    blocks, idle = range(len(sizes.blocks)), sizes.idle
    running = sorted(sizes.parts[i].nbytes for i in {*blocks, *idle})
    away, count = sum(fixed), len(fixed)
    for limit, same in groupby(running):
        number = len(list(same))
        away, count = away + number * limit, count + number
        slot = max(limit, *fixed, 0)
        yield limit, away, sizes.total_bytes - away + min(slots, count) * slot


def _least(sizes: ModelSizes, room: Room) -> Choice:
    """The least that the compute device can do with, where it has no room for anything else.

    Without a quota that is every block, and with donors that are owed what they can hold, too.
    """
    slots = sizes.min_slots if room.firm else sizes.min_slots + 1
    all_blocks = room.owed or not room.given
    running = (b.nbytes for i, b in enumerate(sizes.blocks) if i not in sizes.idle)
    lowest = max(running, default=0) if all_blocks else 0
    ways = [
        (needed, limit, embeddings)
        for embeddings in (_embedding_choices(sizes) if room.given else [()])
        for limit, _, needed in reversed(list(_reached(sizes, slots, embeddings)))
        if limit >= lowest
    ]
    _, limit, embeddings = min(ways, key=lambda way: way[0])
    kind = _Kind(sizes, room, slots, embeddings, limit)
    return Choice(kind.blocks(kind.steps) + embeddings + kind.unused, slots)


def _embedding_choices(sizes: ModelSizes) -> list[tuple[int, ...]]:
    """Which embeddings to swap: none first, then those that move the fewest bytes."""
    may = [i for i in range(len(sizes.blocks), len(sizes.parts)) if i not in sizes.idle]
    if len(may) > FEW:
        may.sort(key=lambda i: sizes.parts[i].nbytes)
        return [tuple(sorted(may[len(may) - n :])) for n in range(len(may) + 1)]
    subsets = (combinations(may, number) for number in range(len(may) + 1))
    return sorted(chain.from_iterable(subsets), key=lambda c: sum(sizes.parts[i].nbytes for i in c))


def _packed(sizes: ModelSizes, indices: Iterable[int], quotas: Sequence[Quota]) -> list[int]:
    """Those of the parts that fit the quotas, filled one after another."""
    left = [quota.nbytes or 0 for quota in quotas]
    packed = []
    for index in indices:
        nbytes = sizes.parts[index].nbytes
        fitting = next((k for k, room in enumerate(left) if room >= nbytes), None)
        if fitting is not None:
            left[fitting] -= nbytes
            packed.append(index)
    return packed
