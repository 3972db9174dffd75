"""One way to run a model whose blocks do not all fit on the compute device: the interface.

A way gets a model with its weights in RAM and makes it ready to run on the compute device with a
given share of its blocks' weights elsewhere. Ways of others run their own code where it is at hand;
WanVideoWrapper's is told in words of our own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import torch
from machine import Machine

from block_swap.allocation_parser import parse_allocation
from block_swap.split import ModelSizes, Split
from block_swap.split_planner import plan_split

Pass = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Point:
    """How much is swapped: ``split`` is this plugin's, the others get as many bytes of blocks."""

    model: str
    form: str
    share: int  # percent asked for
    split: Split

    @property
    def layers(self) -> int:
        return len(self.split.sizes.blocks)

    @property
    def swapped(self) -> int:
        """How many blocks are swapped."""
        return blocks_swapped(self.split)

    @property
    def swapped_bytes(self) -> int:
        """Bytes of what is swapped: what has to move in every pass."""
        return sum(self.split.sizes.parts[i].nbytes for i in self.split.swapped)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all other weights: what may stay on the compute device."""
        return self.split.sizes.total_bytes - self.swapped_bytes


class Way(ABC):
    """One way. ``load`` and ``unload`` alternate; a way is loaded with one model at a time."""

    name = ""
    only_bf16 = False
    only_everything = False  # swaps all blocks or none
    mode: Callable[[], AbstractContextManager] = torch.inference_mode  # of loading and running
    warm_up = 3  # passes of one length until they take what all further ones do

    def __init__(self, machine: Machine):
        self.machine, self.device = machine, machine.device

    def missing(self) -> str | None:
        """Why this way is not at hand here; ``None`` where it is."""
        return None

    def does_not_take(self, point: Point) -> str | None:
        """Why this way has nothing to measure at ``point``."""
        if self.only_bf16 and point.form != "bf16":
            return "bf16 only"
        if self.only_everything and point.swapped < point.layers:
            return "swaps all blocks or none"
        return None if point.swapped else "nothing to swap"

    @abstractmethod
    def load(self, model: torch.nn.Module, point: Point) -> Pass:
        """Make ``model`` ready; returns what runs one forward pass."""

    def unload(self) -> None:  # noqa: B027  some ways have nothing to let go of
        """Let go of everything that ``load`` made."""

    def split(self, point: Point) -> Split:
        """What is swapped now."""
        return point.split

    def remark(self) -> str | None:
        """What a reader of the figures should know of the load, once per point."""
        return None

    def device_bytes_beside(self) -> int:
        """Bytes on the compute device that PyTorch's allocator does not know of."""
        return 0


class Resident(Way):
    """Everything on the compute device: the time that no other way can be below."""

    name = "everything resident"

    def does_not_take(self, point):
        return None

    def load(self, model, point):
        return model.to(self.device)


def blocks_swapped(split: Split) -> int:
    """How many blocks a split swaps."""
    return sum(index < len(split.sizes.blocks) for index in split.swapped)


def split_with(sizes: ModelSizes, share: float, compute: str) -> Split:
    """The split with the most on ``compute`` that swaps ``share`` percent of the blocks' bytes.

    To half of the smallest block; the floor, where nothing swaps as much.
    """
    nbytes = [block.nbytes for block in sizes.blocks]
    wanted = share / 100 * sum(nbytes) - min(nbytes) / 2
    splits = _splits(sizes, compute)
    moved = (sum(sizes.parts[i].nbytes for i in split.swapped) for split in splits)
    return next((s for s, n in zip(splits, moved, strict=False) if n >= wanted), splits[-1])


@cache
def _splits(sizes: ModelSizes, compute: str) -> tuple[Split, ...]:
    """The splits by quotas from all of the model down to none of its blocks.

    What they swap does not grow with every step: blocks of two sizes have slots of two sizes.
    """
    step = min(block.nbytes for block in sizes.blocks)
    quotas = range(sizes.total_bytes, sizes.non_block_bytes, -step)
    texts = (f"{compute},{quota}b;cpu,*" for quota in quotas)
    allocations = (parse_allocation(text, ("cpu", compute), compute) for text in texts)
    return tuple(plan_split(allocation, sizes, {}) for allocation in allocations)
