"""How long a step takes on the simulator's virtual clock, against the bound, for a grid of splits.

    python bench/simulated_grid.py [--limit 1.05]

A step is one forward pass in the steady state. The bound is the longer of computing with
everything resident and of moving the swapped bytes (DESIGN: max(L*C, N*T)). Rows are the share of
the model that the compute device's quota holds, columns are the time to compute a block over the
time to move it. Exits with 1 where a ratio is above ``--limit``. The figures are those of a clock
that counts, not measures: they are the same on every machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import conftest  # noqa: F401  makes block_swap importable
import torch
from block_swap.allocation_parser import Block, ModelSizes, parse_allocation, plan_split
from block_swap.swap_executor import BlockSwap, Pack

from rig import simulator

COMPUTE = "acc:0"
BLOCK_BYTES = 1 << 12
BANDWIDTH = 1e6  # bytes per virtual second
WARM_UP, MEASURED = 3, 4

LAYERS = (8, 30, 40)
QUOTAS = (90, 80, 70, 60, 50, 40, 30, 20, 10)  # percent of the model
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


def step_over_bound(layers: int, quota_percent: float, ratio: float) -> tuple[float, int, int]:
    """(step / bound, swapped blocks, slots) for one point of the grid."""
    sizes = ModelSizes(tuple(Block(f"blocks.{i}", BLOCK_BYTES) for i in range(layers)), 0)
    text = f"acc:0,{quota_percent}%;cpu,*"
    allocation = parse_allocation(text, ("cpu", *simulator.devices()), COMPUTE)
    split = plan_split(allocation, sizes, {})
    transfer = BLOCK_BYTES / BANDWIDTH
    model = SyntheticModel(layers, ratio * transfer)
    packs = [Pack.layout([block]) for block in model.blocks]
    for pack, home in zip(packs, split.homes, strict=True):
        pack.place(torch.device(home))
    swap = BlockSwap(torch.device(COMPUTE), packs, {"blocks": range(layers)}, split.slots)
    swap.update()
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
    return step / bound, len(split.swapped), split.slots


def grid(layers: int) -> tuple[list[str], float]:
    """The Markdown table for one model size, and its worst ratio."""
    worst = 0.0
    lines = [
        f"{layers} blocks",
        "",
        "| quota | swapped | slots | " + " | ".join(f"{ratio:g}" for ratio in RATIOS) + " |",
        "|" + "---:|" * (3 + len(RATIOS)),
    ]
    for quota in QUOTAS:
        points = [step_over_bound(layers, quota, ratio) for ratio in RATIOS]
        worst = max(worst, *(point[0] for point in points))
        cells = " | ".join(f"{point[0]:.3f}" for point in points)
        lines.append(f"| {quota}% | {points[0][1]} | {points[0][2]} | {cells} |")
    return [*lines, "", f"worst: {worst:.3f}", ""], worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=1.05, help="largest step / bound allowed")
    limit = parser.parse_args().limit
    simulator.install()
    simulator.clock.flops = float("inf")
    simulator.clock.set_bandwidth(BANDWIDTH)
    worst = 0.0
    with torch.inference_mode():
        for layers in LAYERS:
            lines, here = grid(layers)
            worst = max(worst, here)
            print("\n".join(lines))
    print(f"worst of all: {worst:.3f} (limit {limit})")
    return 0 if worst <= limit else 1


if __name__ == "__main__":
    sys.exit(main())
