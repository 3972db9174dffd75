"""How long a forward pass of a split takes: the order of copies and computation, in numbers.

Pure arithmetic over a ``Split``: ``predict`` follows the rules of ``swap_executor``, ``improve``
exchanges slots for resident blocks where that pays, ``cheapest_quota`` says how little memory costs
no time. Nothing is measured or moved here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from .allocation_parser import GIB, MIB, Allocation, Entry, Mode
from .split import Split
from .split_planner import donor_with_room, plan_split

# Passes until the schedule repeats; the order of copies goes on from one pass to the next.
WARM_UP = 4
MEASURED = 2

# As a share of a pass: less is not worth moving a block for, more is not free.
WORTH = 0.02
FREE = 0.02

# A link that nobody has timed yet: PCIe 4.0 with eight lanes, in bytes per second.
ASSUMED_BANDWIDTH = 12e9


@dataclass(frozen=True)
class Timing:
    """What a timed forward pass has shown, in seconds; waiting for copies is counted nowhere.

    ``compute`` is what the blocks take, ``before`` and ``after`` what the forward does before the
    first and behind the last of them, ``between`` the pause until the next pass begins.
    ``bandwidth`` is that of the link from each donor, in bytes a second.
    """

    compute: float
    bandwidth: Mapping[str, float]
    before: float = 0.0
    after: float = 0.0
    between: float = 0.0

    @property
    def resident(self) -> float:
        """Seconds of a pass with everything resident."""
        return self.before + self.compute + self.after

    def transfer(self, donor: str, nbytes: int) -> float:
        """Seconds that ``nbytes`` from ``donor`` are under way."""
        return nbytes / self.bandwidth.get(donor, ASSUMED_BANDWIDTH)


def transfer_line(split: Split) -> str:
    """For the table, before any pass was timed: how long the copies of a pass take."""
    devices = {split.homes[i] for i in split.swapped}
    nbytes = {donor: split.bytes_per_pass and split.bytes_on(donor) for donor in devices}
    seconds = max(nbytes.values(), default=0) / ASSUMED_BANDWIDTH
    return f"  that takes {seconds:.3g} s at {ASSUMED_BANDWIDTH / 1e9:.0f} GB/s (assumed)"


def predict(split: Split, timing: Timing) -> float:
    """Seconds of a forward pass in the steady state, the pause between passes not counted.

    Blocks compute for equal shares of ``timing.compute``, swapped embeddings for equal shares of
    ``timing.before``. Copies of one link queue up behind each other; each waits until its slot is
    free, each block for its copy.
    """
    blocks = len(split.sizes.blocks)
    if len(split.swapped) <= split.slots:
        return timing.resident
    share = timing.compute / blocks
    order = [*range(blocks, len(split.sizes.parts)), *range(blocks)]
    copies = {
        i: (split.homes[i], timing.transfer(split.homes[i], split.sizes.parts[i].nbytes))
        for i in split.swapped
    }
    link_free = dict.fromkeys(split.homes, 0.0)
    # In the order in which they are taken. What the forward holds beside the block that its loop is
    # at keeps a slot each.
    slot_free = [0.0] * max(1, split.slots - split.sizes.min_slots + 1)
    leading = [i for i in order if i >= blocks and i in copies]
    shares = dict.fromkeys(leading, timing.before / max(1, len(leading)))
    shares |= dict.fromkeys(range(blocks), share)
    now, passes = 0.0, []
    for _ in range(WARM_UP + MEASURED):
        start = now
        if not leading:
            now += timing.before
        for index in order:
            if index in copies:
                home, seconds = copies[index]
                arrival = max(link_free[home], slot_free.pop(0)) + seconds
                link_free[home] = arrival
                now = max(now, arrival)
            now += shares.get(index, 0.0)
            if index in copies:
                slot_free.append(now)
        now += timing.after
        passes.append(now - start)
        now += timing.between
    return sum(passes[-MEASURED:]) / MEASURED


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
