"""The card that a suite runs on, real or simulated, behind one interface.

What a card can tell of a run: bytes allocated, now and at the most, by its allocator and by its
driver; the copies that crossed its links, and their streams; which host memory is page-locked. What
can be done to it: let a stream take its time, refuse to page-lock, be out of memory.

`CudaCard` asks torch.cuda, the driver and torch.profiler, `SimulatedCard` asks `rig.simulator`.
"""

from __future__ import annotations

import gc
import json
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import simulator
from .comfy_host import Host

MIB = 1 << 20
CPU = "cpu"

# ------------------------------------------------------------------------------------------ copies


@dataclass(frozen=True)
class Copy:
    """One copy between two memories, `"cpu"` or a device; `pinned` where its end in host memory, if
    it has one, is page-locked. Equal `stream`s are one stream."""

    source: str
    destination: str
    nbytes: int
    pinned: bool
    stream: object


@dataclass
class Traffic:
    """The copies of a while, and the streams that computed in it; both filled when it is over."""

    copies: list[Copy] = field(default_factory=list)
    computing: set[object] = field(default_factory=set)

    def swapped(self) -> list[Copy]:
        """The copies to a card on streams that do not compute."""
        return [copy for copy in self.copies if self._is_swapped(copy)]

    def others(self) -> list[Copy]:
        """All other copies."""
        return [copy for copy in self.copies if not self._is_swapped(copy)]

    def _is_swapped(self, copy: Copy) -> bool:
        return copy.destination != CPU and copy.stream not in self.computing


# As CUPTI names them: HtoD, DtoH, DtoD, PtoP, and the kinds of memory at both ends.
MEMCPY = re.compile(r"Memcpy (?P<way>\w+) \((?P<source>.+) -> (?P<destination>.+)\)")


def traffic_of(events: Iterable[Mapping]) -> Traffic:
    """The traffic in the events of a trace that torch.profiler has exported (Chrome's format).

    Copies within one memory are left out.

    Raises:
        ValueError: an event is called a copy and is none that is known.
    """
    traffic = Traffic()
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") == "kernel":
            traffic.computing.add((arguments["device"], arguments["stream"]))
        elif event.get("cat") == "gpu_memcpy":
            copy = _copy_of(event["name"], arguments)
            if copy.source != copy.destination:
                traffic.copies.append(copy)
    return traffic


def _copy_of(name: str, arguments: Mapping) -> Copy:
    match = MEMCPY.fullmatch(name)
    way = match["way"] if match else None
    # Between two cards, and only there, there is no single "device".
    device = arguments.get("device", arguments.get("inDevice"))
    here = f"cuda:{device}"
    ends = {
        "HtoD": (CPU, here),
        "DtoH": (here, CPU),
        "DtoD": (here, here),
        "HtoH": (CPU, CPU),
        "PtoP": (f"cuda:{arguments.get('fromDevice')}", f"cuda:{arguments.get('toDevice')}"),
    }
    if way not in ends:
        raise ValueError(f"the profiler tells of a copy that is not known here: {name}")
    kinds = match["source"], match["destination"]
    stream = device, arguments["stream"]
    return Copy(*ends[way], arguments["bytes"], "Pageable" not in kinds, stream)


# -------------------------------------------------------------------------------------- page-locks


class PageLocks:
    """Host memory that was page-locked in place and is so still, by wrapping the two functions of
    the CUDA runtime that do so: `held`, bytes by address.

    `refused` are sizes that the driver has, as far as its callers see, no memory left to lock.
    `errors` are calls that a correct program does not make.
    """

    OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation

    def __init__(self, runtime) -> None:
        self.held: dict[int, int] = {}
        self.refused: set[int] = set()
        self.errors: list[str] = []
        self._register = runtime.cudaHostRegister
        self._unregister = runtime.cudaHostUnregister
        runtime.cudaHostRegister = self._on_register
        runtime.cudaHostUnregister = self._on_unregister

    @contextmanager
    def refusing(self, *sizes: int) -> Iterator[None]:
        """Inside, memory of these sizes is not locked."""
        self.refused.update(sizes)
        try:
            yield
        finally:
            self.refused.difference_update(sizes)

    def covers(self, tensor: torch.Tensor) -> bool:
        """Whether all of `tensor`, in host memory, is locked."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(first <= start and end <= first + n for first, n in self.held.items())

    def _on_register(self, start: int, nbytes: int, flags: int):
        if nbytes in self.refused:
            return self.OUT_OF_MEMORY
        if any(start < first + n and first < start + nbytes for first, n in self.held.items()):
            self.errors.append(f"{nbytes} bytes at {start:#x} are locked twice")
        result = self._register(start, nbytes, flags)
        if int(result) == 0:
            self.held[start] = nbytes
        return result

    def _on_unregister(self, start: int):
        if self.held.pop(start, None) is None:
            self.errors.append(f"{start:#x} is unlocked, and was not locked")
        return self._unregister(start)


# ------------------------------------------------------------------------------------------- cards


class Card(ABC):
    """A compute device, and the devices beside it.

    Attributes:
        compute, others: names of devices; `module` is torch's for their type.
        locks: what is page-locked.
        sizes: of the model files, arguments of `tiny_wan.write_wan` by name.
        video, steps: of a run, which makes two passes a step.
        stressed_passes: how many are enough to find a missing wait.
        rounding, segments: bytes by which a figure may be above the sum of the sizes that were
            asked for: of every allocation, and of what the allocator has from the driver.
    """

    compute: str
    others: list[str]
    locks: PageLocks
    sizes: Mapping[str, Mapping]
    video: Mapping[str, int]
    steps: int
    stressed_passes: int
    rounding: int
    segments: int

    def __init__(self, kind: str) -> None:
        self.module = torch.get_device_module(kind)
        self.compute, *self.others = (f"{kind}:{i}" for i in range(self.module.device_count()))

    @abstractmethod
    def boot(self, source: Path, base: Path, nodes, argv) -> Host:
        """Start the ComfyUI in `source` on this card."""

    def describe(self) -> str:
        """The card in one line."""
        return f"{self.module.get_device_name(self.compute)} and {len(self.others)} others"

    def check(self) -> None:  # noqa: B027
        """Raise where the card knows of a race; a real one does not tell."""

    def reset(self) -> None:
        """Let all work finish, give back what nobody uses, and forget peaks and copies."""
        gc.collect()
        for device in (self.compute, *self.others):
            with self.module.device(device):
                self.module.synchronize(device)
                self.module.empty_cache()
                self.module.reset_peak_memory_stats(device)

    def allocated(self, device: str) -> int:
        """Bytes that tensors have of a device now."""
        return self.module.memory_allocated(device)

    def peak(self, device: str) -> int:
        """The most bytes that tensors had of a device since `reset`."""
        return self.module.max_memory_allocated(device)

    def used(self, device: str) -> int:
        """Bytes of a device that are in use, as its driver says."""
        free, total = self.module.mem_get_info(device)
        return total - free

    def slack(self, allocations: int) -> int:
        """How far `allocated` may be above what was asked for in so many allocations."""
        return MIB + allocations * self.rounding

    def exhaust(self) -> None:
        """Ask for more memory than the compute device has: the error is the allocator's own."""
        total = self.module.mem_get_info(self.compute)[1]
        torch.empty(2 * total, dtype=torch.uint8, device=self.compute)

    def ballast(self, left: int) -> torch.Tensor:
        """A tensor that leaves so many bytes of the compute device free."""
        free = self.module.mem_get_info(self.compute)[0]
        return torch.empty(free - left, dtype=torch.uint8, device=self.compute)

    @abstractmethod
    def delay(self, stream, seconds: float) -> None:
        """Let `stream` do nothing for so long, after what it has been given."""

    @abstractmethod
    def traffic(self) -> AbstractContextManager[Traffic]:
        """Yields what will hold, after the block, the traffic inside it."""


class CudaCard(Card):
    """The first CUDA device of this machine, and the others."""

    sizes = {
        # Blocks of 89 MiB, 0.9 GiB in all.
        "wan": {"layers": 10, "dim": 1536, "ffn": 8960},
        "other": {"layers": 10, "dim": 1536, "ffn": 8960, "seed": 7},
        # Blocks of 32 MiB, half a chunk of what pageable homes go through.
        "small": {"layers": 8, "dim": 1024, "ffn": 4096},
    }
    video = {"width": 512, "height": 320, "length": 5, "batch_size": 1}
    steps = 2
    stressed_passes = 200
    # The caching allocator leaves up to 1 MiB in a large block rather than split it off, and takes
    # segments of 2 to 20 MiB from the driver (c10/cuda/CUDACachingAllocator.cpp).
    rounding = MIB
    segments = 64 * MIB

    def __init__(self) -> None:
        super().__init__("cuda")
        self.locks = PageLocks(torch.cuda.cudart())
        self._cycles = self._cycles_per_second()

    def boot(self, source: Path, base: Path, nodes, argv) -> Host:
        return Host.boot(source, base, nodes, accelerators=False, gpu=True, argv=argv)

    def describe(self) -> str:
        allocator = torch.cuda.get_allocator_backend()
        return f"{super().describe()}, torch {torch.__version__}, allocator {allocator}"

    def _cycles_per_second(self) -> float:
        """How fast `torch.cuda._sleep` counts, at the clock of a card that has work."""
        cycles = 50_000_000
        for _ in range(2):  # the first time wakes it
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        return cycles / (start.elapsed_time(end) / 1000)

    def delay(self, stream, seconds: float) -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(seconds * self._cycles))

    @contextmanager
    def traffic(self) -> Iterator[Traffic]:
        traffic = Traffic()
        self._synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            yield traffic
            self._synchronize()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        found = traffic_of(events)
        traffic.copies, traffic.computing = found.copies, found.computing

    def _synchronize(self) -> None:
        for device in (self.compute, *self.others):
            torch.cuda.synchronize(device)


class _SimulatedRuntime:
    """The two functions of the CUDA runtime that page-lock, as the simulator knows of it."""

    def cudaHostRegister(self, start: int, nbytes: int, flags: int) -> int:
        simulator.page_locking.lock_range(start, nbytes)
        return 0

    def cudaHostUnregister(self, start: int) -> int:
        simulator.page_locking.unlock_range(start)
        return 0


class SimulatedCard(Card):
    """Two simulated accelerators, on which copies from pageable memory block as on CUDA.

    This process then page-locks as one with CUDA does, by the same functions of torch.
    """

    sizes = {
        "wan": {"layers": 6},
        "other": {"layers": 6, "seed": 7},
        "small": {"layers": 6, "dim": 128, "ffn": 256},
    }
    video = {"width": 64, "height": 64, "length": 5, "batch_size": 1}
    steps = 1
    stressed_passes = 8  # every missing wait is found in the first
    rounding = 0
    segments = 0

    def __init__(self) -> None:
        torch.set_num_threads(1)  # the tensors are tiny
        simulator.install(count=2)
        super().__init__(simulator.TYPE)
        runtime = _SimulatedRuntime()
        self.locks = PageLocks(runtime)
        torch.cuda.cudart = lambda: runtime
        self._page_locked: list[torch.Tensor] = []
        self._empty, torch.empty = torch.empty, self._empty_page_locked
        simulator.page_locking.enforced = True

    def _empty_page_locked(self, *args, pin_memory=False, **kwargs) -> torch.Tensor:
        """`torch.empty`; page-locked memory stays so, as torch's allocator of it keeps it."""
        tensor = self._empty(*args, **kwargs)
        if pin_memory:
            simulator.page_locking.lock(tensor)
            self._page_locked.append(tensor)
        return tensor

    def boot(self, source: Path, base: Path, nodes, argv) -> Host:
        host = Host.boot(source, base, nodes, argv=argv)
        # As ComfyUI sets it on Linux, where it finds a card that takes page-locked memory.
        host.mm.MAX_PINNED_MEMORY = 0.9 * host.mm.get_total_memory(torch.device(CPU))
        return host

    def check(self) -> None:
        simulator.check()

    def reset(self) -> None:
        super().reset()
        simulator.reset()

    def delay(self, stream, seconds: float) -> None:
        with torch.acc.stream(stream):
            simulator.clock.charge(stream.device, seconds)

    @contextmanager
    def traffic(self) -> Iterator[Traffic]:
        traffic = Traffic()
        simulator.ledger.clear_copies()
        yield traffic
        traffic.copies = [
            Copy(copy.source, copy.destination, copy.nbytes, copy.pinned, copy.stream.number)
            for copy in simulator.ledger.copies
        ]
        devices = (self.compute, *self.others)
        traffic.computing = {torch.acc.default_stream(device).number for device in devices}


CARDS = {"cuda": CudaCard, "simulated": SimulatedCard}
