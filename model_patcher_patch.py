"""The joins to ComfyUI's ``ModelPatcher``: loading, accounting and unloading of a swapped model.

A Wan model that carries an allocation is loaded, accounted for and unloaded by this plugin; every
other model goes on to whatever ComfyUI and MultiGPU would have done with it.
"""

from __future__ import annotations

import functools
import logging
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar

import torch

from . import device_utils, step_time
from .allocation_parser import AUTO, CPU, Allocation, parse_allocation
from .model_blocks import block_lists, is_wan, modules_beside
from .packed_weights import copy_of
from .page_locks import PageLocks, Pinning, lockable
from .pass_memory import SPATIAL, TEMPORAL, PassKind, PassMemory, Room
from .patch_table import Patch
from .split import format_bytes
from .swap_executor import running_on
from .swapped_model import SwappedModel

logger = logging.getLogger("MultiGPU")

# Where MultiGPU leaves the allocation, and where this plugin leaves its state: on the inner model,
# which all clones of a patcher share.
META = "_distorch_v2_meta"

STATE = "_distorch2_block_swap"

NO_BLOCKS = "_distorch2_no_blocks"


def allocation_text(model: torch.nn.Module) -> str:
    """The allocation string that MultiGPU stored on an inner model, or ``""``."""
    return getattr(model, META, {}).get("full_allocation", "")


def diffusion_model_of(model) -> torch.nn.Module | None:
    """The diffusion model of an inner model; a text encoder or VAE has none."""
    return getattr(model, "diffusion_model", None)


def is_swapped_here(patcher) -> bool:
    """Whether this plugin, and not MultiGPU, loads the model of ``patcher``."""
    model = patcher.model
    if hasattr(model, STATE):
        return True
    diffusion_model = diffusion_model_of(model)
    return (
        diffusion_model is not None
        and bool(allocation_text(model))
        and not getattr(patcher, "is_dynamic", bool)()
        and bool(block_lists(diffusion_model))
    )


def follow_allocation(patcher) -> None:
    """Check the allocation of a patcher's model, and plan anew if it is not the one it had.

    Raises:
        AllocationError: the string cannot be followed as written.
    """
    allocation = read_allocation(patcher)
    state = getattr(patcher.model, STATE, None)
    if state is not None:
        state.follow(allocation)


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


def _state(patcher) -> SwappedModel:
    """The swap state of a patcher's model, made at its first load."""
    state = getattr(patcher.model, STATE, None)
    if state is not None and state.swap.compute_device != patcher.load_device:
        state.unload(patcher.offload_device, donors_too=True)
        state = None
    if state is None:
        model = weakref.ref(patcher.model)

        def learn(shape, nbytes: int) -> None:
            pass_memory.learn(_kind_of(model(), shape), nbytes)

        state = SwappedModel(patcher.model, read_allocation(patcher), page_locks(), learn)
        setattr(patcher.model, STATE, state)
    return state


# What passes were seen to need, as long as the process lives.
pass_memory = PassMemory()

# On an inner model: the kind of pass that ComfyUI has last asked the memory of.
ASKED = "_distorch2_asked"

# What ComfyUI wants to have free beside the weights for the load that is going on, in bytes.
_wanted_free: ContextVar[float] = ContextVar("wanted_free", default=0.0)


def _kind_of(model, shape) -> PassKind:
    return PassKind.of(type(model.diffusion_model).__name__, model.get_dtype(), shape)


def memory_required(wrapped, model, args, kwargs):
    """What a pass needs beside the weights: for ``auto``, what it was seen to need."""
    estimate = wrapped(*args, **kwargs)
    if not allocation_text(model) or not block_lists(diffusion_model_of(model)):
        return estimate
    kind = _kind_of(model, kwargs["input_shape"] if "input_shape" in kwargs else args[0])
    setattr(model, ASKED, kind)
    return pass_memory.need(kind, estimate) if AUTO in allocation_text(model).lower() else estimate


def _room_for_weights(patcher, state: SwappedModel, extra_memory: float) -> Room:
    """What the compute device has for weights once the next pass has what it needs.

    ``extra_memory`` is ComfyUI's answer: at least a part of what is free (two fifths of it), as its
    estimates may be too high. Where the need is known that is no longer good enough.
    """
    import comfy.model_management as mm

    model, held = patcher.model, state.compute_bytes()
    free = mm.get_free_memory(patcher.load_device) + held
    kind = model.__dict__.pop(ASKED, None)
    formats = getattr(model, "latent_format", None)
    what = "" if kind is None else kind.describe(*_downscaling(formats))
    if kind is not None and pass_memory.knows(kind):
        # For ``auto`` ComfyUI was told, and has added what ControlNets and the like will need.
        known = _wanted_free.get() if state.is_auto else pass_memory.need(kind, 0)
        need = max(mm.minimum_inference_memory(), known + mm.extra_reserved_memory())
        return Room(free, need, what)
    if extra_memory >= EVERYTHING:
        return Room(free, mm.minimum_inference_memory(), what)
    return Room(free, free - held - extra_memory, what)


def _downscaling(latent_format) -> tuple[int, int]:
    """Pixels and frames of one latent position; ComfyUI knows them for most formats."""
    spatial = getattr(latent_format, "spacial_downscale_ratio", SPATIAL)
    temporal = getattr(latent_format, "temporal_downscale_ratio", 1)
    return spatial, temporal if temporal > 1 else TEMPORAL


def _warn_if_too_little_is_left(state: SwappedModel, room: Room) -> None:
    """Before the first step, once for every cause: a typed quota leaves the video too little."""
    short = state.split.compute_bytes - room.nbytes
    device = state.split.compute_device
    if state.is_auto or short <= 0 or device == CPU or not room.what:
        return
    if state.warned_of != (room.what, state.split):
        state.warned_of = (room.what, state.split)
        logger.warning(
            f"[MultiGPU] block swap: {room.what} may need {format_bytes(int(room.need))} of "
            f"{device}, and {format_bytes(state.split.compute_bytes)} of weights leave "
            f"{format_bytes(short)} too little of it: type {device},"
            f"{step_time.as_amount_within(room.nbytes)} or less, or {device},auto"
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

    def limit() -> int:
        return lockable(device_utils.ram()[1], sys.platform == "win32")

    allowed = not getattr(mm.args, "disable_pinned_memory", False)
    pinning = Pinning(
        pin=lambda tensor: mm.pin_memory(tensor),
        unpin=lambda tensor: mm.unpin_memory(tensor),
        room=room,
        make_room=make_room,
        allowed=allowed,
    )
    return PageLocks(pinning, limit)


def partially_load(wrapped, patcher, args, kwargs):
    """Load a Wan model by its split; its quota, not ``extra_memory``, says how much."""
    if not is_swapped_here(patcher):
        _say_if_blocks_are_missing(patcher.model)
        return wrapped(*args, **kwargs)
    return _load(patcher, *args, **kwargs)


def _say_if_blocks_are_missing(model) -> None:
    """One line per model for a Wan that carries an allocation but has no blocks to swap."""
    diffusion_model = diffusion_model_of(model)
    if not allocation_text(model) or not is_wan(diffusion_model) or hasattr(model, NO_BLOCKS):
        return
    if not block_lists(diffusion_model):
        setattr(model, NO_BLOCKS, True)
        name = type(diffusion_model).__name__
        logger.warning(f"[MultiGPU] {name} has no blocks to swap: left to MultiGPU")


def _load(patcher, device_to, extra_memory=0, force_patch_weights=False, **_):
    from comfy.patcher_extension import CallbacksMP

    model, state = patcher.model, _state(patcher)
    with running_on(device_to), patcher.use_ejected(skip_and_inject_on_exit_only=True):
        before = model.model_loaded_weight_memory
        applied = model.current_weight_patches_uuid
        changed = applied is not None and (applied != patcher.patches_uuid or force_patch_weights)
        # Weights are unpatched where they lie: no device is named, so nothing moves.
        patcher.unpatch_model(None, unpatch_weights=changed)
        patcher.patch_model(load_weights=False)
        room = _room_for_weights(patcher, state, extra_memory)
        state.fit(room)
        _warn_if_too_little_is_left(state, room)
        try:
            state.load(model)
            if model.current_weight_patches_uuid is None:
                patcher.unpatch_hooks()
                with state.swap.writing_homes():
                    _patch_weights(patcher, state, device_to)
            state.swap.allocate_slots()
        except BaseException:
            patcher.detach()
            raise
        model.model_lowvram = False
        model.device = device_to
        model.current_weight_patches_uuid = patcher.patches_uuid
        model.model_loaded_weight_memory = state.compute_bytes()
        state.note_memory()
        for callback in patcher.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(patcher, device_to, extra_memory, force_patch_weights, True)
        patcher.apply_hooks(patcher.forced_hooks, force_apply=True)
        return model.model_loaded_weight_memory - before


def _patch_weights(patcher, state: SwappedModel, device_to) -> None:
    """Apply the patcher's weight patches, computed on the compute device, where the weights lie.

    Follows ``ModelPatcher.load`` for a model that is loaded completely. A patched weight hangs on
    its module for a moment and is then absorbed by the pack; ``backup`` holds the originals of
    patched weights and nothing else.
    """
    from comfy.model_patcher import (
        key_param_name_to_key,
        move_weight_functions,
        wipe_lowvram_weight,
    )

    if patcher.weight_inplace_update:
        state.forget_homes()
    for entry in patcher._load_list():
        name, module, params = entry[-3:]
        module.comfy_force_cast_weights = patcher.force_cast_weights
        if hasattr(module, "comfy_cast_weights"):
            wipe_lowvram_weight(module)
            if patcher.force_cast_weights:
                module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = True
        for param, functions in (("weight", "weight_function"), ("bias", "bias_function")):
            wrappers = patcher.weight_wrapper_patches.get(f"{name}.{param}", [])
            if wrappers:
                getattr(module, functions).extend(wrappers)
        move_weight_functions(module, device_to)
        for param in params:
            key = key_param_name_to_key(name, param)
            if key not in patcher.patches:
                continue
            home, new = module._parameters[param], key not in patcher.backup
            patcher.patch_weight_to_device(key, device_to=device_to)
            if new and key in patcher.backup:
                # ComfyUI keeps the original itself where that lies on the offload device.
                entry = patcher.backup[key]
                if entry.weight.device == home.device:
                    patcher.backup[key] = entry._replace(weight=copy_of(entry.weight))
            state.absorb()
        module.comfy_patched_weights = True


# Whether models that are unloaded keep their blocks on other accelerators.
_donors_stay: ContextVar[bool] = ContextVar("donors_stay", default=False)

# ComfyUI asks for this much, or more, to mean "everything".
EVERYTHING = 1e29


def free_memory(wrapped, instance, args, kwargs):
    """Who needs room on one device gains nothing from blocks that leave another."""

    def bind(memory_required, device, keep_loaded=(), **_):
        return memory_required, device, keep_loaded

    memory_required, device, keep_loaded = bind(*args, **kwargs)
    if memory_required < EVERYTHING:
        _give_back_spare(memory_required, device, keep_loaded)
    token = _donors_stay.set(memory_required < EVERYTHING)
    try:
        return wrapped(*args, **kwargs)
    finally:
        _donors_stay.reset(token)


def _give_back_spare(memory_required: float, device, keep_loaded) -> None:
    """Before others are evicted, ``auto`` gives back what it has taken and gains no time by."""
    import comfy.model_management as mm

    for loaded in mm.current_loaded_models:
        if loaded.device != device or loaded.model is None or loaded in keep_loaded:
            continue
        state = getattr(loaded.model.model, STATE, None)
        missing = memory_required - mm.get_free_memory(device)
        if missing > 0 and state is not None and state.loaded:
            state.give_back_spare(int(missing), loaded.model.offload_device)


def unpatch_model(wrapped, patcher, args, kwargs):
    """Before weights are unpatched or moved away: no copy may be under way, nothing swapped."""

    def bind(device_to=None, unpatch_weights=True):
        return device_to, unpatch_weights

    device_to, unpatch_weights = bind(*args, **kwargs)
    model = patcher.model
    state = getattr(model, STATE, None)
    if state is None:
        return wrapped(*args, **kwargs)
    if not unpatch_weights:
        with state.undriven():
            return wrapped(*args, **kwargs)
    with state.swap.writing_homes(), state.undriven():
        if any(entry.inplace_update for entry in patcher.backup.values()):
            state.forget_homes()
        storage = None
        if device_to is not None:
            storage = state.unload(device_to, donors_too=not _donors_stay.get())
        result = wrapped(None, True)  # to name the device would move the donors' blocks too
        state.absorb()
    if storage is not None:
        for module in modules_beside(model):
            module.to(storage)
        model.device = storage
    return result


def patch_model(wrapped, patcher, args, kwargs):
    """Object patches are set on the model itself, not on what drives it."""
    state = getattr(patcher.model, STATE, None)
    with nullcontext() if state is None else state.undriven():
        return wrapped(*args, **kwargs)


def partially_unload(wrapped, patcher, args, kwargs):
    """Give memory of the compute device back, slots first."""
    state = getattr(patcher.model, STATE, None)
    if state is None or not state.loaded:
        return wrapped(*args, **kwargs)

    def bind(device_to, memory_to_free=0, force_patch_weights=False):
        return device_to, memory_to_free

    device_to, memory_to_free = bind(*args, **kwargs)
    return state.give_back(memory_to_free, device_to)


def loaded_size(wrapped, patcher, args, kwargs):
    """What is there now: slots come and go with passes, not only with loads."""
    state = getattr(patcher.model, STATE, None)
    return wrapped(*args, **kwargs) if state is None else state.compute_bytes()


# Whether weights are being asked for to patch hooks with, which nobody keeps.
_for_hooks: ContextVar[bool] = ContextVar("for_hooks", default=False)


def change_hooks(wrapped, patcher, args, kwargs):
    """Hooks write into the weights: no slot may keep what they were, no copy may read them."""
    state = getattr(patcher.model, STATE, None)
    writes = patcher.hook_backup or any(hooks is not None for hooks in (*args, *kwargs.values()))
    if state is None or not writes:
        return wrapped(*args, **kwargs)
    token = _for_hooks.set(True)
    try:
        with state.swap.writing_homes():
            state.forget_homes()  # hooks write into resident weights, too
            return wrapped(*args, **kwargs)
    finally:
        _for_hooks.reset(token)


def get_key_patches(wrapped, patcher, args, kwargs):
    """Weights that a merge keeps must not be views of packs, which are written and moved."""
    patches = wrapped(*args, **kwargs)
    if not hasattr(patcher.model, STATE) or _for_hooks.get():
        return patches
    for key, ((weight, convert), *rest) in patches.items():
        patches[key] = [(weight.detach().to("cpu", copy=True), convert), *rest]
    return patches


def model_memory_required(wrapped, loaded_model, args, kwargs):
    """What a load will take of the compute device: the split's share, less what is there."""
    patcher = loaded_model.model
    if not is_swapped_here(patcher):
        return wrapped(*args, **kwargs)
    state = _state(patcher)
    return max(0, state.wanted_bytes - state.compute_bytes())


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


def _load_models_gpu(original):
    """MultiGPU's ``load_models_gpu`` computes with the whole model and evicts everything else.

    ``original`` is ComfyUI's, which computes with ``model_memory_required``.
    """

    def wanted(models, memory_required=0, force_patch_weights=False, minimum_memory_required=None):
        return memory_required if minimum_memory_required is None else minimum_memory_required

    def load_models_gpu(wrapped, instance, args, kwargs):
        models = kwargs["models"] if "models" in kwargs else args[0]
        if not any(hasattr(m, "model") and is_swapped_here(m) for m in models):
            return wrapped(*args, **kwargs)
        known = {name: value for name, value in kwargs.items() if name != "force_full_load"}
        token = _wanted_free.set(wanted(*args[:4], **known))
        try:
            return original(*args, **kwargs)
        finally:
            _wanted_free.reset(token)

    return load_models_gpu


def patches(host_load_models_gpu: Callable) -> list[Patch]:
    """What is patched in ComfyUI when the first DisTorch2 loader runs.

    ``host_load_models_gpu`` is ComfyUI's own ``load_models_gpu``.
    """
    import comfy.model_management as mm

    patcher, manager = "comfy.model_patcher", "comfy.model_management"
    loading = _load_models_gpu(host_load_models_gpu)
    residency = Patch(manager, "LoadedModel.model_mmap_residency", model_mmap_residency)
    return [
        *([residency] if hasattr(mm.LoadedModel, "model_mmap_residency") else []),
        Patch(patcher, "ModelPatcher.partially_load", partially_load),
        Patch(patcher, "ModelPatcher.unpatch_model", unpatch_model),
        Patch(patcher, "ModelPatcher.partially_unload", partially_unload),
        Patch(patcher, "ModelPatcher.patch_model", patch_model),
        Patch(patcher, "ModelPatcher.loaded_size", loaded_size),
        Patch(patcher, "ModelPatcher.get_key_patches", get_key_patches),
        Patch(patcher, "ModelPatcher.patch_hooks", change_hooks),
        Patch(patcher, "ModelPatcher.unpatch_hooks", change_hooks),
        Patch(manager, "LoadedModel.model_memory_required", model_memory_required),
        Patch(manager, "LoadedModel.model_memory", model_memory),
        Patch(manager, "free_memory", free_memory),
        Patch("comfy.model_base", "BaseModel.memory_required", memory_required),
        Patch(manager, "load_models_gpu", loading),
    ]
