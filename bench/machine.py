"""The machine under measurement: ComfyUI's model code without its server, clocks and memory.

``Machine`` is one compute device with what the suite asks of it, ``Simulated`` the same on
``rig.simulator``, where time is a virtual clock that can be set for every length.
"""

from __future__ import annotations

import gc
import importlib
import platform
import statistics
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import early
import psutil
import torch

import conftest  # noqa: F401  makes block_swap importable
from block_swap.device_utils import trim_host_heap
from rig import comfy_host, simulator

ROOT = Path(__file__).parents[1]
VERSION = next(iter(comfy_host.SOURCES))
BANDWIDTH_COPIES = 5

T = TypeVar("T")


@dataclass(frozen=True)
class Passes(Generic[T]):
    """What some passes took, queued one behind the other."""

    seconds: list[float]  # of each, on the device
    queuing: float  # seconds of the host for the first, which finds the device idle
    last: T  # what the last one gave


@dataclass(frozen=True)
class OnePass(Generic[T]):
    """What a pass on an idle device took by the clock of the host."""

    queuing: float  # seconds until it was queued
    whole: float  # seconds until it was done on the device, too
    result: T


def import_comfy(source: Path, *flags: str):
    """Import the model code of the ComfyUI in ``source``; returns comfy.model_management.

    Its start-up is left out, and with it its choice of an allocator, which is ``early``'s. Nothing
    but torch and a handful of packages is needed (bench/README.md lists them).
    """
    sys.path.insert(0, str(source.resolve()))
    sys.path.append(str(comfy_host.STANDINS))
    sys.argv = ["main.py", *flags]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management

    return comfy.model_management


def import_package(name: str, folder: Path, *modules: str) -> types.ModuleType:
    """Import some modules of a custom node package in ``folder``, and not its ``__init__``."""
    if name not in sys.modules:
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(folder)]
    for module in modules:
        importlib.import_module(f"{name}.{module}")
    return sys.modules[name]


class Machine:
    """A CUDA device of this machine, and the ComfyUI in ``source``.

    ``dynamic_vram`` is why DynamicVRAM does not run here, or ``None``; comfy-aimdo, which takes
    part in every allocation of the process, is left out unless it is ``wanted``. ``allocator`` is
    the one that this process has, by its name in ``early.ALLOCATORS``.
    """

    real = True

    def __init__(self, source: Path, wanted: bool):
        self.device = torch.device("cuda", torch.cuda.current_device())
        names = {backend: name for name, backend in early.ALLOCATORS.items()}
        backend = torch.cuda.get_allocator_backend()
        self.allocator = names.get(backend, backend)
        self.dynamic_vram = _start_dynamic_vram(self.device) if wanted else "not asked for"
        self.mm = import_comfy(source)
        self.module = torch.get_device_module(self.device.type)

    @property
    def memory(self) -> int:
        """Bytes of the device."""
        return self.module.get_device_properties(self.device).total_memory

    def describe(self) -> dict[str, object]:
        """What the report says of this machine."""
        properties = self.module.get_device_properties(self.device)
        return {
            "device": properties.name,
            "device_bytes": properties.total_memory,
            "ram_bytes": psutil.virtual_memory().total,
            "torch": torch.__version__,
            "comfyui": VERSION,
            "python": platform.python_version(),
            "simulated": not self.real,
        }

    def set_length(self, length, resident_step: float | None, nbytes: int) -> None:
        """Make ready to measure passes of ``length``; a real machine is what it is."""

    def passes(self, run: Callable[[], T], number: int) -> Passes[T]:
        """Time ``number`` calls that are queued one behind the other, by events of the device."""
        marks = [self.module.Event(enable_timing=True) for _ in range(number + 1)]
        self.module.synchronize(self.device)
        start, queuing = time.perf_counter(), None
        marks[0].record()
        for mark in marks[1:]:
            last = run()
            if queuing is None:
                queuing = time.perf_counter() - start
            mark.record()
        self.module.synchronize(self.device)
        times = [a.elapsed_time(b) / 1000 for a, b in zip(marks, marks[1:], strict=False)]
        return Passes(times, queuing, last)

    def one_pass(self, run: Callable[[], T]) -> OnePass[T]:
        """Time one call on an idle device by the clock of the host."""
        self.module.synchronize(self.device)
        start = time.perf_counter()
        result = run()
        queuing = time.perf_counter() - start
        self.module.synchronize(self.device)
        return OnePass(queuing, time.perf_counter() - start, result)

    def bandwidth(self, nbytes: int) -> float:
        """Bytes per second from page-locked host memory to the device, in copies of ``nbytes``."""
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.real)
        target = torch.empty(nbytes, dtype=torch.uint8, device=self.device)

        def copy():
            target.copy_(host, non_blocking=True)

        copy()
        return nbytes / statistics.median(self.passes(copy, BANDWIDTH_COPIES).seconds)

    def reset_peak(self) -> None:
        self.module.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Most bytes allocated on the device since ``reset_peak``, by the count of the allocator.

        PyTorch's own keeps it, the pool of cudaMallocAsync does (its ``UsedMemHigh``).
        """
        return self.module.max_memory_allocated(self.device)

    def clear(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        self.module.synchronize(self.device)
        self.module.empty_cache()
        if hasattr(torch._C, "_host_emptyCache"):  # page-locked memory, which is kept otherwise
            torch._C._host_emptyCache()
        trim_host_heap()

    def check(self) -> None:
        """Raise where the machine knows of a race; a real one does not tell."""


class Simulated(Machine):
    """One simulated device. A length has a ratio of computing to moving, set on the clock.

    Host memory counts as page-locked. RAM and the times of the host say nothing here and are not
    reported.
    """

    real = False
    allocator = ""
    dynamic_vram = "not on simulated devices: comfy-aimdo drives real ones"
    FLOPS = 1e12

    def __init__(self, source: Path, wanted: bool):
        torch.set_num_threads(1)  # the tensors are tiny
        simulator.install(count=1, memory=1 << 30)
        self.mm = import_comfy(source, "--cpu")
        comfy_host.tell_comfy_about(simulator.devices(), self.mm)
        self.device = torch.device(simulator.devices()[0])
        self.module = torch.get_device_module(self.device.type)
        self._give_host_streams()
        simulator.clock.flops = self.FLOPS
        # Peers page-lock by these, for which torch wants a device of its own kind.
        torch.Tensor.pin_memory = lambda tensor, *_: tensor
        torch.Tensor.is_pinned = lambda tensor, *_: True
        gc.freeze()  # every load ends with a collection: spare it going through ComfyUI's modules

    def _give_host_streams(self) -> None:
        """ComfyUI makes its offload streams for CUDA and XPU only: hand it two of this device."""
        streams = [self.module.Stream(device=self.device) for _ in range(2)]
        for stream in streams:
            stream.as_context = self.module.stream
        self.mm.NUM_STREAMS = len(streams)
        self.mm.STREAMS[self.device] = streams
        self.mm.current_stream = self.module.current_stream

    def describe(self) -> dict[str, object]:
        whole = super().describe()
        return {k: whole[k] for k in ("device", "comfyui", "simulated")}

    def set_length(self, length, resident_step: float | None, nbytes: int) -> None:
        """Set the link so that a step takes ``length.ratio`` times as long as moving ``nbytes``."""
        rate = 1e15
        if resident_step is not None:
            rate = length.ratio * nbytes / resident_step
        simulator.clock.set_bandwidth(rate)

    def clear(self) -> None:
        super().clear()
        simulator.reset()

    def check(self) -> None:
        simulator.check()


def _start_dynamic_vram(device: torch.device) -> str | None:
    """Let comfy-aimdo take hold of the device; why DynamicVRAM cannot run, if so."""
    if early.AIMDO is None:
        return f"not at hand: {early.WHY_NOT}"
    try:
        if early.AIMDO.init_devices([device.index]):
            return None
    except Exception as error:  # a foreign library: whatever it says is the reason
        return f"comfy-aimdo: {error}"
    return "comfy-aimdo cannot drive this device"


@contextmanager
def peak_rss(every: float = 0.01) -> Iterator[dict[str, int]]:
    """Yields a dict that holds, after the block, the ``peak`` RSS of this process in bytes."""
    process, done = psutil.Process(), threading.Event()
    most = {"peak": process.memory_info().rss}

    def sample():
        while not done.wait(every):
            most["peak"] = max(most["peak"], process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()
        most["peak"] = max(most["peak"], process.memory_info().rss)
