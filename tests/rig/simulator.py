"""Simulated accelerators: devices `acc:0`, `acc:1`, ... in pure Python on CPU-only torch.

Real modules run on them, under `torch.inference_mode()` too, with results bit-equal to the CPU's,
because the CPU computes them. What a GPU would get wrong silently is an error here, and what it
would only make slow is a number that repeats:

- one op on tensors of two devices raises, as on CUDA;
- streams and events carry vector clocks: using memory without waiting for what must come first
  raises `RaceError`; what only a destructor can find is collected in `races`;
- `ledger` knows the bytes allocated per device, now and at the peak, and each copy between devices;
- `clock` keeps a virtual time per stream, so that overlap can be asserted.

`install()` registers the backend; `torch.acc` then offers the part of `torch.cuda` that ComfyUI and
its plugins use.

How it works: an `AccTensor` is a wrapper that reports `acc:i` and holds a CPU tensor. Every op on
it goes through `__torch_dispatch__`, which unwraps, checks, computes on the CPU and wraps. Work is
done when it is issued; only its bookkeeping is asynchronous. Threads share one host clock: they are
taken to synchronise with each other, as Python code that shares tensors must.

The rules of streams and of copies are those of CUDA in PyTorch: see "CUDA semantics" in its manual,
and `aten/src/ATen/native/cuda/Copy.cu` for what a copy waits for.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

TYPE = "acc"

# Guards the bookkeeping. Re-entrant, because a Buffer can be freed at any point of it.
_lock = threading.RLock()


class RaceError(RuntimeError):
    """Two streams use the same memory, and nothing orders the one after the other."""


# ------------------------------------------------------------------------------- time and order


class Timeline:
    """What has happened before a point: a vector clock, and the virtual time of that point.

    `seen[n]` is the number of operations of stream n that are known to be finished.
    """

    __slots__ = ("_epoch", "_time", "seen")
    epoch = 0

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.time = 0.0

    @property
    def time(self) -> float:
        """Virtual seconds since the clock was reset; 0 where it was reset since."""
        return self._time if self._epoch == Timeline.epoch else 0.0

    @time.setter
    def time(self, seconds: float) -> None:
        self._time, self._epoch = seconds, Timeline.epoch

    def join(self, other: Timeline) -> None:
        """Come after `other` as well."""
        seen = self.seen
        for number, count in other.seen.items():
            if seen.get(number, 0) < count:
                seen[number] = count
        self.time = max(self.time, other.time)

    def copy(self) -> Timeline:
        other = Timeline()
        other.join(self)
        return other

    def is_after(self, point: tuple[Stream, int]) -> bool:
        """Whether the operation `point`, a stream and its count, is known to be finished."""
        stream, count = point
        return self.seen.get(stream.number, 0) >= count


class _Host(Timeline):
    """What the host has synchronised with. Everything enqueued later comes after it.

    What is known to be finished holds for all threads, but each waits on its own: its virtual time
    is not that of others.
    """

    __slots__ = ("_threads", "version")

    def __init__(self) -> None:
        self._threads = threading.local()
        super().__init__()
        self.version = 0

    @property
    def time(self) -> float:
        epoch, seconds = getattr(self._threads, "time", (Timeline.epoch, 0.0))
        return seconds if epoch == Timeline.epoch else 0.0

    @time.setter
    def time(self, seconds: float) -> None:
        self._threads.time = Timeline.epoch, seconds

    def synchronize(self, other: Timeline) -> None:
        """Block the host until `other`."""
        with _lock:
            self.join(other)
            self.version += 1


_host = _Host()


class Stream:
    """A queue of work on one device, as `torch.cuda.Stream`. `priority` has no effect."""

    _numbers = itertools.count()

    def __init__(self, device=None, priority: int = 0) -> None:
        self.accelerator = _accelerator(device)
        self.priority = priority
        self.number = next(Stream._numbers)
        self.timeline = Timeline()
        self.count = 0
        self._host_version = -1

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def __repr__(self) -> str:
        return f"<acc.Stream {self.number} of {self.accelerator.name}>"

    def __enter__(self) -> Stream:
        _current.entered.append(torch.acc.stream(self))
        _current.entered[-1].__enter__()
        return self

    def __exit__(self, *error) -> None:
        _current.entered.pop().__exit__(*error)

    def advance(self) -> tuple[Stream, int]:
        """Enqueue one operation: it comes after all before it and all the host has waited for."""
        if self._host_version != _host.version:
            self.timeline.join(_host)
            self._host_version = _host.version
        self.count += 1
        self.timeline.seen[self.number] = self.count
        self.accelerator.timeline.seen[self.number] = self.count
        return self, self.count

    def come_after(self, other: Timeline) -> None:
        """Make all later work of this stream wait for `other`."""
        with _lock:
            self.timeline.join(other)
            self.accelerator.timeline.join(other)

    def wait_event(self, event: Event) -> None:
        """Make all later work wait for the event as last recorded; if it never was, for nothing."""
        if event.recorded is not None:
            self.come_after(event.recorded)

    def wait_stream(self, stream: Stream) -> None:
        """Make all later work wait for all work now in `stream`."""
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Block the host until all work now in this stream is finished."""
        _host.synchronize(self.timeline)

    def query(self) -> bool:
        """Whether the host has synchronised with all work now in this stream.

        Work never finishes by itself here: polling without synchronising would not end.
        """
        return _host.is_after((self, self.count))


class Event:
    """A point in a stream, as `torch.cuda.Event`. `blocking` and `interprocess` have no effect."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False) -> None:
        self.enable_timing = enable_timing
        self.recorded: Timeline | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Stand for the work now in `stream`, the current stream by default, and no longer for
        what an earlier call recorded."""
        stream = torch.acc.current_stream() if stream is None else stream
        with _lock:
            stream.advance()
            self.recorded = stream.timeline.copy()

    def wait(self, stream: Stream | None = None) -> None:
        """Make `stream`, the current stream by default, wait for this event."""
        (torch.acc.current_stream() if stream is None else stream).wait_event(self)

    def synchronize(self) -> None:
        """Block the host until this event."""
        if self.recorded is not None:
            _host.synchronize(self.recorded)

    def query(self) -> bool:
        """Whether the host has synchronised with this event. See `Stream.query`."""
        return self.recorded is None or all(
            _host.seen.get(number, 0) >= count for number, count in self.recorded.seen.items()
        )

    def elapsed_time(self, end: Event) -> float:
        """Virtual milliseconds from this event to `end`."""
        if not (self.enable_timing and end.enable_timing and self.recorded and end.recorded):
            raise RuntimeError("Both events must be recorded, and made with enable_timing=True")
        return (end.recorded.time - self.recorded.time) * 1000.0


class Clock:
    """Virtual time, in seconds since `reset()`.

    - Multiplying matrices (mm, bmm, addmm, baddbmm, convolution, attention) takes its floating
      point operations, 2*m*n*k, over `flops`. All other computation takes no time, nor does a copy
      within a device.
    - A copy between devices takes its bytes over the bandwidth of its link, and has it to itself:
      there is one link for each pair of devices and direction. Up to `inline_bytes` from the host
      take no time: CUDA sends so little along with the commands, past the copy engine.
    - The host takes no time. It is only set forward where it synchronises.

    Rates are kept by `reset()`; `reset_rates()` is for them.
    """

    def __init__(self) -> None:
        self._link_free: dict[tuple[str, str], float] = {}
        self.reset_rates()

    def reset_rates(self) -> None:
        """Go back to 1e14 floating point operations and, on every link, 25e9 bytes per second."""
        self.flops = 1e14
        self.inline_bytes = 64 << 10
        self._bandwidth: dict[tuple[str | None, str | None], float] = {(None, None): 25e9}

    def bandwidth(self, source: str, destination: str) -> float:
        """Bytes per second from one device to another, such as `"cpu"` to `"acc:0"`."""
        pairs = ((source, destination), (source, None), (None, destination), (None, None))
        return next(self._bandwidth[pair] for pair in pairs if pair in self._bandwidth)

    def set_bandwidth(self, bytes_per_second: float, source=None, destination=None) -> None:
        """Set the rate of a link. A device left out stands for any that has no rate of its own."""
        pair = tuple(None if end is None else str(end) for end in (source, destination))
        self._bandwidth[pair] = float(bytes_per_second)

    def now(self, device=None) -> float:
        """When the last work issued so far, on one device or on any, will be finished."""
        chosen = _accelerators if device is None else [_accelerator(device)]
        return max(accelerator.timeline.time for accelerator in chosen)

    def charge(self, device, seconds: float) -> None:
        """Let the current stream of `device` compute for `seconds`."""
        stream = torch.acc.current_stream(device)
        with _lock:
            stream.advance()
            self.run(stream, seconds)

    def run(self, stream: Stream, seconds: float) -> None:
        """Let the operation just enqueued on `stream` take `seconds`."""
        self._finish(stream, stream.timeline.time + seconds)

    def transfer(self, stream: Stream, source: str, destination: str, nbytes: int) -> None:
        """Let the operation just enqueued on `stream` be a copy over a link."""
        if source == "cpu" and nbytes <= self.inline_bytes:
            return
        link = (source, destination)
        start = max(stream.timeline.time, self._link_free.get(link, 0.0))
        end = start + nbytes / self.bandwidth(source, destination)
        self._link_free[link] = end
        self._finish(stream, end)

    def reset(self) -> None:
        """Set all streams, events and links back to 0 s."""
        Timeline.epoch += 1
        self._link_free.clear()

    @staticmethod
    def _finish(stream: Stream, time: float) -> None:
        stream.timeline.time = time
        stream.accelerator.timeline.time = max(stream.accelerator.timeline.time, time)


clock = Clock()


# ---------------------------------------------------------------------------- memory and copies


@dataclass(frozen=True)
class Copy:
    """One copy between two devices: their names, the bytes moved, the stream it ran on, and whether
    its end in host memory, if it has one, was page-locked."""

    source: str
    destination: str
    nbytes: int
    stream: Stream
    pinned: bool


class Ledger:
    """The bytes allocated on each device, now and at the peak, and the copies between devices.

    A view is no allocation. An allocation counts the exact bytes of its storage.
    """

    def __init__(self) -> None:
        self.capacity: dict[str, int] = {}
        self.allocated: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.copies: list[Copy] = []

    def add_device(self, device: str) -> None:
        self.allocated[device] = self.peak[device] = 0

    def require(self, device: str, nbytes: int) -> None:
        """Raise `torch.OutOfMemoryError` unless `device` has `nbytes` left."""
        capacity, allocated = self.capacity[device], self.allocated[device]
        if allocated + nbytes > capacity:
            tried, total, free = (
                f"{n / 2**20:.2f} MiB" for n in (nbytes, capacity, capacity - allocated)
            )
            raise torch.OutOfMemoryError(
                f"{TYPE} out of memory. Tried to allocate {tried}. {device} has a total capacity "
                f"of {total} of which {free} is free."
            )

    def change(self, device: str, nbytes: int) -> None:
        """Allocate `nbytes` more, or free some where negative."""
        if nbytes > 0:
            self.require(device, nbytes)
        self.allocated[device] += nbytes
        self.peak[device] = max(self.peak[device], self.allocated[device])

    def reset_peak(self) -> None:
        self.peak.update(self.allocated)

    def clear_copies(self) -> None:
        self.copies.clear()

    def bytes_moved(self, source: str | None = None, destination: str | None = None) -> int:
        """Bytes of the copies from `source` to `destination`.

        Each is a device (`"acc:0"`), a device type (`"acc"`, `"cpu"`) or None for any.
        """
        return sum(copy.nbytes for copy in self._between(source, destination))

    def count(self, source: str | None = None, destination: str | None = None) -> int:
        """Number of the copies from `source` to `destination`, given as in `bytes_moved`."""
        return len(self._between(source, destination))

    def _between(self, source, destination) -> list[Copy]:
        def matches(device: str, wanted) -> bool:
            return wanted is None or str(wanted) in (device, device.split(":")[0])

        return [
            copy
            for copy in self.copies
            if matches(copy.source, source) and matches(copy.destination, destination)
        ]


ledger = Ledger()


class Accelerator:
    """One simulated device: its default stream, and the sum of all work given to it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.name = f"{TYPE}:{index}"
        self.device = torch.device(TYPE, index)
        self.timeline = Timeline()
        ledger.add_device(self.name)


_accelerators: list[Accelerator] = []
_default_streams: list[Stream] = []


class _Current(threading.local):
    """What each thread has chosen with `set_device`, `set_stream` and `with stream:`."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, Stream] = {}
        self.entered: list[contextlib.AbstractContextManager] = []


_current = _Current()


def _accelerator(device=None) -> Accelerator:
    """The device meant by a name, an index, a `torch.device` or None, the current device."""
    if isinstance(device, str):
        device = torch.device(device)
    if isinstance(device, torch.device):
        if device.type != TYPE:
            raise ValueError(f"Expected an {TYPE} device, but got: {device}")
        device = device.index
    index = _current.device if device is None else device
    if not 0 <= index < len(_accelerators):
        raise RuntimeError(f"invalid device ordinal {TYPE}:{index} of {len(_accelerators)}")
    return _accelerators[index]


def _current_stream(accelerator: Accelerator) -> Stream:
    index = accelerator.index
    return _current.streams.get(index) or _default_streams[index]


class HostMemory:
    """The ranges of host memory that copies issued as non-blocking have yet to read or write.

    Ranges are addresses and keep nothing alive. Page-locked memory is assumed unless `page_locking`
    is enforced: from pageable memory CUDA would read earlier than this.
    """

    def __init__(self) -> None:
        self._ranges: dict[tuple[int, int, Stream], int] = {}
        self._host_version = 0

    def add(self, tensor: torch.Tensor, point: tuple[Stream, int]) -> None:
        """Let `tensor`, on the CPU, be in use until the operation `point` is finished."""
        stream, count = point
        self._forget_finished()
        self._ranges[(*self._range(tensor), stream)] = count

    def in_flight(self, tensor: torch.Tensor) -> bool:
        """Whether any byte of `tensor`, on the CPU, is in use by a copy that the host cannot know
        to be finished."""
        with _lock:
            self._forget_finished()
            start, end = self._range(tensor)
            return any(first < end and start < last for first, last, _ in self._ranges)

    def _forget_finished(self) -> None:
        if self._host_version != _host.version:
            self._host_version = _host.version
            self._ranges = {
                key: count
                for key, count in self._ranges.items()
                if not _host.is_after((key[2], count))
            }

    @staticmethod
    def _range(tensor: torch.Tensor) -> tuple[int, int]:
        start = tensor.data_ptr()
        if not tensor.numel():
            return start, start
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        return start, start + (last + 1) * tensor.element_size()


class PageLocking:
    """Which host memory is page-locked: all of it, unless `enforced`.

    Where it is enforced, a copy from memory that was not locked blocks the host, as on CUDA.
    """

    def __init__(self) -> None:
        self.enforced = False
        self._locked: dict[int, int] = {}

    def lock(self, tensor: torch.Tensor) -> bool:
        """Page-lock the memory of a tensor on the CPU, until `unlock`."""
        self.lock_range(tensor.data_ptr(), tensor.nbytes)
        return True

    def unlock(self, tensor: torch.Tensor) -> None:
        self.unlock_range(tensor.data_ptr())

    def lock_range(self, start: int, nbytes: int) -> None:
        """Page-lock `nbytes` from the address `start` on, until `unlock_range(start)`."""
        self._locked[start] = start + nbytes

    def unlock_range(self, start: int) -> None:
        del self._locked[start]

    def blocks(self, tensor: torch.Tensor) -> bool:
        """Whether a copy from `tensor` blocks the host."""
        if not self.enforced:
            return False
        start = tensor.data_ptr()
        end = start + tensor.nbytes
        return not any(first <= start and end <= last for first, last in self._locked.items())


page_locking = PageLocking()

_host_memory = HostMemory()
host_in_flight = _host_memory.in_flight


# ------------------------------------------------------------------------------------ race check

races: list[str] = []


def check() -> None:
    """Raise `RaceError` if memory was freed while another stream still used it."""
    if races:
        raise RaceError("\n".join(races))


class Buffer:
    """One allocation: all tensors that share its storage share it. It is what races are found in.

    Allocating counts as a write on the current stream, because a caching allocator hands out memory
    that earlier work of that stream may still use.
    """

    def __init__(self, accelerator: Accelerator, elem: torch.Tensor) -> None:
        storage = elem.untyped_storage()
        self.accelerator = accelerator
        self.owner = _current_stream(accelerator)
        self.nbytes = 0
        with _lock:
            self.written = self.owner.advance()
        self.reads: dict[Stream, int] = {}
        self.recorded: set[Stream] = set()
        self.key = storage._cdata
        self.resize(storage.nbytes())

    def resize(self, nbytes: int) -> None:
        with _lock:
            ledger.change(self.accelerator.name, nbytes - self.nbytes)
            self.nbytes = nbytes

    def __del__(self) -> None:
        self.resize(0)
        known = self.owner.timeline
        for point in (self.written, *self.reads.items()):
            stream = point[0]
            if not (stream in self.recorded or known.is_after(point) or _host.is_after(point)):
                races.append(
                    f"{self.accelerator.name}: memory allocated on {self.owner} was freed while "
                    f"{stream}, which it has not waited for, may still use it"
                )


def _enqueue(op: str, stream: Stream, reads, writes) -> tuple[Stream, int]:
    """Put an operation on these Buffers on `stream`; raise if it is not ordered after others."""
    point = stream.advance()
    known = stream.timeline
    for buffer in reads:
        if not known.is_after(buffer.written):
            raise _race(op, stream, "uses", "written", buffer.written[0])
    for buffer in writes:
        if not known.is_after(buffer.written):
            raise _race(op, stream, "writes", "written", buffer.written[0])
        for reader in buffer.reads.items():
            if not known.is_after(reader):
                raise _race(op, stream, "writes", "read", reader[0])
    for buffer in reads:
        buffer.reads[stream] = point[1]
    for buffer in writes:
        buffer.written = point
        buffer.reads.clear()
    return point


def _race(op: str, stream: Stream, does: str, done: str, other: Stream) -> RaceError:
    return RaceError(
        f"{op} on {stream} {does} memory that may still be {done} on {other}: "
        "it was not made to wait for it"
    )


# --------------------------------------------------------------------------------- tensors and ops

aten = torch.ops.aten


class AccTensor(torch.Tensor):
    """A tensor on a simulated device: a wrapper of the CPU tensor `elem`."""

    elem: torch.Tensor
    buffer: Buffer

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if len(types) > 1 and not all(issubclass(kind, AccTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None:
            return special(func, *args, **kwargs)
        plan = _PLANS.get(func)
        if plan is None:
            plan = _PLANS[func] = _Plan(func)
        # Ops made of others arrive whole under inference_mode; elsewhere autograd takes them apart.
        if plan.composite:
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _run(func, plan, args, kwargs)

    def __repr__(self) -> str:
        return f"AccTensor({self.elem!r}, device='{self.device}')"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            twin = self.detach().clone().requires_grad_(self.requires_grad)
            twin.__dict__ = {**self.__dict__, **twin.__dict__}
            memo[id(self)] = twin
        return memo[id(self)]

    def as_subclass(self, cls):
        """A view that is of class `cls` too: what methods of a subclass of Tensor return."""
        with torch._C.DisableTorchFunctionSubclass():  # a subclass may have a detach of its own
            view = torch.Tensor.detach(self)
        view.__class__ = _blend(type(view), cls)
        return view

    def __format__(self, spec: str) -> str:
        return format(self.cpu(), spec)

    def tolist(self):
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage in host memory that stands for the device memory."""
        return self.elem.untyped_storage()

    def record_stream(self, stream: Stream) -> None:
        """Let the memory, once freed, be reused only after the work then in `stream`."""
        self.buffer.recorded.add(stream)


_BLENDS: dict[type, type] = {}


def _blend(own: type, cls: type) -> type:
    """A class that dispatches as AccTensor and otherwise behaves as `cls`."""
    if issubclass(own, cls):
        return own
    if issubclass(cls, AccTensor):
        return cls
    if cls not in _BLENDS:
        _BLENDS[cls] = blend = type(f"Acc{cls.__name__}", (cls, AccTensor), {})

        def torch_function(_, func, types, args=(), kwargs=None):
            types = [cls if kind is blend else kind for kind in types]
            return cls.__torch_function__(func, types, args, kwargs)

        # Results become `cls` again: on the CPU as they are, on a device by `as_subclass`. Set only
        # now, because torch switches it off while it makes a class with a __torch_dispatch__.
        blend.__torch_function__ = classmethod(torch_function)
    return _BLENDS[cls]


def _make(elem: torch.Tensor, buffer: Buffer) -> AccTensor:
    # A view of an ordinary tensor is ordinary, also where it is taken in inference mode.
    if torch.is_inference_mode_enabled() and not elem.is_inference():
        with torch.inference_mode(False):
            return _make(elem, buffer)
    tensor = torch.Tensor._make_wrapper_subclass(
        AccTensor,
        elem.shape,
        strides=elem.stride(),
        storage_offset=elem.storage_offset(),
        dtype=elem.dtype,
        device=buffer.accelerator.device,
    )
    tensor.elem = elem
    tensor.buffer = buffer
    return tensor


def _wrap(elem: torch.Tensor, accelerator: Accelerator, inputs=()) -> AccTensor:
    """`elem` on a device: as a view, where it shares the storage of an input, or as new memory."""
    return _make(elem, _buffer_of(elem, accelerator, inputs))


def _buffer_of(elem: torch.Tensor, accelerator: Accelerator, inputs) -> Buffer:
    key = elem.untyped_storage()._cdata
    for tensor in inputs:
        if tensor.buffer.key == key:
            return tensor.buffer
    return Buffer(accelerator, elem)


def _attention_flops(result, query, key, value, *_args) -> int:
    scores = query.shape[:-1].numel() * key.shape[-2]
    return 2 * scores * (query.shape[-1] + value.shape[-1])


def _convolution_flops(result, x, weight, bias, stride, padding, dilation, transposed, *_) -> int:
    return 2 * (x if transposed else result).numel() * weight.shape[1:].numel()


# Floating point operations of an op, from its result and arguments on the CPU.
_FLOPS = {
    "aten::mm": lambda result, left, *_: 2 * result.numel() * left.shape[-1],
    "aten::bmm": lambda result, left, *_: 2 * result.numel() * left.shape[-1],
    "aten::addmm": lambda result, add, left, *_: 2 * result.numel() * left.shape[-1],
    "aten::baddbmm": lambda result, add, left, *_: 2 * result.numel() * left.shape[-1],
    "aten::convolution": _convolution_flops,
    "aten::scaled_dot_product_attention": _attention_flops,
}

# A composite op that chooses another algorithm where the device is not the CPU. To be bit-equal to
# it, it must run there whole.
_ATTENTION = aten.scaled_dot_product_attention.default

_SYNCHRONIZING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Plan:
    """What the bookkeeping of one op needs to know, from its schema."""

    def __init__(self, func) -> None:
        schema = func._schema
        name = schema.name
        self.name = str(func)
        self.composite = func is not _ATTENTION and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        )
        # Arguments that are written, as (position, name), and which of them each result is.
        written = [
            (position, argument)
            for position, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.written = [(position, argument.name) for position, argument in written]
        owners = {
            label: index
            for index, (_, argument) in enumerate(written)
            for label in argument.alias_info.before_set
        }
        results = [result.alias_info for result in schema.returns]
        self.returned = [
            owners[min(alias.before_set)] if alias is not None and alias.is_write else None
            for alias in results
        ]
        # Views, and ops that only look at the shape of a tensor, do not use its memory.
        self.uses_memory = not (
            any(alias is not None and not alias.is_write for alias in results)
            or name.endswith("_like")
            or name.startswith("aten::new_")
        )
        self.indexes = name == "aten::index" or "index_put" in name
        self.synchronizes = bool(_SYNCHRONIZING.intersection(func.tags))
        self.flops = _FLOPS.get(name.rstrip("_"))


_PLANS: dict[object, _Plan] = {}


def _mixed(op: str, one: object, other: object) -> RuntimeError:
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{one} and {other}! (when calling {op})"
    )


def _unwrap(value, inputs: list[AccTensor], op: str):
    """`value` with CPU tensors for AccTensors, which are collected in `inputs`."""
    if isinstance(value, AccTensor):
        if inputs and inputs[0].buffer.accelerator is not value.buffer.accelerator:
            raise _mixed(op, inputs[0].device, value.device)
        inputs.append(value)
        return value.elem
    if isinstance(value, list | tuple):
        return [_unwrap(item, inputs, op) for item in value]
    # As on CUDA, a tensor of no dimensions on the CPU is a number.
    if isinstance(value, torch.Tensor) and value.dim():
        raise _mixed(op, value.device, inputs[0].device if inputs else TYPE)
    return value


def _run(func, plan: _Plan, args, kwargs):
    """Compute an op on the CPU, on the current stream of its tensors' device."""
    if plan.indexes:
        # CUDA moves indices that are on the CPU.
        indices = [
            index if index is None or isinstance(index, AccTensor) else index.to(args[0].device)
            for index in args[1]
        ]
        args = (args[0], indices, *args[2:])
    inputs: list[AccTensor] = []
    cpu_args = [_unwrap(value, inputs, plan.name) for value in args]
    cpu_kwargs = {name: _unwrap(value, inputs, plan.name) for name, value in kwargs.items()}
    accelerator = inputs[0].buffer.accelerator
    target = accelerator
    if cpu_kwargs.get("device") is not None:
        device = torch.device(cpu_kwargs["device"])
        target = _accelerator(device) if device.type == TYPE else None
        cpu_kwargs["device"] = "cpu" if target else device
    written = [
        args[position] if position < len(args) else kwargs[name] for position, name in plan.written
    ]

    stream = _current_stream(accelerator)
    if plan.uses_memory:
        writes = [tensor.buffer for value in written for tensor in _tensors(value, plan.name)]
        with _lock:
            _enqueue(plan.name, stream, [tensor.buffer for tensor in inputs], writes)
    result = func(*cpu_args, **cpu_kwargs)
    if plan.flops is not None:
        with _lock:
            clock.run(stream, plan.flops(result, *cpu_args) / clock.flops)
    if plan.synchronizes:
        stream.synchronize()
    for value in written:
        for tensor in _tensors(value, plan.name):
            _refresh(tensor, inputs)

    if target is None:
        return result
    if isinstance(result, torch.Tensor):
        owner = plan.returned[0]
        return _wrap(result, target, inputs) if owner is None else written[owner]
    if not isinstance(result, list | tuple):
        return result
    # A list of tensors is one result, and is never what was written; a tuple is several.
    owners = plan.returned if isinstance(result, tuple) else [None] * len(result)
    wrapped = []
    for item, owner in zip(result, owners, strict=True):
        if owner is not None:
            item = written[owner]
        elif isinstance(item, torch.Tensor):
            item = _wrap(item, target, inputs)
        wrapped.append(item)
    return wrapped


def _tensors(value, op: str) -> list[AccTensor]:
    """The tensors of an argument that is written: a tensor or a list of them."""
    tensors = list(value) if isinstance(value, list | tuple) else [value]
    for tensor in tensors:
        if not isinstance(tensor, AccTensor):
            raise _mixed(op, tensor.device, TYPE)
    return tensors


def _refresh(tensor: AccTensor, inputs) -> None:
    """Follow what an op that writes into `tensor.elem` may have done to its shape and storage."""
    elem, buffer = tensor.elem, tensor.buffer
    storage = elem.untyped_storage()
    if storage._cdata != buffer.key:
        tensor.buffer = _buffer_of(elem, buffer.accelerator, inputs)
    elif storage.nbytes() != buffer.nbytes:
        buffer.resize(storage.nbytes())
    if elem.shape != tensor.shape or elem.stride() != tensor.stride():
        _TENSOR_DATA.__set__(tensor, _make(elem, tensor.buffer))


# ------------------------------------------------------------------------- copies between devices


def _copy(destination: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> None:
    """Copy between two devices, at least one of them simulated.

    The stream is the current one of the simulated device; between two of them, that of the source,
    with the destination's current stream waited for before and waiting after.
    """
    up, down = isinstance(destination, AccTensor), isinstance(source, AccTensor)
    to, origin = (
        tensor.buffer.accelerator.name if isinstance(tensor, AccTensor) else str(tensor.device)
        for tensor in (destination, source)
    )
    # Types are converted on the host, or between two devices on the source: see Copy.cu.
    nbytes = destination.numel() * (destination if up else source).element_size()
    reads = [source.buffer] if down else []
    writes = [destination.buffer] if up else []
    stream = _current_stream((source if down else destination).buffer.accelerator)
    with _lock:
        partner = _current_stream(destination.buffer.accelerator) if up and down else None
        if partner is not None:
            stream.wait_stream(partner)
        point = _enqueue("copy_", stream, reads, writes)
        clock.transfer(stream, origin, to, nbytes)
        pinned = partner is not None or not page_locking.blocks(source if up else destination)
        ledger.copies.append(Copy(origin, to, nbytes, stream, pinned))
        if partner is not None:
            partner.wait_stream(stream)
        elif not non_blocking or (up and not pinned):
            stream.synchronize()
        elif down:
            _host_memory.add(destination, point)
        elif _is_plain(source, destination):
            _host_memory.add(source, point)
    (destination.elem if up else destination).copy_(source.elem if down else source)


def _is_plain(source: torch.Tensor, destination: torch.Tensor) -> bool:
    """Whether a copy reads `source` itself: not what was first converted, expanded or packed."""
    same = source.dtype == destination.dtype and source.shape == destination.shape
    return same and source.is_contiguous()


def _on_copy(func, destination, source, non_blocking=False):
    if destination.device == source.device:
        return _run(func, _COPY_PLAN, (destination, source), {})
    _copy(destination, source, non_blocking)
    return destination


def _on_to_copy(func, source, *, device=None, non_blocking=False, **kwargs):
    device = source.device if device is None else torch.device(device)
    target = _accelerator(device) if device.type == TYPE else None
    if target is source.buffer.accelerator:
        return _run(func, _TO_COPY_PLAN, (source,), kwargs)
    # A copy of the CPU tensor has the right type and strides; its contents are then accounted for.
    elem = func(source.elem, **kwargs)
    destination = elem
    if target is not None:
        destination = _wrap(elem, target)
    _copy(destination, source, non_blocking)
    return destination


def _on_item(func, source):
    # Reading one number is a copy to the host, which waits for it.
    number = torch.empty_like(source.elem)
    _copy(number, source, non_blocking=False)
    return number.item()


def _on_shallow_copy_type(func, one, other):
    # The wrapper of an AccTensor cannot become another class: `module.to` must make new parameters.
    return isinstance(one, AccTensor) and isinstance(other, AccTensor)


_SPECIAL = {
    aten.copy_.default: _on_copy,
    aten._to_copy.default: _on_to_copy,
    aten._local_scalar_dense.default: _on_item,
    aten._has_compatible_shallow_copy_type.default: _on_shallow_copy_type,
}
_COPY_PLAN = _Plan(aten.copy_.default)
_TO_COPY_PLAN = _Plan(aten._to_copy.default)

_TENSOR_DATA = torch._C.TensorBase.data


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor.data = value`, also where one of them is an AccTensor, whose Python part C++ leaves
    behind."""
    if isinstance(tensor, AccTensor) and isinstance(value, AccTensor):
        _TENSOR_DATA.__set__(tensor, value)
        tensor.elem, tensor.buffer = value.elem, value.buffer
    elif isinstance(tensor, AccTensor) or isinstance(value, AccTensor):
        other = value.detach()
        if isinstance(tensor, torch.nn.Parameter):
            other = torch.nn.Parameter(other, tensor.requires_grad)
        kept = {
            name: attribute
            for name, attribute in tensor.__dict__.items()
            if name not in ("elem", "buffer", "_is_param")
        }
        other.__dict__.update(kept)
        torch.utils.swap_tensors(tensor, other)
    else:
        _TENSOR_DATA.__set__(tensor, value)


# ---------------------------------------------------------------------------- factories, torch.acc


def _allocate(elem_of, nbytes: int, device) -> AccTensor:
    accelerator = _accelerator(device)
    # Before the host runs out of memory itself.
    ledger.require(accelerator.name, nbytes)
    return _wrap(elem_of(), accelerator)


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    dtype = dtype or torch.get_default_dtype()
    return _allocate(
        lambda: torch.empty(size, dtype=dtype, memory_format=memory_format, device="cpu"),
        math.prod(size) * dtype.itemsize,
        device,
    )


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    dtype = dtype or torch.get_default_dtype()
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    return _allocate(
        lambda: torch.empty_strided(size, stride, dtype=dtype, device="cpu"),
        (last + 1) * dtype.itemsize if math.prod(size) else 0,
        device,
    )


def _copy_from(source, destination, non_blocking=False):
    """What `copy_` comes to where Python dispatch is switched off, as in `torch.tensor`."""
    return _on_copy(aten.copy_.default, destination, source, non_blocking)


def _attention(*args, **kwargs):
    return AccTensor.__torch_dispatch__(_ATTENTION, (), args, kwargs)


class DeviceModule:
    """`torch.acc`: what ComfyUI and its plugins use of `torch.cuda`, under the same names."""

    Stream = Stream
    Event = Event

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return len(_accelerators)

    def current_device(self) -> int:
        return _current.device

    def set_device(self, device) -> None:
        _current.device = _accelerator(device).index

    @contextlib.contextmanager
    def device(self, device):
        """Choose the current device of this thread; None changes nothing."""
        before = _current.device
        if device is not None:
            self.set_device(device)
        try:
            yield
        finally:
            _current.device = before

    def current_stream(self, device=None) -> Stream:
        return _current_stream(_accelerator(device))

    def default_stream(self, device=None) -> Stream:
        return _default_streams[_accelerator(device).index]

    def set_stream(self, stream: Stream | None) -> None:
        """Make `stream` the current one of its device, and its device the current device."""
        if stream is not None:
            _current.streams[stream.accelerator.index] = stream
            _current.device = stream.accelerator.index

    @contextlib.contextmanager
    def stream(self, stream: Stream | None):
        """Do what `set_stream` does for a while; None changes nothing."""
        if stream is None:
            yield
            return
        before = self.current_stream(stream.device)
        with self.device(stream.device):
            self.set_stream(stream)
            try:
                yield stream
            finally:
                _current.streams[stream.accelerator.index] = before

    def synchronize(self, device=None) -> None:
        """Block the host until all work of the device is finished."""
        _host.synchronize(_accelerator(device).timeline)

    def empty_cache(self) -> None:
        """Nothing is cached: freed memory is free."""

    def mem_get_info(self, device=None) -> tuple[int, int]:
        """Bytes free, bytes in all."""
        name = _accelerator(device).name
        return ledger.capacity[name] - ledger.allocated[name], ledger.capacity[name]

    def memory_allocated(self, device=None) -> int:
        return ledger.allocated[_accelerator(device).name]

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device=None) -> int:
        return ledger.peak[_accelerator(device).name]

    def reset_peak_memory_stats(self, device=None) -> None:
        name = _accelerator(device).name
        ledger.peak[name] = ledger.allocated[name]

    def memory_stats(self, device=None) -> dict[str, int]:
        allocated = self.memory_allocated(device)
        return {"active_bytes.all.current": allocated, "reserved_bytes.all.current": allocated}

    def get_device_name(self, device=None) -> str:
        return f"Simulated accelerator {_accelerator(device).index}"

    def get_device_properties(self, device=None) -> SimpleNamespace:
        total = ledger.capacity[_accelerator(device).name]
        return SimpleNamespace(name=self.get_device_name(device), total_memory=total)

    def manual_seed_all(self, seed: int) -> None:
        """Seed the CPU's generator, which all simulated devices draw from."""
        torch.default_generator.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return True

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, device_index) -> bool:
        return True


class _DeviceGuard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.PrivateUse1


# What C++ refers to and does not own: the hooks, the guard and the kernels.
_registered: list[object] = []


_HostGenerator = torch.Generator


class _GeneratorType(type):
    def __instancecheck__(cls, instance) -> bool:
        return isinstance(instance, _HostGenerator)


class Generator(metaclass=_GeneratorType):
    """`torch.Generator`, which gives a simulated device the CPU's, where its operations run."""

    def __new__(cls, device="cpu"):
        return _HostGenerator("cpu" if torch.device(device).type == TYPE else device)


def _register() -> None:
    hooks, guard = _Hooks(), _DeviceGuard()
    _setup_privateuseone_for_python_backend(TYPE, DeviceModule(), hooks, guard)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    torch.Tensor.data = property(_TENSOR_DATA.__get__, _set_data)
    torch.Generator = Generator
    # Autocast changes nothing: no op is registered for it.
    autocast = torch.library.Library("_", "IMPL")
    autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _registered.extend((hooks, guard, library, autocast))


def install(count: int = 2, memory: int = 8 << 30) -> None:
    """Make the devices `acc:0` to `acc:count-1` exist, each with `memory` bytes.

    May be called again: devices are added where `count` is larger, never removed, and `memory`
    then holds for all of them. What is allocated stays.
    """
    if not _registered:
        _register()
    for index in range(len(_accelerators), count):
        _accelerators.append(Accelerator(index))
        _default_streams.append(Stream(index))
    ledger.capacity = {accelerator.name: memory for accelerator in _accelerators}


def devices() -> list[str]:
    """The names of all simulated devices."""
    return [accelerator.name for accelerator in _accelerators]


def reset() -> None:
    """Let all work finish, and forget copies, peaks, races and virtual time.

    What is allocated stays, and so do rates, capacities and current streams.
    """
    for accelerator in _accelerators:
        _host.synchronize(accelerator.timeline)
    ledger.clear_copies()
    ledger.reset_peak()
    races.clear()
    clock.reset()
