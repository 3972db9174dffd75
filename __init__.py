"""DisTorch2 Block Swap: makes the allocation strings of ComfyUI-MultiGPU true.

What ComfyUI imports. The package has no nodes of its own; see README.md.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType

from .distorch2_patch import LoadingJoin
from .model_management_mgpu import MemoryJoin
from .patch_table import Patch, PatchTable

logger = logging.getLogger("MultiGPU")

NODE_CLASS_MAPPINGS: dict[str, type] = {}

__all__ = ["NODE_CLASS_MAPPINGS", "install", "uninstall"]

# The module of MultiGPU that carries DisTorch2: how its package is told, whatever its folder.
DISTORCH2_MODULE = "distorch_2"

_memory = MemoryJoin()
_loading = LoadingJoin(_memory.ram_for)
_waiting = PatchTable()
_installed = False


def install() -> None:
    """Join MultiGPU, now or as soon as ComfyUI has loaded it. A second call changes nothing.

    Without MultiGPU nothing is patched, and the log says so.
    """
    multigpu = _loaded_multigpu()
    if multigpu is not None:
        _join(multigpu)
    elif _multigpu_folder() is not None:
        _waiting.apply([Patch("nodes", "load_custom_node", _after_custom_node)])
    else:
        logger.warning(
            "[MultiGPU] DisTorch2 block swap: ComfyUI-MultiGPU is not installed, nothing to do"
        )


def uninstall() -> None:
    """Unload what was loaded here and restore every patched attribute to the object it was."""
    global _installed
    _waiting.remove()
    _memory.uninstall()  # lies on top of the other
    _loading.uninstall()
    _installed = False


def _join(multigpu: ModuleType) -> None:
    global _installed
    if not _installed:
        _loading.install(multigpu)
        _memory.install(multigpu)
        _installed = True


def _loaded_multigpu() -> ModuleType | None:
    suffix = f".{DISTORCH2_MODULE}"
    for name in list(sys.modules):
        package = sys.modules.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if hasattr(package, "NODE_CLASS_MAPPINGS"):
            return package
    return None


def _multigpu_folder() -> Path | None:
    """MultiGPU's folder among the custom nodes, which ComfyUI may load after this package."""
    import folder_paths

    for root in folder_paths.get_folder_paths("custom_nodes"):
        for module in Path(root).glob(f"*/{DISTORCH2_MODULE}.py"):
            if not module.parent.name.endswith(".disabled"):
                return module.parent
    return None


async def _after_custom_node(wrapped, instance, args, kwargs):
    """Join as soon as the custom node that ComfyUI has just loaded turns out to be MultiGPU."""
    loaded = await wrapped(*args, **kwargs)
    multigpu = _loaded_multigpu()
    if multigpu is not None and loaded:
        _waiting.remove()
        _join(multigpu)
    elif not loaded and Path(args[0]) == _multigpu_folder():
        _waiting.remove()
        logger.warning("[MultiGPU] DisTorch2 block swap: ComfyUI-MultiGPU failed to load, inactive")
    return loaded


install()
