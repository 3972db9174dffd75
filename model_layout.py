"""How a model is packed: which of its modules move together, and what planning needs to know of it.

Blocks move whole, or in parts: in large children that they call one after the other. Slots are
smaller then, and more stays on the compute device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from .model_blocks import ModelParts, Part, modules_beside, parts_of, root_of, tensors_of
from .packed_weights import Pack
from .split import Block, ModelSizes


@dataclass(frozen=True, eq=False)
class Layout:
    """The packs of a model, nothing of which is placed yet.

    ``packs`` are those of ``sizes.parts``, ``non_block`` that of what stays on the compute device.
    ``calls`` are, for every pack, the names of the modules whose calls want it, ``wholes`` those of
    blocks that move in parts, with the indices of these.
    """

    packs: tuple[Pack, ...]
    non_block: Pack
    sizes: ModelSizes
    calls: tuple[tuple[str, ...], ...]
    wholes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: torch.nn.Module, in_parts: bool = False) -> Layout:
        """The layout of an inner model, its blocks whole or, as far as they have some, in parts."""
        root = root_of(model)
        parts = parts_of(root, in_parts)
        stays = parts.non_block(root)
        parts = replace(parts, tables=tuple(t for t in parts.tables if not _is_tied(t, stays)))
        packs = tuple(
            Pack.layout(part.module.modules(), lambda tensor: id(tensor) not in stays)
            for part in parts.all
        )
        non_block = Pack.layout(root.modules(), lambda tensor: id(tensor) in stays)
        # What the inner model holds beside the diffusion model (sigmas) moves along, unpacked:
        # ComfyUI replaces these modules and buffers at will.
        beside = sum(t.nbytes for module in modules_beside(model) for t in tensors_of(module))
        named = zip(parts.all, packs, strict=True)
        sized = [Block(part.name, pack.nbytes) for part, pack in named]
        first, last = len(parts.blocks), len(parts.blocks) + len(parts.embeddings)
        sizes = ModelSizes(
            blocks=tuple(sized[:first]),
            embeddings=tuple(sized[first:last]),
            tables=tuple(sized[last:]),
            non_block_bytes=non_block.nbytes + beside,
        )
        calls = tuple(part.calls for part in parts.all)
        return cls(packs, non_block, sizes, calls, dict(_wholes(parts)))

    @property
    def tables(self) -> tuple[Pack, ...]:
        """The packs that are looked up where they are."""
        return self.packs[len(self.packs) - len(self.sizes.tables) :]

    @property
    def travelling(self) -> tuple[Pack, ...]:
        """The packs of blocks and embeddings, which are swapped where they are not resident."""
        return self.packs[: len(self.packs) - len(self.sizes.tables)]

    @property
    def part_names(self) -> str:
        """What the parts of blocks are called in them."""
        blocks = self.sizes.blocks
        names = (
            blocks[index].name.removeprefix(f"{whole}.")
            for whole, indices in self.wholes.items()
            for index in indices
        )
        return ", ".join(dict.fromkeys(names))


def _is_tied(table: Part, stays: set[int]) -> bool:
    """Whether others have the tensors of a table as well: these stay where all of them compute."""
    return all(id(tensor) in stays for tensor in tensors_of(table.module))


def _wholes(parts: ModelParts) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in dict.fromkeys(part.block for part in parts.blocks if part.block):
        yield name, tuple(i for i, part in enumerate(parts.blocks) if part.block == name)
