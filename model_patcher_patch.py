"""The joins to ComfyUI's ``ModelPatcher``: loading, accounting and unloading of a swapped model.

A model with blocks that carries an allocation is loaded, accounted for and unloaded by this plugin;
every other model goes on to whatever ComfyUI and MultiGPU would have done with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar

from .device_utils import running_on
from .host_memory import (
    donors_stay,
    room_for_weights,
    state_of,
    warn_if_ram_is_short,
    warn_if_too_little_is_left,
)
from .model_blocks import is_swappable, modules_beside, root_of
from .model_lookup import STATE, allocation_text, is_swapped_here
from .multigpu_strings import readable_by_multigpu
from .packed_weights import copy_of
from .patch_table import Patch
from .swapped_model import SwappedModel

logger = logging.getLogger("MultiGPU")


LEFT = "_distorch2_left_to_multigpu"


def partially_load(ram_for: Callable[[int, object], int]):
    """Load a model with blocks by its split; its quota, not ``extra_memory``, says how much."""

    def partially_load(wrapped, patcher, args, kwargs):
        if not is_swapped_here(patcher):
            _say_if_left_to_multigpu(patcher.model)
            with readable_by_multigpu(patcher):
                return wrapped(*args, **kwargs)
        return _load(ram_for, patcher, *args, **kwargs)

    return partially_load


def _say_if_left_to_multigpu(model) -> None:
    """One line per model for what carries an allocation but is not swapped."""
    if allocation_text(model) and not hasattr(model, LEFT) and not is_swappable(model):
        setattr(model, LEFT, True)
        name = type(root_of(model)).__name__
        why = "is a VAE" if hasattr(model, "decode") else "has no blocks to swap"
        logger.info(f"[MultiGPU] block swap: {name} {why}: left to MultiGPU")


def _load(ram_for, patcher, device_to, extra_memory=0, force_patch_weights=False, **_):
    from comfy.patcher_extension import CallbacksMP

    model, state = patcher.model, state_of(patcher)
    with running_on(device_to), patcher.use_ejected(skip_and_inject_on_exit_only=True):
        before = model.model_loaded_weight_memory
        applied = model.current_weight_patches_uuid
        changed = applied is not None and (applied != patcher.patches_uuid or force_patch_weights)
        # Weights are unpatched where they lie: no device is named, so nothing moves.
        patcher.unpatch_model(None, unpatch_weights=changed)
        patcher.patch_model(load_weights=False)
        room = room_for_weights(patcher, state, extra_memory)
        state.fit(room)
        warn_if_too_little_is_left(state, room)
        warn_if_ram_is_short(state, model, ram_for)
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
            storage = state.unload(device_to, donors_too=not donors_stay.get())
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
    if getattr(patcher.model, STATE, None) is None or _for_hooks.get():
        return patches
    for key, ((weight, convert), *rest) in patches.items():
        patches[key] = [(weight.detach().to("cpu", copy=True), convert), *rest]
    return patches


def patches(ram_for: Callable[[int, object], int]) -> list[Patch]:
    """What is patched of ComfyUI's ``ModelPatcher``; ``ram_for`` is ``LoadingJoin``'s."""
    patcher = "comfy.model_patcher"
    return [
        Patch(patcher, "ModelPatcher.partially_load", partially_load(ram_for)),
        Patch(patcher, "ModelPatcher.unpatch_model", unpatch_model),
        Patch(patcher, "ModelPatcher.partially_unload", partially_unload),
        Patch(patcher, "ModelPatcher.patch_model", patch_model),
        Patch(patcher, "ModelPatcher.get_key_patches", get_key_patches),
        Patch(patcher, "ModelPatcher.patch_hooks", change_hooks),
        Patch(patcher, "ModelPatcher.unpatch_hooks", change_hooks),
    ]
