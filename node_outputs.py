"""ComfyUI's node outputs, which hold models: what is running, and how to have them forgotten."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable

from .distorch2_patch import patchers_of


def prompt_queue():
    """ComfyUI's prompt queue, or ``None`` before there is a server."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    return getattr(server, "prompt_queue", None)


class NodeOutputs:
    """The outputs that ComfyUI's executor caches."""

    def __init__(self) -> None:
        self._executor: Callable = lambda: None  # a weak reference, once a prompt has run

    def note_executor(self, wrapped, executor, args, kwargs):
        """Remembers ComfyUI's executor, which nothing but its worker thread holds."""
        self._executor = weakref.ref(executor)
        return wrapped(*args, **kwargs)

    def forget(self) -> None:
        """Have ComfyUI forget them all: now, or at the end of the prompt that is running.

        Flags that are set on the worker's own thread wake nobody: they would be acted upon at the
        end of the next prompt and take its outputs with them.
        """
        queue, executor = prompt_queue(), self._executor()
        if queue is not None and queue.currently_running:
            queue.set_flag("unload_models", False)
            queue.set_flag("free_memory", True)
        elif executor is not None:
            executor.reset()

    def forget_models(self, models: list[weakref.ref]) -> None:
        """Have ComfyUI forget those that hold these inner models, or else all of them.

        Other models live in node outputs too, and are to stay; but RAM is free only when nothing, a
        guider for instance, holds an ejected one.
        """
        executor = self._executor()
        for cache in executor.caches.all if executor is not None else ():
            _drop_entries(cache, {id(reference()) for reference in models})
        gc.collect()
        if any(reference() is not None for reference in models):
            self.forget()
            gc.collect()


def _drop_entries(cache, models: set[int]) -> None:
    """Drop the entries of one of ComfyUI's node caches that hold inner models, given by id."""
    entries = getattr(cache, "cache", {})
    for key, entry in list(entries.items()):
        values = [value for slot in getattr(entry, "outputs", ()) or () for value in slot]
        if any(id(patcher.model) in models for patcher in patchers_of(values)):
            del entries[key]
    for subcache in getattr(cache, "subcaches", {}).values():
        _drop_entries(subcache, models)
