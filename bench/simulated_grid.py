"""How long a step takes on the simulator's virtual clock, against the bound, for a grid of splits.

    python bench/simulated_grid.py [--limit 1.05]

A step is one forward pass in the steady state. The bound is the longer of computing with
everything resident and of moving the swapped bytes: max(L*C, N*T) for L blocks computed in C and N
swapped blocks moved in T. Rows are the share of the blocks that is swapped, with the quota of the
compute device that gives it; columns are C:T. Exits with 1 where a ratio is above ``--limit``. The
figures are those of a clock that counts, not measures: they are the same on every machine.

A quota with room for a single block behind the non-block weights is the floor: with one slot
nothing overlaps, and a step takes N * (C + T) + (L - N) * C, up to twice the bound.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from ways import split_with

import conftest  # noqa: F401  makes block_swap importable
from block_swap.packed_weights import Pack
from block_swap.split import Block, ModelSizes, Split
from block_swap.swap_executor import BlockSwap
from rig import simulator

COMPUTE = "acc:0"
BLOCK_BYTES = 1 << 12
BANDWIDTH = 1e6  # bytes per virtual second
WARM_UP, MEASURED = 3, 4

LAYERS = (8, 30, 40)
SHARES = (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)  # percent of the blocks that are swapped
RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)  # compute : transfer


class SyntheticBlock(torch.nn.Module):
    """``BLOCK_BYTES`` of weights and ``seconds`` of computation that reads them."""

    def __init__(self, seconds: float):
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.zeros(BLOCK_BYTES, dtype=torch.uint8), requires_grad=False
        )
        self.seconds = seconds

    def forward(self, x):
        simulator.clock.charge(x.device, self.seconds)
        return x + self.weight


class SyntheticModel(torch.nn.Module):
    def __init__(self, layers: int, seconds: float):
        super().__init__()
        self.blocks = torch.nn.ModuleList(SyntheticBlock(seconds) for _ in range(layers))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def step_over_bound(split: Split, ratio: float) -> float:
    """The time of a step over its bound, for one point of the grid."""
    layers = len(split.homes)
    transfer = BLOCK_BYTES / BANDWIDTH
    model = SyntheticModel(layers, ratio * transfer)
    packs = [Pack.layout([block]) for block in model.blocks]
    for pack, home in zip(packs, split.homes, strict=True):
        pack.place(torch.device(home))
    swap = BlockSwap(torch.device(COMPUTE), packs, [[f"blocks.{i}"] for i in range(layers)])
    swap.update(split.slots)
    swap.allocate_slots()
    swap.drive(model)
    x = torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device=COMPUTE)
    simulator.clock.reset()
    for _ in range(WARM_UP):
        x = model(x)
    start, end = (torch.acc.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(MEASURED):
        x = model(x)
    end.record()
    step = start.elapsed_time(end) / 1000 / MEASURED
    bound = max(layers * ratio * transfer, split.bytes_per_pass / BANDWIDTH)
    return step / bound


def grid(layers: int) -> tuple[list[str], float]:
    """The Markdown table for one model size, and its worst ratio."""
    worst = 0.0
    sizes = ModelSizes(tuple(Block(f"blocks.{i}", BLOCK_BYTES) for i in range(layers)), 0)
    lines = [
        f"{layers} blocks",
        "",
        "| swapped | quota | slots | " + " | ".join(f"{ratio:g}" for ratio in RATIOS) + " |",
        "|" + "---:|" * (3 + len(RATIOS)),
    ]
    for share in SHARES:
        split = split_with(sizes, max(1, round(layers * share / 100)), COMPUTE)
        points = [step_over_bound(split, ratio) for ratio in RATIOS]
        worst = max(worst, *points)
        row = [
            f"{len(split.swapped)} of {layers}",
            f"{split.quotas[0].nbytes / split.sizes.total_bytes:.0%}",
            str(split.slots),
            *(f"{point:.3f}" for point in points),
        ]
        lines.append(f"| {' | '.join(row)} |")
    return [*lines, "", f"worst: {worst:.3f}", ""], worst


def print_grids() -> float:
    """Print the grids of all model sizes; returns the worst ratio of all."""
    simulator.install()
    simulator.clock.flops = float("inf")
    simulator.clock.inline_bytes = 0  # the blocks are small for speed, not by nature
    simulator.clock.set_bandwidth(BANDWIDTH)
    worst = 0.0
    with torch.inference_mode():
        for layers in LAYERS:
            lines, here = grid(layers)
            worst = max(worst, here)
            print("\n".join(lines))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=1.05, help="largest step / bound allowed")
    limit = parser.parse_args().limit
    worst = print_grids()
    print(f"worst of all: {worst:.3f} (limit {limit})")
    return 0 if worst <= limit else 1


if __name__ == "__main__":
    sys.exit(main())
