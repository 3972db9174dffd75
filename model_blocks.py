"""What a model is made of, found by its structure: its blocks, and what is called as a whole.

A block is a member of a list of modules that holds a real share of the model. No class of model is
known here by name.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .module_calls import children_called_by, has_forward, methods_of, names_around

LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict)

# A list with a smaller share of a model's bytes stays resident.
REAL_SHARE = 0.02

# A ``Sequential`` member of a list with a larger share of the model is more than one block.
LARGE_SHARE = 0.05

# Parts of blocks that are smaller than this move with the block: a copy of their own costs the host
# some 50 us, and a bus the same.
PART_BYTES = 32 << 20

# Of a block that moves in parts, these are so much at least; the rest stays resident.
PARTS_SHARE = 0.95

# Modules that a Wan calls as a whole before its blocks, large enough to be worth moving. Their
# names stand in every checkpoint.
EMBEDDINGS = ("time_projection", "text_embedding", "img_emb")

_Member = tuple[str, torch.nn.Module]
_Members = list[_Member]


@dataclass(frozen=True, eq=False)
class Part:
    """Modules of a model that move together: one block, a part of one, or an embedding.

    ``calls`` are the names of the modules whose calls want it: its own, and those of children that
    are called by others. ``block`` names the block that it is a part of.
    """

    name: str
    module: torch.nn.Module
    calls: tuple[str, ...]
    block: str | None = None


@dataclass(frozen=True, eq=False)
class ModelParts:
    """The parts of a model: ``blocks`` in the order in which they are likely to run.

    ``tables`` are large tables of vectors that are looked up by the number of a token, of which a
    pass needs a few rows.
    """

    blocks: tuple[Part, ...]
    embeddings: tuple[Part, ...]
    tables: tuple[Part, ...]

    @property
    def all(self) -> tuple[Part, ...]:
        """The blocks, then the embeddings, then the tables."""
        return self.blocks + self.embeddings + self.tables

    def non_block(self, root: torch.nn.Module) -> set[int]:
        """The ids of the tensors of ``root`` that belong to no part, or are tied to others."""
        parts = [(id(m), part.name) for part in self.all for m in part.module.modules()]
        shared = {module for module, count in Counter(m for m, _ in parts).items() if count > 1}
        owners = dict(parts)
        holders: dict[int, set[str | None]] = {}
        for module in root.modules():
            owner = None if id(module) in shared else owners.get(id(module))
            for tensor in tensors_of(module, recurse=False):
                holders.setdefault(id(tensor), set()).add(owner)
        return {tensor for tensor, names in holders.items() if len(names) > 1 or None in names}


def root_of(model: torch.nn.Module) -> torch.nn.Module:
    """What of an inner model is split: its diffusion model; of others, as text encoders, all."""
    diffusion_model = getattr(model, "diffusion_model", None)
    return model if diffusion_model is None else diffusion_model


def is_swappable(model: torch.nn.Module) -> bool:
    """Whether an inner model has blocks to swap, and is not a VAE.

    What decodes is a VAE: a picture is one run through each of its parts, and most of those are
    smaller than what they compute.
    """
    return not hasattr(model, "decode") and has_blocks(root_of(model))


def has_blocks(root: torch.nn.Module) -> bool:
    """Whether a model has blocks to swap."""
    return next(_lists(root, "", _nbytes(root)), None) is not None


def parts_of(root: torch.nn.Module, in_parts: bool = False) -> ModelParts:
    """The parts of a model; none where it has no lists that are worth it.

    With ``in_parts``, blocks are divided where they can be.
    """
    whole = _nbytes(root)
    blocks: list[Part] = []
    seen: dict[int, int] = {}
    for name, module in _in_execution_order(list(_lists(root, "", whole))):
        if id(module) in seen:  # in two places, or a part of another block: one more way to call it
            index = seen[id(module)]
            blocks[index] = replace(blocks[index], calls=(*blocks[index].calls, name))
            continue
        divided = list(_divided(name, module)) if in_parts else []
        seen[id(module)] = len(blocks)
        for part in divided or [_part(root, name, module)]:
            seen |= dict.fromkeys(map(id, part.module.modules()), len(blocks))
            blocks.append(part)
    embeddings = [
        _part(root, name, child)
        for name, child in root.named_children()
        if blocks and name in EMBEDDINGS and seen.keys().isdisjoint(map(id, child.modules()))
    ]
    tables = [
        _part(root, name, module)
        for name, module in root.named_modules()
        if blocks
        and isinstance(module, torch.nn.Embedding)
        and id(module) not in seen
        and _nbytes(module) >= REAL_SHARE * whole
    ]
    return ModelParts(tuple(blocks), tuple(embeddings), tuple(tables))


def _in_execution_order(lists: Sequence[_Members]) -> Iterator[_Member]:
    """The members of all lists: one list after the other, but for those that run side by side.

    Such a list is told by blocks of a class that is derived from that of the other's.
    """
    kinds = [type(members[0][1]) for members in lists]
    together: dict[int, list[int]] = {}
    for index, kind in enumerate(kinds):
        bases = (i for i, base in enumerate(kinds) if base is not kind and issubclass(kind, base))
        together.setdefault(next(bases, index), []).append(index)
    for indices in together.values():
        places = [
            ((position + 0.5) / len(lists[index]), index, member)
            for index in indices
            for position, member in enumerate(lists[index])
        ]
        yield from (member for *_, member in sorted(places, key=lambda place: place[:2]))


def _part(root: torch.nn.Module, name: str, module: torch.nn.Module) -> Part:
    above = {type(module) for module in _above(root, name)}
    children = [f"{name}.{child}" for child in children_called_by(above, module)]
    return Part(name, module, (name, *children) if has_forward(module) else tuple(children))


def _divided(name: str, block: torch.nn.Module) -> Iterator[Part]:
    """The large children of a block, if they are most of it and each is called as one.

    A child whose own children or methods the block calls (Flux: ``img_attn.qkv``, SD 3:
    ``x_block.pre_attention``) is wanted in turns with others: in parts it would travel twice.
    """
    children = [
        (f"{name}.{path}", child)
        for path, child in _children(block)
        if _nbytes(child) >= PART_BYTES
    ]
    named = names_around(type(block))
    enough = sum(_nbytes(child) for _, child in children) >= PARTS_SHARE * _nbytes(block)
    if len(children) > 1 and enough and not any(_is_entered(c, named) for _, c in children):
        for path, child in children:
            yield Part(path, child, (path,), block=name)


def _children(block: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The direct children of a block, and those in its lists."""
    for key, child in block.named_children():
        if isinstance(child, LISTS):
            yield from ((f"{key}.{path}", member) for path, member in _children(child))
        else:
            yield key, child


def _is_entered(child: torch.nn.Module, named: frozenset[str]) -> bool:
    """Whether the names that are used around a block reach into one of its children."""
    inner = {name for name, _ in child.named_children()}
    inner.update(name for name, _ in methods_of(type(child)) if name != "forward")
    return not has_forward(child) or not named.isdisjoint(inner)


def _above(root: torch.nn.Module, name: str) -> Iterator[torch.nn.Module]:
    """The modules that hold the one called ``name``, from the root on."""
    keys = name.split(".")
    for depth in range(len(keys)):
        yield root.get_submodule(".".join(keys[:depth]))


def _lists(module: torch.nn.Module, name: str, whole: int) -> Iterator[_Members]:
    """The members, by name, of the outermost lists with a real share of ``whole`` bytes."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if not isinstance(child, LISTS):
            yield from _lists(child, path, whole)
        elif _nbytes(child) >= max(1, REAL_SHARE * whole):
            yield list(_members(child, path, whole))


def _members(container: torch.nn.Module, name: str, whole: int) -> Iterator[_Member]:
    """The blocks in a list: its members, but for lists and for long chains the members of those."""
    for key, member in container.named_children():
        path, nbytes = f"{name}.{key}", _nbytes(member)
        chain = isinstance(member, torch.nn.Sequential) and nbytes > LARGE_SHARE * whole
        if isinstance(member, LISTS) or chain:
            yield from _members(member, path, whole)
        elif isinstance(container, torch.nn.Sequential) and nbytes > LARGE_SHARE * whole:
            # A link of a chain may be a transformer of its own.
            lists = list(_lists(member, path, nbytes))
            yield from itertools.chain(*lists) if lists else [(path, member)]
        elif nbytes:
            yield path, member


def _nbytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(module))


def modules_beside(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What an inner model holds beside what is split."""
    root = root_of(model)
    return [] if root is model else [c for c in model.children() if c is not root]


def tensors_of(module: torch.nn.Module, recurse: bool = True) -> Iterator[torch.Tensor]:
    """Every parameter and buffer of a module, and of those in it unless not to ``recurse``."""
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)
