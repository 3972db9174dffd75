"""Measures every way at every point, in rounds, against the bound of that point.

The bound of a point and a length is max(resident step, swapped bytes / link bandwidth), both
measured in the rounds of that point. A way is loaded once per round and point and runs all lengths.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from machine import Machine, import_package, peak_rss
from model import Weights
from plugin_ways import PluginWay
from shapes import Length, Shape
from way import Point, Resident, Way, split_with
from ways import WAYS

from block_swap.allocation_parser import parse_allocation
from block_swap.host_memory import page_locks
from block_swap.split import ModelSizes, Split
from block_swap.step_time import Timing
from block_swap.swapped_model import SwappedModel

LONG_STEP = 5.0  # seconds; above, a way gets one pass to warm up
FEWEST_PASSES = 2


@dataclass(frozen=True)
class Settings:
    """What to measure. ``budget`` is in seconds: when it is used up, no further way is loaded."""

    shapes: Sequence[Shape]
    formats: Sequence[str]
    shares: Sequence[int]
    ways: Sequence[str]
    rounds: int = 3
    passes: int = 5
    row_seconds: float = 15.0  # passes of one row and round take about that long at most
    budget: float = math.inf

    def passes_of(self, resident_step: float) -> int:
        """How many passes to measure of a length whose resident step takes that long."""
        affordable = int(self.row_seconds / resident_step)
        return max(FEWEST_PASSES, min(self.passes, affordable))


@dataclass
class Row:
    """What was measured of one way at one point and length."""

    length: Length
    point: Point
    way: str
    allocator: str  # of the process that measured it; "" on simulated devices
    split: Split | None = None  # that it was measured with
    seconds: list[float] = field(default_factory=list)  # of each pass
    load_seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)  # from weights in RAM to a first step
    host_seconds: list[float] = field(default_factory=list)  # to queue a pass on an idle device
    equal: bool = True  # bit for bit what the resident model gives
    peak_device: int = 0  # bytes, while running
    peak_load: int = 0  # bytes on the device, while loading
    peak_rss: int = 0

    @property
    def place(self) -> tuple:
        """What it has in common with the rows that its bound comes from."""
        return *self.panel, self.point.share, self.allocator

    @property
    def panel(self) -> tuple[str, str, Length]:
        """What it has in common with all rows of one table."""
        return self.point.model, self.point.form, self.length


@dataclass
class Results:
    """All rows, in the order measured, and what there is no row for."""

    rows: dict[tuple, Row] = field(default_factory=dict)
    bandwidths: dict[tuple, list[float]] = field(default_factory=dict)
    flops: dict[tuple, int] = field(default_factory=dict)  # of a pass, by panel
    weights: dict[tuple[str, str], int] = field(default_factory=dict)  # bytes of the model
    not_at_hand: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, other: Results) -> None:
        """Take over what another process has measured."""
        for table in fields(self):
            mine, theirs = getattr(self, table.name), getattr(other, table.name)
            mine.update(theirs) if isinstance(mine, dict) else mine.extend(theirs)

    def bandwidth(self, row: Row) -> float:
        """Bytes per second of the link, measured at the point of ``row``."""
        return statistics.median(self.bandwidths[row.place])

    def resident_step(self, row: Row) -> float:
        return statistics.median(self.rows[row.place, Resident.name].seconds)

    def bytes_to_move(self, row: Row) -> int:
        """Bytes that this plugin moves in a pass at the place of ``row``."""
        plugin = self.rows.get((row.place, PluginWay.name))
        split = plugin.split if plugin is not None else None
        return (split or row.point.split).bytes_per_pass

    def bound(self, row: Row) -> float:
        """Seconds that no way can be below: see this module."""
        return max(self.resident_step(row), self.bytes_to_move(row) / self.bandwidth(row))

    def ratio(self, row: Row) -> float:
        return statistics.median(row.seconds) / self.bound(row)

    def faster(self, row: Row) -> list[Row]:
        """The ways of others that take less time than ``row`` with as much swapped."""
        own = statistics.median(row.seconds)
        return [
            other
            for other in self.complete()
            if other.place == row.place
            and not other.way.startswith((Resident.name, PluginWay.name))
            and statistics.median(other.seconds) < own
        ]

    def timing(self, row: Row) -> Timing:
        """What predictions for the point of ``row`` are made of."""
        return Timing(self.resident_step(row), {"cpu": self.bandwidth(row)})

    def complete(self) -> list[Row]:
        """The rows that were measured and have a bound: their point has a resident step."""
        rows = [row for row in self.rows.values() if row.load_seconds]  # the others have failed
        places = {row.place for row in rows if row.way == Resident.name}
        return [row for row in rows if row.place in places]

    @property
    def allocators(self) -> list[str]:
        return list(dict.fromkeys(row.allocator for row in self.complete()))

    def over_native(self, row: Row) -> float | None:
        """The step over what it is with PyTorch's own allocator, where both were measured."""
        native = self.rows.get(((*row.place[:-1], "native"), row.way))
        if native is None or native is row or not native.load_seconds:
            return None
        return statistics.median(row.seconds) / statistics.median(native.seconds)


class Suite:
    """One run over all formats, shares, rounds, ways and lengths of ``settings``."""

    def __init__(self, machine: Machine, settings: Settings, results: Results):
        self.machine, self.settings = machine, settings
        self.results = results
        self._deadline = time.monotonic() + settings.budget
        self._ways: list[Way] = []
        for key in settings.ways:
            way = WAYS[key](machine)
            reason = way.missing()
            if reason is None:
                self._ways.append(way)
            else:
                self.results.not_at_hand[way.name] = reason

    def run(self, save: Callable[[Results], object]) -> None:
        """Measure everything; ``save`` gets the results so far whenever a point is done."""
        self._save = save
        for shape in self.settings.shapes:
            for form in self.settings.formats:
                gguf, reason = _gguf_of(form)
                what = f"{shape.name}, {form}"
                if reason is not None:
                    self.results.not_at_hand[form] = reason
                elif not self._out_of_time(what):
                    self._say(f"{what}: making the weights of {shape.layers} blocks")
                    self._measure_format(Weights(shape, form, gguf))
                    self.machine.clear()

    def _measure_format(self, weights: Weights) -> None:
        settings, shape, form = self.settings, weights.shape, weights.form
        self.results.weights[shape.name, form] = weights.nbytes
        sizes = _sizes_of(weights.model(), str(self.machine.device))
        points = list(self._points(shape.name, form, sizes))
        for length in shape.lengths:
            self.results.flops[shape.name, form, length] = shape.flops(length)
        # Of the lengths that fit: what the resident model gives, and how long it takes.
        self._expected: dict[Length, torch.Tensor] = {}
        self._resident: dict[Length, float] = {}
        self._measure_way(Resident(self.machine), weights, points[0], reference=True)
        for point in points:
            for number in range(settings.rounds):
                for way in list(self._ways):
                    what = self._name(way, point)
                    if way.does_not_take(point) is not None:
                        continue
                    if not self._out_of_time(f"{what}, round {number + 1}"):
                        self._say(f"{what}, round {number + 1}")
                        self._try_way(way, weights, point, what)
            self._save(self.results)

    def _points(self, model: str, form: str, sizes: ModelSizes) -> Iterable[Point]:
        """One point per share that swaps other blocks than the one before."""
        seen = None
        for share in self.settings.shares:
            split = split_with(sizes, share, str(self.machine.device))
            if split.homes != seen:
                yield Point(model, form, share, split)
            seen = split.homes

    def _try_way(self, way: Way, weights: Weights, point: Point, what: str) -> None:
        """Measure a way; what it raises is a result, and leaves the machine to the others."""
        try:
            self._measure_way(way, weights, point)
            self.machine.clear()
        except Exception as error:
            message = (str(error).splitlines() or [""])[0]
            missing = isinstance(error, ImportError)  # a checkout that is none, a half installation
            if missing:
                self.results.not_at_hand[way.name] = f"not at hand: {message}"
                self._ways.remove(way)
            else:
                self.results.failed.append(f"{what}: {type(error).__name__}: {message}")
            self._say(f"{what}: {message}")
            try:
                way.unload()
            except Exception as second:
                if not missing:  # otherwise there is nothing that it could unload
                    self.results.failed.append(f"{what}, unloading: {second!r}")
            error.__traceback__ = None  # it holds the model
            self.machine.clear()

    def _measure_way(
        self, way: Way, weights: Weights, point: Point, reference: bool = False
    ) -> None:
        machine = self.machine
        machine.reset_peak()
        with way.mode(), peak_rss() as rss:
            model = weights.model()
            machine.module.synchronize(machine.device)
            start = time.perf_counter()
            forward = way.load(model, point)
            machine.module.synchronize(machine.device)
            load_seconds, peak_load = time.perf_counter() - start, machine.peak()
            ran = False
            shape = weights.shape
            for length in shape.lengths if reference else list(self._expected):
                if reference:
                    self._try_reference(forward, shape, length)
                elif not self._out_of_time(f"{self._name(way, point)}, {length.name}"):
                    row = self._row(way, point, length)
                    first = self._measure_length(way, forward, shape, row)
                    if not ran:  # later lengths find what the first pass has left
                        row.first_seconds.append(load_seconds + first)
                    ran = True
                    row.load_seconds.append(load_seconds)
                    row.peak_load = max(row.peak_load, peak_load)
                    row.peak_rss = max(row.peak_rss, rss["peak"])
            remark = way.remark()
        if remark is not None and not reference:
            remark = f"{self._name(way, point)}: {remark}"
            if remark not in self.results.remarks:
                self.results.remarks.append(remark)
        way.unload()
        del model, forward
        machine.check()

    def _row(self, way: Way, point: Point, length: Length) -> Row:
        row = Row(length, point, way.name, self.machine.allocator)
        return self.results.rows.setdefault((row.place, row.way), row)

    def _name(self, way: Way, point: Point) -> str:
        """What is measured, in words."""
        words = [point.model, point.form, f"{point.swapped}/{point.layers} swapped", way.name]
        return ", ".join(words + self._with_allocator())

    def _with_allocator(self) -> list[str]:
        return [f"allocator {self.machine.allocator}"] if self.machine.allocator else []

    def _try_reference(self, forward, shape: Shape, length: Length) -> None:
        try:
            self._set_reference(forward, shape, length)
        except torch.OutOfMemoryError:
            name = ", ".join([shape.name, length.name, *self._with_allocator()])
            self.results.failed.append(f"{name}: does not fit with everything resident")

    def _set_reference(self, forward, shape: Shape, length: Length) -> None:
        """Learn what a length gives, and how long it takes with everything resident."""
        self.machine.set_length(length, None, 0)
        given = shape.inputs(length, self.machine.device)
        forward(**given)
        passes = self.machine.passes(lambda: forward(**given), 1)
        (self._resident[length],) = passes.seconds
        self._expected[length] = passes.last.cpu()

    def _measure_length(self, way: Way, forward, shape: Shape, row: Row) -> float:
        """Run passes of one length into ``row``; returns the seconds of the first one."""
        machine, length, sizes = self.machine, row.length, row.point.split.sizes
        step = self._resident[length]
        machine.set_length(length, step, sum(block.nbytes for block in sizes.blocks))
        if isinstance(way, Resident):  # once per round
            bandwidths = self.results.bandwidths.setdefault(row.place, [])
            bandwidths.append(machine.bandwidth(sizes.largest_block))
        given = shape.inputs(length, machine.device)
        machine.reset_peak()
        took = machine.one_pass(lambda: forward(**given))
        first_seconds = took.whole
        for _ in range(0 if step > LONG_STEP else way.warm_up - 1):
            took = machine.one_pass(lambda: forward(**given))
            row.host_seconds.append(took.queuing)
        row.equal &= torch.equal(took.result.cpu(), self._expected[length])
        del took
        passes = machine.passes(lambda: forward(**given), self.settings.passes_of(step))
        row.split = way.split(row.point)
        row.seconds += passes.seconds
        row.host_seconds.append(passes.queuing)
        row.equal &= torch.equal(passes.last.cpu(), self._expected[length])
        row.peak_device = max(row.peak_device, machine.peak() + way.device_bytes_beside())
        return first_seconds

    def _out_of_time(self, what: str) -> bool:
        out = time.monotonic() > self._deadline
        if out:
            self.results.skipped.append(what)
        return out

    def _say(self, text: str) -> None:
        if self.machine.real:
            print(text, file=sys.stderr, flush=True)


def _sizes_of(model: torch.nn.Module, compute: str) -> ModelSizes:
    """The sizes of a model as this plugin sees them."""
    allocation = parse_allocation("cpu,*", ("cpu", compute), compute)
    return SwappedModel(model, allocation, page_locks()).sizes


def _gguf_of(form: str):
    """ComfyUI-GGUF for a format of its own, and why it is not at hand, if so."""
    if form == "bf16":
        return None, None
    folder = os.environ.get("GGUF_DIR")
    if not folder:
        return None, "not at hand: GGUF_DIR names no checkout of ComfyUI-GGUF"
    try:
        return import_package("bench_gguf", Path(folder), "dequant", "ops"), None
    except ImportError as error:
        return None, f"not at hand: {error}"
