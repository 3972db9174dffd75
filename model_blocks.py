"""What a model is made of: its blocks, its embeddings, and what stands beside them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

WAN_MODULES = "comfy.ldm.wan."

# Modules that a Wan calls as a whole before its blocks, large enough to be worth moving. Their
# names stand in every checkpoint.
EMBEDDINGS = ("time_projection", "text_embedding", "img_emb")


def is_wan(diffusion_model) -> bool:
    """Whether a diffusion model is of a class that ComfyUI defines for Wan, or derived from one."""
    return any(c.__module__.startswith(WAN_MODULES) for c in type(diffusion_model).__mro__)


def block_lists(diffusion_model: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    """The block lists of a Wan diffusion model by name; empty for any other model.

    Its further lists (``vace_blocks``) are told by holding the same kind of block as ``blocks``.
    """
    if not is_wan(diffusion_model):
        return {}
    lists = {
        name: child
        for name, child in diffusion_model.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child)
    }
    if "blocks" not in lists:
        return {}
    kind = type(lists["blocks"][0])
    return {name: child for name, child in lists.items() if isinstance(child[0], kind)}


def embeddings(diffusion_model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The embeddings of a Wan diffusion model that may be swapped, by name."""
    modules = {name: getattr(diffusion_model, name, None) for name in EMBEDDINGS}
    return {name: module for name, module in modules.items() if module is not None}


def in_execution_order(
    lists: dict[str, torch.nn.ModuleList],
) -> list[tuple[str, int, torch.nn.Module]]:
    """(list, position, block) of every block; lists of different length run side by side."""
    blocks = [
        ((position + 0.5) / len(modules), order, name, position, block)
        for order, (name, modules) in enumerate(lists.items())
        for position, block in enumerate(modules)
    ]
    return [entry[2:] for entry in sorted(blocks, key=lambda entry: entry[:2])]


def modules_beside(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What an inner model holds beside its diffusion model."""
    return [child for name, child in model.named_children() if name != "diffusion_model"]


def tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer of a module."""
    yield from module.parameters()
    yield from module.buffers()
