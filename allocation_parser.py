"""From an allocation string to what it asks for: pure text and arithmetic.

``parse_allocation`` reads what the user typed; the quotas of the ``Allocation`` it gives are what
``split_planner`` plans with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction

GIB = 1 << 30

MIB = 1 << 20

KIB = 1 << 10

CPU = "cpu"
AUTO = "auto"

GRAMMAR = (
    "Write 'device,amount' entries separated by ';'. Amounts are all bytes (2.5gb, 512mb), all "
    "ratios of the model (25%), or all fractions of each device's memory (0.5). 'auto' among them "
    "is what is free there. One entry may be '*': it takes the rest. "
    "Example: cuda:0,2.5gb;cpu,* or cuda:0,auto;cpu,*"
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
    device's memory; ``None`` where ``*`` or ``auto`` was written. A ``wildcard`` takes whatever is
    left; one with an amount, the CPU where no ``*`` was written, takes that in its turn first.
    ``auto`` is as much as is free on the device when the model is loaded.
    """

    device: str
    amount: Fraction | None
    wildcard: bool = False
    auto: bool = False


@dataclass(frozen=True)
class Quota:
    """The most bytes of weights that a device may hold; ``None``: no limit was given.

    ``auto``: nobody wrote that number, it is what was free.
    """

    device: str
    nbytes: int | None
    wildcard: bool = False
    auto: bool = False


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

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of the entries."""
        return tuple(entry.device for entry in self.entries)

    @property
    def auto_devices(self) -> tuple[str, ...]:
        """The devices whose amount is ``auto``."""
        return tuple(entry.device for entry in self.entries if entry.auto)

    def check(self, device_memory: Mapping[str, int]) -> None:
        """Check that the memory of every device is known that has to be; see ``quotas``.

        Raises:
            AllocationError: its backend does not tell it.
        """
        if self.mode not in (Mode.FRACTION, Mode.VIRTUAL_VRAM):
            return
        for entry in self.entries:
            if not entry.wildcard and not entry.auto and not device_memory[entry.device]:
                raise AllocationError(
                    f"Allocation {_quote(self.source)}: how much memory {entry.device} has is "
                    f"not known here. Give bytes or a ratio. {GRAMMAR}"
                )

    def quotas(
        self,
        model_bytes: int,
        device_memory: Mapping[str, int],
        spare: Mapping[str, int] | None = None,
    ) -> tuple[Quota, ...]:
        """The entries as byte quotas for a model of ``model_bytes``, in the order written.

        ``device_memory`` maps device names to their total memory in bytes; it is read in fraction
        and virtual VRAM mode only. ``spare`` maps the ``auto_devices`` to the bytes that they have
        for weights. A compute device that the string does not name has no quota.

        Raises:
            AllocationError: the memory of a device is needed, and its backend does not tell it.
        """
        self.check(device_memory)
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
            if entry.auto:
                return max(0, spare[entry.device])
            return None if entry.amount is None else int(entry.amount * units[entry.device])

        return tuple(Quota(e.device, in_bytes(e), e.wildcard, e.auto) for e in self.entries)


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


def in_bytes(allocation: Allocation, quotas: Sequence[Quota]) -> str:
    """The allocation with these quotas as a string of bytes, which MultiGPU reads as well.

    It takes a string for one of bytes by a letter in it, which a bare ``*`` would not have.
    """
    entries = (f"{q.device},{0 if q.wildcard else q.nbytes}b{'*' * q.wildcard}" for q in quotas)
    _, separator, stored = allocation.source.partition("#")
    compute, *virtual = stored.split(";") if separator else [""]
    return f"{';'.join(entries)}#{';'.join([compute or allocation.compute_device, *virtual])}"


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
            value = value.strip().lower()
            auto = value == AUTO
            amount, mode = (None, None) if auto else self.amount(value, where)
            entry = Entry(device, amount, wildcard=amount is None and not auto, auto=auto)
            if entry.wildcard and any(other.wildcard for other in entries):
                raise self.error("there is more than one '*'", where)
            if mode is not None:
                modes.setdefault(mode, where)
            entries.append(entry)
        if len(modes) > 1:
            mixed = " and ".join(f"{where} is {mode.value}" for mode, where in modes.items())
            raise self.error(f"the amounts are mixed, {mixed}")
        mode = next(iter(modes), Mode.BYTES)
        if (
            mode is Mode.RATIO
            and len(entries) > 1
            and not any(e.wildcard or e.auto for e in entries)
        ):
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
        return tuple(replace(e, wildcard=e.device == CPU) for e in entries)
    return (*entries, Entry(CPU, None, wildcard=True))


def _quote(text: str, limit: int = 80) -> str:
    shown = text if len(text) <= limit else text[: limit - 3] + "..."
    return ascii(shown)
