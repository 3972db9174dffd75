"""Flags on inner models: what "free" ejects, what it keeps, and which models are DisTorch2's."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from .model_lookup import META

# True on an inner model: "free" ejects it. MultiGPU's ``eject_models`` sets it on every model.
FLAG = "_mgpu_unload_distorch_model"
# What the user of a DisTorch2 loader chose; only these models carry it.
KEEP = "_distorch2_keep_loaded"


def is_distorch2(model) -> bool:
    """Whether an inner model was loaded by a DisTorch2 loader."""
    return hasattr(model, KEEP) or hasattr(model, META)


def set_keep(model, keep: bool) -> None:
    """Record what the user chose for an inner model, and flag it so."""
    setattr(model, KEEP, keep)
    setattr(model, FLAG, not keep)


def is_flagged(model) -> bool:
    """Whether "free" ejects an inner model."""
    return bool(getattr(model, FLAG, False)) and not getattr(model, KEEP, False)


def loaded_models(mm: ModuleType) -> Iterator[tuple[object, object]]:
    """(LoadedModel, inner model) of every model that ComfyUI holds and somebody still owns."""
    for loaded in mm.current_loaded_models:
        if loaded.model is not None:
            yield loaded, loaded.model.model
