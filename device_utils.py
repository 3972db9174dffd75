"""What devices this machine has: their names, memory and streams. Knows torch, not ComfyUI."""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType

import psutil
import torch

# Families that register a device module with torch under their own name, and the vendor plug-in
# that has to be imported before torch knows it.
_INDEXED_FAMILIES = {
    "cuda": None,
    "xpu": None,
    "npu": "torch_npu",
    "mlu": "torch_mlu",
    "corex": None,
}


# How torch's allocators say what they could not give.
_TRIED = re.compile(r"Tried to allocate ([0-9.]+) (KiB|MiB|GiB|bytes)")
_IEC = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

# What a model leaves of all RAM.
RAM_MARGIN = 0.05

# Where Linux tells a container what it may use, in both versions of its control groups: limit, use,
# and what that is made of.
CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def device_names() -> tuple[str, ...]:
    """Every device that can hold tensors, the CPU first: ``cpu``, ``cuda:0``, ``mps``, ...

    The names are those that MultiGPU offers in its device inputs.
    """
    names = ["cpu"]
    families = dict(_INDEXED_FAMILIES)
    families.setdefault(torch._C._get_privateuse1_backend_name(), None)
    for family, plugin in families.items():
        module = _family_module(family, plugin)
        names += [f"{family}:{index}" for index in range(_device_count(module))]
    if torch.backends.mps.is_available():
        names.append("mps")
    directml = _import_plugin("torch_directml")
    if directml is not None:
        names += [f"directml:{index}" for index in range(directml.device_count())]
    return tuple(names)


def torch_device(name: str) -> torch.device:
    """The torch device behind a name of ``device_names``."""
    if name.startswith("directml:"):
        return importlib.import_module("torch_directml").device(int(name.partition(":")[2]))
    return torch.device(name)


def name_of(device: torch.device) -> str:
    """The name of ``device_names`` for a torch device: the inverse of ``torch_device``."""
    names = device_names()
    if str(device) in names:
        return str(device)
    return next((name for name in names if torch_device(name) == device), str(device))


def total_memory(name: str) -> int:
    """Total memory of a device in bytes; 0 where its backend does not tell."""
    device = torch_device(name)
    if device.type == "cpu":
        return ram()[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    module = _family_module(device.type)
    if hasattr(module, "mem_get_info"):
        return module.mem_get_info(device)[1]
    if hasattr(module, "get_device_properties"):
        return module.get_device_properties(device).total_memory
    return 0


def total_memories(names: Iterable[str]) -> dict[str, int]:
    """The total memory of several devices; see ``total_memory``."""
    return {name: total_memory(name) for name in names}


def stream_module(device: torch.device) -> ModuleType | None:
    """The torch module that makes streams and events for ``device``; ``None`` where it has none."""
    if device.type == "cpu":
        return None
    module = _family_module(device.type)
    capable = all(hasattr(module, name) for name in ("Stream", "Event", "stream", "current_stream"))
    return module if capable else None


def blocking_event(device: torch.device):
    """An event of ``device`` whose ``synchronize`` sleeps instead of spinning, where it can."""
    event = stream_module(device).Event
    try:
        return event(blocking=True)
    except TypeError:  # a backend without that choice
        return event()


def on_device(device: torch.device) -> AbstractContextManager:
    """Inside, ``device`` is the current one of its family, in this thread."""
    module = None if device.type == "cpu" else _family_module(device.type)
    return module.device(device) if hasattr(module, "device") else nullcontext()


def used_memory(name: str) -> int:
    """Bytes in use on a device by this machine's processes; 0 where its backend does not tell."""
    device = torch_device(name)
    if device.type == "cpu":
        available, total = ram()
        return total - available
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    module = _family_module(device.type)
    if hasattr(module, "mem_get_info"):
        free, total = module.mem_get_info(device)
        return total - free
    if hasattr(module, "memory_reserved"):
        return module.memory_reserved(device)
    return 0


def free_memory(name: str) -> int:
    """Bytes that tensors may still take on a device; 0 where its backend does not tell."""
    device = torch_device(name)
    if device.type == "cpu":
        return ram()[0]
    module = _family_module(device.type)
    if not hasattr(module, "mem_get_info"):
        return max(0, total_memory(name) - used_memory(name))
    cached = 0
    if hasattr(module, "memory_reserved"):
        cached = module.memory_reserved(device) - module.memory_allocated(device)
    return module.mem_get_info(device)[0] + cached


def allocated_memory(device: torch.device) -> int | None:
    """Bytes of this process's tensors on a device; ``None`` where its allocator does not tell."""
    module = None if device.type == "cpu" else _family_module(device.type)
    return module.memory_allocated(device) if hasattr(module, "memory_allocated") else None


def reset_peak_memory(device: torch.device) -> None:
    """Let ``peak_memory`` begin anew, where the allocator knows one."""
    module = None if device.type == "cpu" else _family_module(device.type)
    if hasattr(module, "reset_peak_memory_stats"):
        module.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes of this process's tensors on a device since ``reset_peak_memory``."""
    module = None if device.type == "cpu" else _family_module(device.type)
    return module.max_memory_allocated(device) if hasattr(module, "max_memory_allocated") else None


def missing_memory(error: BaseException) -> int | None:
    """Bytes that an out-of-memory error of a device's allocator asked for; 0 if it does not say.

    ``None`` for any other error.
    """
    if not isinstance(error, torch.OutOfMemoryError):
        return None
    match = _TRIED.search(str(error))
    return int(float(match[1]) * _IEC[match[2]]) if match else 0


def ram() -> tuple[int, int]:
    """Bytes of RAM that are available and in all, for this process.

    In a container that is what its limit leaves: psutil tells of the whole machine. Pages of files
    that nobody has used for long (``inactive_file``) can be had back.
    """
    memory = psutil.virtual_memory()
    available, total = memory.available, memory.total
    for names in CGROUP_FILES:
        try:
            limit, used, stat = ((CGROUP / name).read_text(encoding="ascii") for name in names)
        except OSError:  # no such cgroup here
            continue
        if limit.strip().isdecimal() and int(limit) < total:
            counts = dict(line.split() for line in stat.splitlines())
            total = int(limit)
            left = total - int(used) + int(counts.get("inactive_file", 0))
            available = min(available, max(0, left))
    return available, total


def ram_left() -> int:
    """Bytes of RAM that a model may still take; the system keeps a share of all."""
    available, total = ram()
    return int(available - RAM_MARGIN * total)


def page_locked(nbytes: int) -> torch.Tensor | None:
    """A page-locked uint8 buffer in host memory; ``None`` where this machine gives none.

    torch rounds what it allocates so up to a power of two.
    """
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # no accelerator that copies from it, or no memory left to lock
        return None


def empty_caches() -> None:
    """Give back what the allocators of all devices hold without using it.

    Devices on which this process has nothing are left alone: to ask them for anything would make a
    context there, some 300 MB on a GPU that nobody uses.
    """
    for name in device_names():
        device = torch_device(name)
        module = None if device.type == "cpu" else _family_module(device.type)
        if not hasattr(module, "empty_cache") or not _is_in_use(device, module):
            continue
        # Most backends empty the cache of their current device.
        with on_device(device):
            synchronize(device)
            module.empty_cache()
            if hasattr(module, "ipc_collect"):
                module.ipc_collect()


def _is_in_use(device: torch.device, module: ModuleType) -> bool:
    """Whether this process has memory on ``device``; where the backend does not tell, it has."""
    has_context = getattr(torch._C, f"_{device.type}_hasPrimaryContext", None)
    if has_context is not None and not has_context(device.index):
        return False  # cudaMallocAsync would make one to answer the next question
    return not hasattr(module, "memory_reserved") or module.memory_reserved(device) > 0


def trim_host_heap() -> None:
    """Return freed heap memory to the system, where the C library (glibc) would keep it."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def synchronize(device: torch.device) -> None:
    """Block the host until everything queued on ``device`` is done."""
    module = None if device.type == "cpu" else _family_module(device.type)
    if hasattr(module, "synchronize"):
        # torch.mps.synchronize takes no device: there is but one.
        module.synchronize() if device.type == "mps" else module.synchronize(device)


def _family_module(family: str, plugin: str | None = None) -> ModuleType | None:
    """``torch.<family>``, the module of a device family, or ``None``."""
    if plugin is not None and not hasattr(torch, family):
        _import_plugin(plugin)
    return getattr(torch, family, None)


def _device_count(module: ModuleType | None) -> int:
    if module is None or not hasattr(module, "device_count"):
        return 0
    if hasattr(module, "is_available") and not module.is_available():
        return 0
    return module.device_count()


def _import_plugin(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_passes = threading.local()


def pass_device() -> torch.device | None:
    """The compute device of the pass that this thread is in; ``None`` outside of any."""
    devices = getattr(_passes, "devices", ())
    return devices[-1] if devices else None


@contextmanager
def running_on(device: torch.device) -> Iterator[None]:
    """Inside, ``device`` is this thread's ``pass_device``, and torch's current device."""
    devices = vars(_passes).setdefault("devices", [])
    devices.append(device)
    try:
        with on_device(device):
            yield
    finally:
        devices.pop()
