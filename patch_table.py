"""Declared patches: a table of (target, attribute, wrapper), applied with wrapt and reversible."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import wrapt

logger = logging.getLogger("MultiGPU")

_INHERITED = object()


@dataclass(frozen=True)
class Patch:
    """One patch.

    ``target`` is a module, a class, or the dotted name of a module; ``attribute`` a dotted path
    below it; ``wrapper(wrapped, instance, args, kwargs)`` is what wrapt calls.
    """

    target: object
    attribute: str
    wrapper: Callable

    def __str__(self) -> str:
        target = self.target
        name = target if isinstance(target, str) else getattr(target, "__name__", repr(target))
        return f"{name}.{self.attribute}"


class PatchTable:
    """Patches that were applied, and what stood there before.

    Applying a table twice, or removing it twice, changes nothing the second time.
    """

    def __init__(self) -> None:
        # (id of the parent, name) -> (parent, name, what its __dict__ held, our wrapper)
        self._applied: dict[tuple[int, str], tuple[object, str, object, object]] = {}

    def _is_applied(self) -> bool:
        return bool(self._applied)

    def apply(self, patches: Iterable[Patch]) -> None:
        """Apply ``patches``; one whose target this host lacks is named in the log and skipped."""
        for patch in patches:
            try:
                target = patch.target
                if isinstance(target, str):
                    target = importlib.import_module(target)
                parent, name, original = wrapt.resolve_path(target, patch.attribute)
            except (ImportError, AttributeError):
                logger.warning(f"[MultiGPU] block swap: this ComfyUI has no {patch}; left out")
                continue
            if (id(parent), name) not in self._applied:
                own = vars(parent).get(name, _INHERITED)
                wrapper = wrapt.FunctionWrapper(original, patch.wrapper, enabled=self._is_applied)
                setattr(parent, name, wrapper)
                self._applied[id(parent), name] = (parent, name, own, wrapper)

    def remove(self) -> None:
        """Put back every original object.

        An attribute that somebody else has patched since is left as it is: their patch calls ours,
        which from now on only calls the original.
        """
        for parent, name, own, wrapper in reversed(self._applied.values()):
            if vars(parent).get(name) is not wrapper:
                logger.warning(f"[MultiGPU] block swap: {name} was patched again; left in place")
            elif own is _INHERITED:
                delattr(parent, name)
            else:
                setattr(parent, name, own)
        self._applied.clear()
