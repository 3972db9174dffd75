"""Which models this plugin loads: where their allocation and their state are found."""

from __future__ import annotations

import torch

from . import device_utils
from .allocation_parser import Allocation, parse_allocation
from .model_blocks import is_swappable

# Where MultiGPU leaves the allocation, and where this plugin leaves its state: on the inner model,
# which all clones of a patcher share; a copy of that has ``None`` for a state.
META = "_distorch_v2_meta"

STATE = "_distorch2_block_swap"


def allocation_text(model: torch.nn.Module) -> str:
    """The allocation string that MultiGPU stored on an inner model, or ``""``."""
    return getattr(model, META, {}).get("full_allocation", "")


def diffusion_model_of(model) -> torch.nn.Module | None:
    """The diffusion model of an inner model; a text encoder or VAE has none."""
    return getattr(model, "diffusion_model", None)


def is_swapped_here(patcher) -> bool:
    """Whether this plugin, and not MultiGPU, loads the model of ``patcher``."""
    model = patcher.model
    if getattr(model, STATE, None) is not None:
        return True
    return (
        bool(allocation_text(model))
        and not getattr(patcher, "is_dynamic", bool)()
        and is_swappable(model)
    )


def follow_allocation(patcher) -> None:
    """Check the allocation of a patcher's model, and plan anew if it is not the one it had.

    Raises:
        AllocationError: the string cannot be followed as written.
    """
    allocation = read_allocation(patcher)
    allocation.check(device_utils.total_memories(allocation.devices))
    state = getattr(patcher.model, STATE, None)
    if state is not None:
        state.choice.follow(allocation)


def forget_homes(patcher) -> None:
    """Free the RAM that a patcher's model has as homes of what is resident."""
    state = getattr(patcher.model, STATE, None)
    if state is not None:
        state.forget_homes()


def read_allocation(patcher) -> Allocation:
    """The parsed allocation of a patcher's model.

    Raises:
        AllocationError: the string cannot be followed as written.
    """
    names = device_utils.device_names()
    compute = device_utils.name_of(patcher.load_device)
    return parse_allocation(allocation_text(patcher.model), names, compute)
