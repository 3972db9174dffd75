"""The joins to ``comfy.model_management``: what "free" ejects, what it keeps, and what keeps it.

Every DisTorch2 load flags its models: eject or keep, as the ``keep_loaded`` switch of the loader
node says. "Free" ejects the flagged models and leaves the others where they are; ``Retention``
holds kept models when ComfyUI forgets its node outputs, and hands them back to their loader.
"""

from __future__ import annotations

import gc
import inspect
import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

from . import device_utils
from .allocation_parser import GIB
from .distorch2_patch import distorch2_nodes, patchers_of
from .keep_flags import FLAG, KEEP, is_distorch2, is_flagged, loaded_models, set_keep
from .model_lookup import forget_homes
from .node_outputs import NodeOutputs, prompt_queue
from .patch_table import Patch, PatchTable
from .retention import (
    FileState,
    Retained,
    Retention,
    executing_node,
    files_read,
    is_retainable,
    model_key,
    place_anew,
    unload,
)

logger = logging.getLogger("MultiGPU")

# Share of RAM in use, in percent, from which node outputs and retained models are let go, and how
# much more it takes to do so again.
RAM_THRESHOLD = 85.0
RAM_HYSTERESIS = 5.0


# --------------------------------------------------------------------------------------------
# DisTorch2 loader nodes
# --------------------------------------------------------------------------------------------


def with_keep_loaded(wrapped, instance, args, kwargs):
    """``keep_loaded`` as the last optional input, so that saved widget values keep their places."""
    inputs = wrapped(*args, **kwargs)
    tooltip = "Leave this model where it is when memory is freed (Manager's free buttons)."
    switch = ("BOOLEAN", {"default": False, "tooltip": tooltip})
    inputs.setdefault("optional", {}).setdefault("keep_loaded", switch)
    return inputs


def _loader(join: MemoryJoin, node_class: str) -> Callable:
    retention = join.retention

    def load(wrapped, node, args, kwargs):
        parameters = inspect.signature(wrapped).parameters
        defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
        inputs = {**defaults, **kwargs}
        keep = bool(inputs.get("keep_loaded", False))  # MultiGPU up to 2.5.0 has True as default
        if "keep_loaded" not in parameters:
            kwargs = {name: value for name, value in kwargs.items() if name != "keep_loaded"}
        key, owner = model_key(node_class, args, kwargs), executing_node()
        mm = sys.modules["comfy.model_management"]

        retained = retention.find(key, owner)
        if retained is not None:
            moves = place_anew(retained.outputs, inputs)
            if moves is None:
                retention.let_go(key, "its allocation came or went")
                retained = None
            elif moves:
                retention.changed(key)
        if retained is None:
            if join.watch.is_short():
                join.free_ram()
            with files_read(join.have_ram_for) as files:
                retained = Retained(wrapped(*args, **kwargs), files)
        elif inputs.get("eject_models"):
            for _, model in loaded_models(mm):
                setattr(model, FLAG, True)

        for patcher in patchers_of(retained.outputs):
            set_keep(patcher.model, keep)
            join.patchers.add(patcher)
        # ``eject_models`` flags every model there is; whose user said keep stays kept.
        for _, model in loaded_models(mm):
            if getattr(model, KEEP, False):
                set_keep(model, True)
        if keep and is_retainable(retained, kwargs):
            retained.owners.add(owner)
            retention.hold(key, retained)
        else:
            retention.forget(key)
        return retained.outputs

    return load


def _is_changed(join: MemoryJoin, node_class: str) -> Callable:
    """A loader whose cached outputs are not what it would give now has changed."""

    def is_changed(wrapped, instance, args, kwargs):
        key = model_key(node_class, args, kwargs)
        if kwargs.get("keep_loaded"):
            # ComfyUI drops its outputs of the earlier prompt before the loader runs.
            join.retention.revive(key)
        own, generation = wrapped(*args, **kwargs), join.retention.generation(key)
        return f"{own}/{generation}" if generation else own

    return is_changed


# --------------------------------------------------------------------------------------------
# comfy.model_management
# --------------------------------------------------------------------------------------------


def _is_out_of_memory(mm: ModuleType, error: BaseException | None) -> bool:
    if error is None:
        return False
    if hasattr(mm, "is_oom"):
        return mm.is_oom(error)
    return isinstance(error, mm.OOM_EXCEPTION)


def _unload_all_models(join: MemoryJoin) -> Callable:
    def unload_all_models(wrapped, instance, args, kwargs):
        mm = sys.modules["comfy.model_management"]
        # ComfyUI calls this from the except block of a node that ran out of memory.
        if _is_out_of_memory(mm, sys.exc_info()[1]) or mm.DISABLE_SMART_MEMORY:
            join.retention.let_go_all("everything is let go")
            wrapped(*args, **kwargs)
            for patcher in list(join.patchers):
                patcher.detach()
            join.tidy_later()
            return
        if not any(is_distorch2(model) for _, model in loaded_models(mm)):
            wrapped(*args, **kwargs)
            ejected = _eject(join, mm, evicted_only=True)
        else:
            ejected = _eject(join, mm, evicted_only=False)
        if ejected:
            join.outputs.forget_models(ejected)
            device_utils.empty_caches()
            join.tidy_due = True  # what ComfyUI forgets besides is freed in its own time

    return unload_all_models


def _eject(join: MemoryJoin, mm: ModuleType, evicted_only: bool) -> list[weakref.ref]:
    """Take every flagged model off all devices; weak references to them."""
    loaded = {id(model): (model, lm.model.model_size()) for lm, model in loaded_models(mm)}
    # Models that ComfyUI has evicted for others are in RAM, and on their donors.
    evicted = [p for p in list(join.patchers) if id(p.model) not in loaded and is_flagged(p.model)]
    if evicted_only:
        loaded = {}
    flagged = [entry for entry in loaded.values() if is_flagged(entry[0])]
    kept = [entry for entry in loaded.values() if not is_flagged(entry[0])]
    for model, _ in flagged:
        unload(mm, model)
    for patcher in evicted:
        patcher.detach()
        flagged.append((patcher.model, patcher.model_size()))
    if flagged or kept:
        logger.info(f"[MultiGPU] free: ejected {_names(flagged)}; kept {_names(kept)}")
    return [weakref.ref(model) for model, _ in flagged]


def _names(entries: list[tuple[object, int]]) -> str:
    def why(model) -> str:
        if is_flagged(model):
            return ""
        return ", its user said keep" if is_distorch2(model) else ", not loaded by DisTorch2"

    shown = [f"{type(m).__name__} ({size / GIB:.2f} GiB{why(m)})" for m, size in entries]
    return ", ".join(shown) or "nothing"


class RamWatch:
    """Tells when RAM runs short: above the threshold, and again only after a change.

    A change is ``RAM_HYSTERESIS`` points more than at the last time, or that much below the
    threshold in between.
    """

    def __init__(self) -> None:
        self._limit = RAM_THRESHOLD

    def is_short(self) -> bool:
        available, total = device_utils.ram()
        percent = 100 * (1 - available / total)
        if percent < RAM_THRESHOLD - RAM_HYSTERESIS:
            self._limit = RAM_THRESHOLD
        if percent <= self._limit:
            return False
        self._limit = percent + RAM_HYSTERESIS
        return True


def _soft_empty_cache(join: MemoryJoin, host: Callable) -> Callable:
    """``host`` is ComfyUI's own function: what MultiGPU put over it is done here."""

    def soft_empty_cache(wrapped, instance, args, kwargs):
        mm = sys.modules["comfy.model_management"]
        queue = prompt_queue()
        running = queue is not None and bool(queue.currently_running)
        if not running and join.watch.is_short():
            logger.warning(f"[MultiGPU] RAM is above {RAM_THRESHOLD:.0f}%: node outputs are let go")
            join.free_ram()
            join.outputs.forget()
        # ComfyUI calls this after every node: what takes long is done where something has gone.
        tidy, join.tidy_due = join.tidy_due, False
        if tidy:
            gc.collect()
        if any(is_distorch2(model) for _, model in loaded_models(mm)):
            device_utils.empty_caches()
        else:
            host(*args, **kwargs)
        if tidy:
            device_utils.trim_host_heap()
        if (args and args[0]) or kwargs.get("force", False):
            join.outputs.forget()
            join.tidy_later()

    return soft_empty_cache


def get_torch_device(wrapped, instance, args, kwargs):
    """Inside a pass, the device that it runs on, whatever another loader has set since."""
    return device_utils.pass_device() or wrapped(*args, **kwargs)


# --------------------------------------------------------------------------------------------
# Helpers
# --------------------------------------------------------------------------------------------


def force_full_system_cleanup(reason: str = "manual", force: bool = True) -> bool:
    """Ask for what the Manager's "Free model and node cache" does; whether that was possible.

    Without ``force`` nothing is asked for while a prompt is running.
    """
    queue = prompt_queue()
    if queue is None or (queue.currently_running and not force):
        return False
    logger.info(f"[MultiGPU] full cleanup requested: {reason}")
    queue.set_flag("unload_models", True)
    queue.set_flag("free_memory", True)
    return True


def comfyui_memory_load(tag: str) -> str:
    """One line, ``tag=...|cpu=used/total|cuda:0=used/total``, in GiB."""
    parts = [f"tag={tag}"]
    for name in device_utils.device_names():
        used, total = device_utils.used_memory(name), device_utils.total_memory(name)
        parts.append(f"{name}={used / GIB:.2f}/{total / GIB:.2f}")
    return "|".join(parts)


def multigpu_memory_log(identifier: str, tag: str) -> None:
    """Log the memory in use on the CPU and on every device, in GiB, on one line."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    names = device_utils.device_names()
    used = (f"{name}|{device_utils.used_memory(name) / GIB:.2f}" for name in names)
    logger.info(f"[MultiGPU] {now} {identifier}_{tag} {' '.join(used)}")


class MemoryJoin:
    """Installs the patches of this module."""

    def __init__(self) -> None:
        self._table = PatchTable()
        self.retention = Retention(self.tidy_later)
        # What DisTorch2 loaders have made and somebody still holds, loaded or evicted.
        self.patchers: weakref.WeakSet = weakref.WeakSet()
        self.outputs = NodeOutputs()
        self.watch = RamWatch()
        self.tidy_due = False  # models have gone since garbage was collected

    def tidy_later(self) -> None:
        """Models have gone: the next ``soft_empty_cache`` collects garbage and trims the heap."""
        self.tidy_due = True

    def have_ram_for(self, file: FileState) -> None:
        """Before a model file is read: let others go if it would not fit in RAM, or say so."""
        left = self.ram_for(file.size)
        if left < file.size:
            logger.warning(
                f"[MultiGPU] {Path(file.path).name} is {file.size / GIB:.2f} GiB, and RAM has "
                f"{max(0, left) / GIB:.2f} GiB left: this may end in swapping, or in the process "
                f"being killed. A smaller format (fp8, GGUF) helps, or letting other models go; "
                f"how much of it is on the card makes no difference while it is read."
            )

    def ram_for(self, nbytes: int, model: object = None) -> int:
        """Bytes that RAM has left for ``model``: less than ``nbytes`` once others were let go."""
        if device_utils.ram_left() < nbytes:
            mm = sys.modules["comfy.model_management"]
            used = [m.model for m in mm.loaded_models(only_currently_used=True) if m is not None]
            self.free_ram([] if model is None else [model, *used])
            gc.collect()
            device_utils.trim_host_heap()
        return device_utils.ram_left()

    def free_ram(self, spared: Sequence[object] = ()) -> None:
        """RAM is short: let go of what is retained, and of the homes of what is resident.

        The inner models ``spared`` run now, or are about to.
        """
        self.retention.let_go_all("RAM is short", spared)
        for patcher in list(self.patchers):
            if not any(patcher.model is model for model in spared):
                forget_homes(patcher)
        self.tidy_later()

    def install(self, multigpu: ModuleType) -> None:
        """Patch the loader nodes of ``multigpu``, MultiGPU's package, and ComfyUI's management."""
        import comfy.model_management as mm

        for node_class, node in distorch2_nodes(multigpu).items():
            patches = [
                Patch(node, "INPUT_TYPES", with_keep_loaded),
                Patch(node, node.FUNCTION, _loader(self, node_class)),
            ]
            if hasattr(node, "IS_CHANGED"):
                patches.append(Patch(node, "IS_CHANGED", _is_changed(self, node_class)))
            self._table.apply(patches)
        if hasattr(multigpu, "get_current_device"):
            self._table.apply([Patch(multigpu, "get_current_device", get_torch_device)])
        # MultiGPU's replacement clears all devices too, and fails where there is no server yet.
        module = sys.modules.get(mm.soft_empty_cache.__module__)
        host = getattr(module, "original_soft_empty_cache", mm.soft_empty_cache)
        self._table.apply(
            [
                Patch(mm, "unload_all_models", _unload_all_models(self)),
                Patch(mm, "soft_empty_cache", _soft_empty_cache(self, host)),
                Patch(mm, "get_torch_device", get_torch_device),
                Patch("execution", "PromptExecutor.execute", self.outputs.note_executor),
            ]
        )

    def uninstall(self) -> None:
        """Let go of what is retained and restore every patched attribute."""
        self.retention.let_go_all("the plugin is uninstalled")
        self._table.remove()
