"""The joins to ComfyUI's accounting: what is free, what a pass needs, what a load takes.

What ComfyUI is told of a swapped model is true at every moment; what it says is free, and what
passes were seen to need, is what ``auto`` plans with. Page-locking is ComfyUI's, within a budget.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from contextvars import ContextVar

import torch

from . import device_utils, step_time
from .allocation_parser import AUTO, CPU
from .model_blocks import is_swappable
from .model_lookup import (
    STATE,
    allocation_text,
    diffusion_model_of,
    is_swapped_here,
    read_allocation,
)
from .multigpu_strings import readable_by_multigpu
from .page_locks import Limit, PageLocks, Pinning
from .pass_memory import SPATIAL, TEMPORAL, PassKind, PassMemory, Room
from .patch_table import Patch
from .split import format_bytes
from .swapped_model import SwappedModel

logger = logging.getLogger("MultiGPU")

# What passes were seen to need, as long as the process lives.
pass_memory = PassMemory()

# On an inner model: the kind of pass that ComfyUI has last asked the memory of.
ASKED = "_distorch2_asked"

# What ComfyUI wants to have free beside the weights for the load that is going on, in bytes.
_wanted_free: ContextVar[float] = ContextVar("wanted_free", default=0.0)

# The patchers of ControlNets and the like that are loaded in one go with a swapped model.
_loaded_beside: ContextVar[tuple] = ContextVar("loaded_beside", default=())


def _kind_of(model, shape) -> PassKind:
    dtype = model.get_dtype() if hasattr(model, "get_dtype") else None
    return PassKind.of(type(_uncompiled(model)).__name__, dtype, shape)


def _uncompiled(model):
    """The diffusion model of an inner model, also while ``torch.compile`` stands in its place."""
    diffusion_model = diffusion_model_of(model)
    return getattr(diffusion_model, "_orig_mod", diffusion_model)


def memory_required(wrapped, model, args, kwargs):
    """What a pass needs beside the weights: for ``auto``, what it was seen to need."""
    estimate = wrapped(*args, **kwargs)
    swapped = getattr(model, STATE, None) is not None or is_swappable(model)
    if not allocation_text(model) or not swapped:
        return estimate
    kind = _kind_of(model, kwargs["input_shape"] if "input_shape" in kwargs else args[0])
    setattr(model, ASKED, kind)
    return pass_memory.need(kind, estimate) if AUTO in allocation_text(model).lower() else estimate


def room_for_weights(patcher, state: SwappedModel, extra_memory: float) -> Room:
    """What the compute device has for weights once the next pass has what it needs.

    ``extra_memory`` is ComfyUI's answer: at least a part of what is free (two fifths of it), as its
    estimates may be too high. Where the need is known that is no longer good enough.
    """
    import comfy.model_management as mm

    model, held = patcher.model, state.compute_bytes()
    free = mm.get_free_memory(patcher.load_device) + held
    kind = model.__dict__.pop(ASKED, None)
    need = free - held - extra_memory
    if mm.vram_state == mm.VRAMState.NO_VRAM:
        pass
    elif kind is not None and pass_memory.knows(kind):
        # For ``auto`` ComfyUI was told, and has added what ControlNets and the like will need.
        known = max(_wanted_free.get() if state.choice.is_auto else 0, pass_memory.need(kind, 0))
        need = max(mm.minimum_inference_memory(), known + mm.extra_reserved_memory())
    elif extra_memory >= EVERYTHING:
        need = mm.minimum_inference_memory()
    need += _still_to_come(patcher.load_device)
    if kind is None:
        return Room(free, need)
    what = kind.describe(*_downscaling(getattr(model, "latent_format", None)))
    return Room(free, need, what, kind.latent[1:])


def _still_to_come(device: torch.device) -> int:
    """Bytes of weights that models loaded in one go with a swapped one have yet to put there."""
    coming = (p for p in _loaded_beside.get() if p.load_device == device)
    return sum(max(0, patcher.model_size() - patcher.loaded_size()) for patcher in coming)


def _downscaling(latent_format) -> tuple[int, int]:
    """Pixels and frames of one latent position; ComfyUI knows them for most formats."""
    spatial = getattr(latent_format, "spacial_downscale_ratio", SPATIAL)
    temporal = getattr(latent_format, "temporal_downscale_ratio", 1)
    return spatial, temporal if temporal > 1 else TEMPORAL


def warn_if_too_little_is_left(state: SwappedModel, room: Room) -> None:
    """Before the first step, once for every cause: a typed quota leaves the video too little."""
    short = state.split.compute_bytes - room.nbytes
    device = state.split.compute_device
    if state.choice.is_auto or short <= 0 or device == CPU or not room.what:
        return
    if state.is_news((room.what, state.split)):
        logger.warning(
            f"[MultiGPU] block swap: {room.what} may need {format_bytes(int(room.need))} of "
            f"{device}, and {format_bytes(state.split.compute_bytes)} of weights leave "
            f"{format_bytes(short)} too little of it: type {device},"
            f"{step_time.as_amount_within(room.nbytes)} or less, or {device},auto"
        )


def warn_if_ram_is_short(
    state: SwappedModel, model: torch.nn.Module, ram_for: Callable[[int, object], int]
) -> None:
    """Before homes are made, once for every cause: RAM has no room for them."""
    coming = state.ram_to_come()
    left = ram_for(coming, model) if coming else 0
    if left < coming and state.is_news((coming, state.split)):
        device = state.split.compute_device
        quota = "" if state.choice.is_auto else f"a larger quota for {device}, "
        logger.warning(
            f"[MultiGPU] block swap: {format_bytes(coming)} of homes are to come to RAM, which has "
            f"{format_bytes(max(0, left))} left: this may end in swapping, or in the process being "
            f"killed. What helps: {quota}another donor, a smaller format (fp8, GGUF)"
        )


@functools.cache
def page_locks() -> PageLocks:
    """Page-locking as ComfyUI does it, within a budget: from 0.24 on it keeps to none itself."""
    import comfy.model_management as mm

    def room() -> int:
        if not hasattr(mm, "MAX_PINNED_MEMORY"):
            return sys.maxsize
        return int(mm.MAX_PINNED_MEMORY) - mm.TOTAL_PINNED_MEMORY

    def make_room(nbytes: int) -> None:
        if hasattr(mm, "ensure_pin_registerable"):
            mm.ensure_pin_registerable(nbytes, evict_active=False)

    def able() -> bool:
        return getattr(mm, "MAX_PINNED_MEMORY", 1) > 0

    def limit() -> Limit:
        return Limit.of(device_utils.ram()[1], sys.platform == "win32")

    allowed = not getattr(mm.args, "disable_pinned_memory", False)
    pinning = Pinning(
        pin=lambda tensor: mm.pin_memory(tensor),
        unpin=lambda tensor: mm.unpin_memory(tensor),
        room=room,
        make_room=make_room,
        able=able,
        allowed=allowed,
    )
    return PageLocks(pinning, limit)


# Whether models that are unloaded keep their blocks on other accelerators.
donors_stay: ContextVar[bool] = ContextVar("donors_stay", default=False)

# ComfyUI asks for this much, or more, to mean "everything".
EVERYTHING = 1e29


def free_memory(wrapped, instance, args, kwargs):
    """Who needs room on one device gains nothing from blocks that leave another."""

    def bind(memory_required, device, keep_loaded=(), *_, **__):
        return memory_required, device, keep_loaded

    import comfy.model_management as mm

    memory_required, device, keep_loaded = bind(*args, **kwargs)
    if memory_required < EVERYTHING and not mm.DISABLE_SMART_MEMORY:  # or all of it goes
        _give_back_spare(memory_required, device, keep_loaded)
    token = donors_stay.set(memory_required < EVERYTHING)
    try:
        return wrapped(*args, **kwargs)
    finally:
        donors_stay.reset(token)


def _give_back_spare(memory_required: float, device, keep_loaded) -> None:
    """Before others are evicted, ``auto`` gives back what it has taken and gains no time by."""
    import comfy.model_management as mm

    for loaded in mm.current_loaded_models:
        if loaded.device != device or loaded.model is None or loaded in keep_loaded:
            continue
        state = getattr(loaded.model.model, STATE, None)
        missing = memory_required - mm.get_free_memory(device)
        if missing > 0 and state is not None and state.loaded and state.choice.may_spare:
            state.give_way(int(missing), state.tuner.cheapest_bytes)


def model_memory_required(wrapped, loaded_model, args, kwargs):
    """What a load will take of the compute device: the split's share, less what is there."""
    patcher = loaded_model.model
    if not is_swapped_here(patcher):
        return wrapped(*args, **kwargs)
    state = state_of(patcher)
    return max(0, state.choice.wanted_bytes - state.compute_bytes())


def model_memory(wrapped, loaded_model, args, kwargs):
    """What a load will take of RAM, and of what may be page-locked: homes are there already.

    ComfyUI takes it for the whole model, at every run of a sampler, and on small RAM unpins text
    encoder and VAE to make room.
    """
    state = getattr(loaded_model.model.model, STATE, None)
    return wrapped(*args, **kwargs) if state is None else state.homeless_bytes()


def model_mmap_residency(wrapped, loaded_model, args, kwargs):
    """The same for ComfyUI 0.18 to 0.20, as (bytes in RAM, bytes in all) of what is to come."""
    state = getattr(loaded_model.model.model, STATE, None)
    return wrapped(*args, **kwargs) if state is None else (0, state.homeless_bytes())


def load_models_gpu(original):
    """MultiGPU's ``load_models_gpu`` computes with the whole model and evicts everything else.

    ``original`` is ComfyUI's, which computes with ``model_memory_required``.
    """

    def wanted(models, memory_required=0, force_patch_weights=False, minimum_memory_required=None):
        return memory_required if minimum_memory_required is None else minimum_memory_required

    def load_models_gpu(wrapped, instance, args, kwargs):
        models = kwargs["models"] if "models" in kwargs else args[0]
        swapped = [m for m in models if hasattr(m, "model") and is_swapped_here(m)]
        if not swapped:
            with ExitStack() as stack:
                for patcher in models:
                    stack.enter_context(readable_by_multigpu(patcher))
                return wrapped(*args, **kwargs)
        known = {name: value for name, value in kwargs.items() if name != "force_full_load"}
        free = _wanted_free.set(wanted(*args[:4], **known))
        beside = _loaded_beside.set(tuple(_beside_swapped(models)))
        try:
            _give_way(swapped)
            result = original(*args, **kwargs)
        finally:
            _loaded_beside.reset(beside)
            _wanted_free.reset(free)
        for patcher in swapped:
            state = state_of(patcher)
            state.needs.note(state.compute_bytes())
        return result

    return load_models_gpu


def _beside_swapped(models) -> Iterator:
    """Of the patchers that are loaded together, those whose weights all go to their device."""
    for model in models:
        for patcher in (model, *model.model_patches_models()):
            elsewhere = allocation_text(patcher.model) or getattr(patcher, "is_dynamic", bool)()
            if not elsewhere:
                yield patcher


def _give_way(swapped) -> None:
    """``auto`` lets go of what those need that are loaded with it.

    ComfyUI frees nothing of models that it is about to load, and a ControlNet comes first.
    """
    import comfy.model_management as mm

    need = max(mm.minimum_inference_memory(), _wanted_free.get() + mm.extra_reserved_memory())
    for patcher in swapped:
        state, coming = state_of(patcher), _still_to_come(patcher.load_device)
        missing = coming + need - mm.get_free_memory(patcher.load_device)
        if coming and missing > 0 and state.choice.is_auto and state.loaded:
            state.give_way(int(missing))


def loaded_size(wrapped, patcher, args, kwargs):
    """What is there now: slots come and go with passes, not only with loads."""
    state = getattr(patcher.model, STATE, None)
    return wrapped(*args, **kwargs) if state is None else state.compute_bytes()


def state_of(patcher) -> SwappedModel:
    """The swap state of a patcher's model, made at its first load."""
    state = getattr(patcher.model, STATE, None)
    compiled = state is not None and state.swap.meets_compiled
    if compiled or (state is not None and state.swap.compute_device != patcher.load_device):
        state.unload(patcher.offload_device, donors_too=True)
        state = None
    if state is None:
        model = weakref.ref(patcher.model)

        def learn(shape, nbytes: int, failed: bool, least: int) -> None:
            note = pass_memory.fail if failed else pass_memory.learn
            note(_kind_of(model(), shape), nbytes, least)

        allocation, locks = read_allocation(patcher), page_locks()
        state = SwappedModel(patcher.model, allocation, locks, learn, whole=compiled)
        setattr(patcher.model, STATE, state)
    return state


def accounting_patches(host_load_models_gpu: Callable) -> list[Patch]:
    """What is patched of ComfyUI's accounting; ``host_load_models_gpu`` is its own function."""
    import comfy.model_management as mm

    manager = "comfy.model_management"
    loading = load_models_gpu(host_load_models_gpu)
    residency = Patch(manager, "LoadedModel.model_mmap_residency", model_mmap_residency)
    return [
        *([residency] if hasattr(mm.LoadedModel, "model_mmap_residency") else []),
        Patch("comfy.model_patcher", "ModelPatcher.loaded_size", loaded_size),
        Patch("comfy.model_base", "BaseModel.memory_required", memory_required),
        Patch(manager, "LoadedModel.model_memory_required", model_memory_required),
        Patch(manager, "LoadedModel.model_memory", model_memory),
        Patch(manager, "free_memory", free_memory),
        Patch(manager, "load_models_gpu", loading),
    ]
