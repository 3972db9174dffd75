"""From an allocation string to the split of a model: pure text and arithmetic.

``parse_allocation`` reads what the user typed, ``plan_split`` decides where every block lives.
No device, model or ComfyUI is touched here, so that the same input always gives the same split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from itertools import combinations

GIB = 1 << 30
MIB = 1 << 20
KIB = 1 << 10

CPU = "cpu"

GRAMMAR = (
    "Write 'device,amount' entries separated by ';'. Amounts are all bytes (2.5gb, 512mb), all "
    "ratios of the model (25%), or all fractions of each device's memory (0.5). One entry may be "
    "'*': it takes the rest. Example: cuda:0,2.5gb;cpu,*"
)

# Digits are spelled out: \d and float() would also take digits of other scripts, and a bounded
# length keeps a pasted novel out of int().
_AMOUNT = re.compile(r"([0-9]{1,18}(?:\.[0-9]{0,24})?|\.[0-9]{1,24})\s*([a-z%]*)")
_UNITS = {
    "b": 1,
    **dict.fromkeys(("k", "kb", "kib"), KIB),
    **dict.fromkeys(("m", "mb", "mib"), MIB),
    **dict.fromkeys(("g", "gb", "gib"), GIB),
}


class AllocationError(ValueError):
    """An allocation that cannot be followed: says which entry, why, and what is allowed."""


class Mode(Enum):
    """What the amounts of an allocation count."""

    BYTES = "bytes"
    RATIO = "ratio"
    FRACTION = "fraction"
    VIRTUAL_VRAM = "virtual VRAM"


@dataclass(frozen=True)
class Entry:
    """One ``device,amount`` of an allocation string.

    ``amount`` is in the unit of the allocation's mode: bytes, percent, or a fraction of the
    device's memory; ``None`` where ``*`` was written. A ``wildcard`` takes whatever is left; one
    with an amount, the CPU where no ``*`` was written, takes that in its turn first.
    """

    device: str
    amount: Fraction | None
    wildcard: bool = False


@dataclass(frozen=True)
class Quota:
    """The most bytes of weights that a device may hold; ``None``: no limit was given."""

    device: str
    nbytes: int | None
    wildcard: bool = False


@dataclass(frozen=True)
class Allocation:
    """A parsed allocation string.

    ``source`` is the string as MultiGPU stored it, ``entries`` are in the order written and hold
    exactly one wildcard. In virtual VRAM mode ``virtual_vram`` is the number of bytes that leave
    the compute device and the entries are the donors.
    """

    source: str
    compute_device: str
    mode: Mode
    entries: tuple[Entry, ...]
    virtual_vram: int = 0

    def quotas(self, model_bytes: int, device_memory: Mapping[str, int]) -> tuple[Quota, ...]:
        """The entries as byte quotas for a model of ``model_bytes``, in the order written.

        ``device_memory`` maps device names to their total memory in bytes; it is read in fraction
        and virtual VRAM mode only. A compute device that the string does not name has no quota.

        Raises:
            AllocationError: the memory of a device is needed, and its backend does not tell it.
        """
        if self.mode in (Mode.FRACTION, Mode.VIRTUAL_VRAM):
            for entry in self.entries:
                if not entry.wildcard and not device_memory[entry.device]:
                    raise AllocationError(
                        f"Allocation {_quote(self.source)}: how much memory {entry.device} has is "
                        f"not known here. Give bytes or a ratio. {GRAMMAR}"
                    )
        if self.mode is Mode.VIRTUAL_VRAM:
            compute = Quota(self.compute_device, max(0, model_bytes - self.virtual_vram))
            donors = (
                Quota(e.device, None if e.wildcard else device_memory[e.device], e.wildcard)
                for e in self.entries
            )
            return (compute, *donors)
        if self.mode is Mode.FRACTION:
            units = {e.device: Fraction(device_memory[e.device]) for e in self.entries}
        else:
            unit = Fraction(model_bytes, 100) if self.mode is Mode.RATIO else Fraction(1)
            units = {e.device: unit for e in self.entries}

        def in_bytes(entry: Entry) -> int | None:
            return None if entry.amount is None else int(entry.amount * units[entry.device])

        return tuple(Quota(e.device, in_bytes(e), e.wildcard) for e in self.entries)


@dataclass(frozen=True)
class Block:
    """One transformer block of a model, or an embedding: its name and its packed size in bytes."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class ModelSizes:
    """What planning needs to know of a model.

    ``blocks`` are in execution order; ``non_block_bytes`` always stay on the compute device;
    ``min_slots`` is how many blocks the model's forward may hold at once. ``embeddings`` run once
    before the blocks and are swapped like them where the quota has no room for them.
    """

    blocks: tuple[Block, ...]
    non_block_bytes: int
    min_slots: int = 1
    embeddings: tuple[Block, ...] = ()

    @property
    def parts(self) -> tuple[Block, ...]:
        """All that has a home of its own: the blocks, then the embeddings."""
        return self.blocks + self.embeddings

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return self.non_block_bytes + sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Split:
    """Where every block of a model lives: the immutable result of planning.

    ``homes[i]`` is the device of ``sizes.parts[i]``, a block or an embedding, which is resident
    where that is the compute device, swapped otherwise. ``quotas`` are in the order written.
    """

    allocation: Allocation
    sizes: ModelSizes
    quotas: tuple[Quota, ...]
    homes: tuple[str, ...]
    slots: int
    notes: tuple[str, ...] = ()

    @property
    def compute_device(self) -> str:
        """Where every block runs."""
        return self.allocation.compute_device

    @property
    def swapped(self) -> tuple[int, ...]:
        """Indices of the parts whose home is a donor."""
        return tuple(i for i, home in enumerate(self.homes) if home != self.compute_device)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: the largest swapped part."""
        return max((self.sizes.parts[i].nbytes for i in self.swapped), default=0)

    @property
    def bytes_per_pass(self) -> int:
        """Bytes that one forward pass copies to the compute device, once the slots are warm."""
        if len(self.swapped) <= self.slots:
            return 0
        return sum(self.sizes.parts[i].nbytes for i in self.swapped)

    @property
    def compute_bytes(self) -> int:
        """Bytes on the compute device while the model runs: non-block, resident, slots."""
        return self.bytes_on(self.compute_device)

    def bytes_on(self, device: str) -> int:
        """Bytes of weights on ``device`` while the model runs."""
        placed = sum(
            part.nbytes
            for part, home in zip(self.sizes.parts, self.homes, strict=True)
            if home == device
        )
        if device == self.compute_device:
            placed += self.sizes.non_block_bytes + self.slots * self.slot_bytes
        return placed

    def devices(self) -> tuple[str, ...]:
        """Every device of the split, the compute device first, donors in the order written."""
        donors = (quota.device for quota in self.quotas if quota.device != self.compute_device)
        return (self.compute_device, *donors)

    def table(self) -> str:
        """The split as the text that is printed once per load."""
        quotas = {quota.device: quota for quota in self.quotas}
        row = "  {:<10} {:<8} {:>11} {:>7} {:>11}".format
        lines = [
            f"Block swap of {self.allocation.source}",
            row("device", "role", "quota", "blocks", "placed"),
        ]
        for device in self.devices():
            lines.append(
                row(
                    device,
                    "compute" if device == self.compute_device else "donor",
                    _quota_text(quotas.get(device)),
                    self._blocks_on(device),
                    format_bytes(self.bytes_on(device)),
                )
            )
        resident = [
            part.nbytes
            for part, home in zip(self.sizes.embeddings, self._embedding_homes(), strict=True)
            if home == self.compute_device
        ]
        non_block = self.sizes.non_block_bytes + sum(resident)
        lines.append(
            f"  {self.compute_device}: {format_bytes(non_block)} of non-block weights, "
            f"{self._blocks_on(self.compute_device)} resident blocks and {self.slots} slots of "
            f"{format_bytes(self.slot_bytes)}"
        )
        for part, home in zip(self.sizes.embeddings, self._embedding_homes(), strict=True):
            if home != self.compute_device:
                lines.append(f"  {part.name}: {format_bytes(part.nbytes)}, swapped from {home}")
        lines.append(
            f"  each forward pass moves {format_bytes(self.bytes_per_pass)} to "
            f"{self.compute_device}"
        )
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _blocks_on(self, device: str) -> int:
        return self.homes[: len(self.sizes.blocks)].count(device)

    def _embedding_homes(self) -> tuple[str, ...]:
        return self.homes[len(self.sizes.blocks) :]


def format_bytes(nbytes: int) -> str:
    """``nbytes`` with two decimals in GiB, or in MiB below one GiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.2f} MiB"


def _quota_text(quota: Quota | None) -> str:
    if quota is None:
        return "none given"
    if quota.nbytes is None:
        return "the rest"
    return format_bytes(quota.nbytes) + (" +" if quota.wildcard else "")


# --------------------------------------------------------------------------------------------
# string -> Allocation
# --------------------------------------------------------------------------------------------


def parse_allocation(
    text: str, devices: Sequence[str], compute_device: str | None = None
) -> Allocation:
    """Read an allocation string, as typed or as MultiGPU stores it.

    ``text`` is ``<expert>#<compute>;<virtual_vram_gb>;<donor>[,<donor>]``, ``<expert>#<compute>``
    or the expert part alone. ``devices`` are the names present on this machine, ``compute_device``
    is where the model will run; it overrides what stands behind the ``#``.

    Raises:
        AllocationError: the string cannot be followed as written.
    """
    if not isinstance(text, str):
        raise AllocationError(f"An allocation is a string, not {type(text).__name__}. {GRAMMAR}")
    expert, _, virtual = text.rpartition("#") if "#" in text else (text, "", "")
    stored_compute, *virtual_parts = virtual.split(";")
    if compute_device is None:
        compute_device = stored_compute.strip()
    reader = _Reader(text, tuple(devices))
    compute = reader.device(compute_device, f"compute device {_quote(compute_device)}")
    if expert.strip():
        mode, entries = reader.expert_entries(expert)
        return Allocation(text, compute, mode, _with_wildcard(entries))
    if len(virtual_parts) < 2:
        raise reader.error("it is empty")
    amount = reader.virtual_vram(virtual_parts[0])
    donors = reader.donors(";".join(virtual_parts[1:]), compute)
    return Allocation(text, compute, Mode.VIRTUAL_VRAM, _with_wildcard(donors), amount)


class _Reader:
    """Reads the parts of one allocation string; its errors quote where they stand in it."""

    def __init__(self, text: str, devices: tuple[str, ...]):
        self.text = text
        self.devices = devices

    def error(self, problem: str, where: str = "") -> AllocationError:
        place = f"{where}: " if where else ""
        return AllocationError(
            f"Allocation {_quote(self.text)}: {place}{problem}. "
            f"Devices present: {', '.join(self.devices)}. {GRAMMAR}"
        )

    def device(self, name: str, where: str) -> str:
        wanted = name.strip().lower()
        kind, _, index = wanted.partition(":")
        # 'cuda' means 'cuda:0', 'mps:0' means 'mps', as for torch.device.
        for candidate in (wanted, f"{wanted}:0", kind if index == "0" else wanted):
            if candidate in self.devices:
                return candidate
        problem = f"this machine has no device {_quote(name.strip())}" if wanted else "no device"
        raise self.error(problem, where)

    def expert_entries(self, expert: str) -> tuple[Mode, list[Entry]]:
        entries: list[Entry] = []
        modes: dict[Mode, str] = {}
        for number, part in enumerate(expert.split(";"), start=1):
            where = f"entry {number} {_quote(part)}"
            if not part.strip():
                raise self.error("the entry is empty", where)
            name, comma, value = part.partition(",")
            if not comma:
                raise self.error("there is no ',' between device and amount", where)
            device = self.device(name, where)
            if any(device == entry.device for entry in entries):
                raise self.error(f"{device} is given twice", where)
            amount, mode = self.amount(value.strip().lower(), where)
            entry = Entry(device, amount, wildcard=amount is None)
            if entry.wildcard and any(other.wildcard for other in entries):
                raise self.error("there is more than one '*'", where)
            if mode is not None:
                modes.setdefault(mode, where)
            entries.append(entry)
        if len(modes) > 1:
            mixed = " and ".join(f"{where} is {mode.value}" for mode, where in modes.items())
            raise self.error(f"the amounts are mixed, {mixed}")
        mode = next(iter(modes), Mode.BYTES)
        if mode is Mode.RATIO and len(entries) > 1 and not any(e.wildcard for e in entries):
            entries = self.normalised(entries)
        return mode, entries

    def normalised(self, entries: list[Entry]) -> list[Entry]:
        """Ratios as percent of the model: 8:8:4 is 40/40/20."""
        whole = sum((entry.amount or Fraction(0) for entry in entries), Fraction(0))
        if not whole:
            raise self.error("the ratios add up to nothing")
        return [Entry(e.device, 100 * (e.amount or Fraction(0)) / whole) for e in entries]

    def amount(self, value: str, where: str) -> tuple[Fraction | None, Mode | None]:
        """An amount and the mode it speaks for; a bare 0 is nothing in every mode."""
        if value == "*":
            return None, None
        if value.endswith("*") and _AMOUNT.fullmatch(value[:-1].strip()):
            return None, None
        match = _AMOUNT.fullmatch(value)
        if not match:
            problem = f"{_quote(value)} is not an amount" if value else "the amount is missing"
            raise self.error(problem, where)
        number, unit = Fraction(match[1]), match[2]
        if unit == "%":
            return number, Mode.RATIO
        if unit:
            if unit not in _UNITS:
                raise self.error(f"{_quote(unit)} is not a unit", where)
            return number * _UNITS[unit], Mode.BYTES
        if number > 1:
            raise self.error(
                f"a number without a unit is a fraction of the device's memory, at most 1; "
                f"write {match[1]}gb or {match[1]}%",
                where,
            )
        return number, Mode.FRACTION if number else None

    def virtual_vram(self, value: str) -> int:
        match = _AMOUNT.fullmatch(value.strip())
        if not match or match[2]:
            raise self.error(f"{_quote(value)} is not an amount of virtual VRAM in GiB")
        return int(Fraction(match[1]) * GIB)

    def donors(self, names: str, compute_device: str) -> list[Entry]:
        entries: list[Entry] = []
        for name in names.split(","):
            where = f"donor {_quote(name)}"
            device = self.device(name, where)
            if device == compute_device != CPU:
                raise self.error("the donor is the compute device, so nothing can leave it", where)
            if any(device == entry.device for entry in entries):
                raise self.error(f"{device} is given twice", where)
            entries.append(Entry(device, None, wildcard=device == CPU))
        return entries


def _with_wildcard(entries: list[Entry]) -> tuple[Entry, ...]:
    """``entries`` with exactly one wildcard: the CPU where none is written."""
    if any(entry.wildcard for entry in entries):
        return tuple(entries)
    if any(entry.device == CPU for entry in entries):
        return tuple(Entry(e.device, e.amount, wildcard=e.device == CPU) for e in entries)
    return (*entries, Entry(CPU, None, wildcard=True))


def _quote(text: str, limit: int = 80) -> str:
    shown = text if len(text) <= limit else text[: limit - 3] + "..."
    return ascii(shown)


# --------------------------------------------------------------------------------------------
# Allocation -> Split
# --------------------------------------------------------------------------------------------


def plan_split(
    allocation: Allocation, sizes: ModelSizes, device_memory: Mapping[str, int]
) -> Split:
    """Decide the home of every block and embedding.

    Quotas are filled in the order written and never exceeded, except for the wildcard's and
    except that the compute device always gets the floor: non-block weights and slots.
    ``device_memory`` maps device names to their total bytes.
    """
    quotas = allocation.quotas(sizes.total_bytes, device_memory)
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
    note = f"below the floor: {split.compute_device} has a quota of {quota}, "
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
