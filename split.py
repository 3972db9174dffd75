"""What planning knows of a model, and what it decides: sizes, and the immutable split. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .allocation_parser import GIB, MIB, Allocation, Quota


@dataclass(frozen=True)
class Block:
    """What is placed and moved as one: its name and its packed size in bytes.

    A transformer block, or an embedding.
    """

    name: str
    nbytes: int


@dataclass(frozen=True)
class ModelSizes:
    """What planning needs to know of a model.

    ``blocks`` are in execution order; ``non_block_bytes`` always stay on the compute device;
    ``min_slots`` is how many blocks the model's forward may hold at once. ``embeddings`` run once
    before the blocks and are swapped like them where the quota has no room for them. ``idle`` are
    the indices of ``parts`` that no pass runs; they can still be called.
    """

    blocks: tuple[Block, ...]
    non_block_bytes: int
    min_slots: int = 1
    embeddings: tuple[Block, ...] = ()
    idle: frozenset[int] = frozenset()

    @cached_property
    def parts(self) -> tuple[Block, ...]:
        """All that has a home of its own: the blocks, then the embeddings."""
        return self.blocks + self.embeddings

    @cached_property
    def largest_block(self) -> int:
        """Bytes of the largest block."""
        return max(block.nbytes for block in self.blocks)

    @cached_property
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

    @cached_property
    def swapped(self) -> tuple[int, ...]:
        """Indices of the parts whose home is a donor."""
        return tuple(i for i, home in enumerate(self.homes) if home != self.compute_device)

    @cached_property
    def running(self) -> tuple[int, ...]:
        """Of those, the ones that a pass runs."""
        return tuple(i for i in self.swapped if i not in self.sizes.idle)

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of one slot: the largest swapped part, whether it ever runs or not."""
        return max((self.sizes.parts[i].nbytes for i in self.swapped), default=0)

    @property
    def bytes_per_pass(self) -> int:
        """Bytes that one forward pass copies to the compute device, once the slots are warm."""
        return sum(self.moved_from().values())

    def moved_from(self) -> dict[str, int]:
        """Of these, the bytes from each donor that any come from."""
        running = self.running
        if len(running) <= self.slots:
            return {}
        moved = dict.fromkeys((self.homes[i] for i in running), 0)
        for i in running:
            moved[self.homes[i]] += self.sizes.parts[i].nbytes
        return moved

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
        width = max(11, *(len(_quota_text(quota)) for quota in self.quotas), 0)
        row = f"  {{:<10}} {{:<8}} {{:>{width}}} {{:>7}} {{:>11}}".format
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
        if self.sizes.idle:
            idle = [i for i in self.swapped if i in self.sizes.idle]
            lines.append(
                f"  {len(self.sizes.idle)} that no pass has run: {len(idle)} of them swapped, "
                f"moved when they are called"
            )
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
    text = format_bytes(quota.nbytes) + (" +" if quota.wildcard else "")
    return f"auto {text}" if quota.auto else text
