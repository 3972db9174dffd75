"""How long a step takes on the simulator's virtual clock, against the bound, for a grid of splits.

    python bench/simulated_grid.py [--all] [--limit 1.02] [--limit-unequal 1.05]

A step is one forward pass in the steady state, after the passes that the plugin times and what it
makes of them. The bound is the longer of computing with everything resident and of moving the
swapped bytes: max(L*C, N*T) for L blocks computed in C and N swapped blocks moved in T. Rows are
the share of the blocks that is swapped when the model is loaded, with the quota of the compute
device that gives it; columns are C:T, of all blocks. Exits with 1 where a ratio is above its limit.
The figures are those of a clock that counts, not measures: they are the same on every machine.

Flux is there twice: with blocks that compute as long as they are large, which is what planning
takes for granted and has a limit, and as it is, every block as long as any other. While its double
blocks run, the link is asked for more than it carries, and few slots hold little ahead: where many
of them are swapped no order of copies meets the bound. That table has no limit; below it stands how
far the plugin is from the best of all splits of its memory that swap each kind of block evenly.

A quota with room for a single block behind the non-block weights is the floor: with one slot
nothing overlaps, and a step takes N * (C + T) + (L - N) * C, up to twice the bound.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from way import split_with

from block_swap.page_locks import Limit, PageLocks, Pinning
from block_swap.pass_schedule import Timing, predict
from block_swap.split import Block, ModelSizes, Split
from block_swap.swap_choice import compute_bytes
from block_swap.swapped_model import SwappedModel
from rig import simulator

COMPUTE = "acc:0"
UNIT = 1 << 10  # bytes
BANDWIDTH = 1e6  # bytes per virtual second
WARM_UP, MEASURED = 3, 4

SHARES = (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)  # percent of the blocks' bytes that are swapped
RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)  # compute : transfer
SAMPLE = (20, 40, 60, 80, 100), (0.25, 0.5, 0.8, 1.0, 1.25)


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model: how large each is and how long it computes, in any unit."""

    name: str
    nbytes: tuple[int, ...]
    work: tuple[int, ...]
    limited: bool = True

    @property
    def equal(self) -> bool:
        """Whether all have one size."""
        return len(set(self.nbytes)) == 1

    def seconds(self, ratio: float) -> float:
        """What all of them compute for, at a ratio to moving them all."""
        return ratio * sum(self.nbytes) / BANDWIDTH

    @property
    def sizes(self) -> ModelSizes:
        """What planning knows of them."""
        blocks = (Block(f"blocks.{i}", nbytes) for i, nbytes in enumerate(self.nbytes))
        return ModelSizes(tuple(blocks), 0)


def _equal(layers: int) -> Blocks:
    return Blocks(f"{layers} blocks", (4 * UNIT,) * layers, (1,) * layers)


# 648 to 270 MiB.
_FLUX = (12 * UNIT,) * 19 + (5 * UNIT,) * 38
MODELS = (
    _equal(8),
    _equal(30),
    _equal(40),
    Blocks("Flux: 19 and 38 blocks that compute as long as they are large", _FLUX, _FLUX),
    Blocks("Flux: 19 and 38 blocks that compute for one time", _FLUX, (1,) * 57, limited=False),
)


class SyntheticBlock(torch.nn.Module):
    """``nbytes`` of weights and ``seconds`` of computation that reads them."""

    def __init__(self, nbytes: int, seconds: float):
        super().__init__()
        weight = torch.zeros(nbytes, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.seconds = seconds

    def forward(self, x):
        simulator.clock.charge(x.device, self.seconds)
        return x + self.weight[0]


class SyntheticModel(torch.nn.Module):
    def __init__(self, blocks: Blocks, seconds: float):
        super().__init__()
        share = seconds / sum(blocks.work)
        self.blocks = torch.nn.ModuleList(
            SyntheticBlock(nbytes, share * work)
            for nbytes, work in zip(blocks.nbytes, blocks.work, strict=True)
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def page_locks() -> PageLocks:
    """Grants everything: this host is made of numbers."""
    pinning = Pinning(
        pin=lambda _: True,
        unpin=lambda _: True,
        room=lambda: sys.maxsize,
        make_room=lambda _: None,
        able=lambda: True,
    )
    return PageLocks(pinning, lambda: Limit(sys.maxsize, 0))


def step_and_bound(blocks: Blocks, split: Split, ratio: float) -> tuple[float, float]:
    """The time of a step, and its bound, for one point of the grid."""
    seconds = blocks.seconds(ratio)
    model = SyntheticModel(blocks, seconds)
    swapped = SwappedModel(model, split.allocation, page_locks())
    swapped.load(model)
    x = torch.zeros(UNIT, dtype=torch.uint8, device=COMPUTE)
    simulator.clock.reset()
    tuner = swapped.tuner
    while tuner.timing is None or tuner.on_trial is not None:
        model(x)
        torch.acc.synchronize()  # or what was timed is not over yet, by a host that takes no time
    for _ in range(WARM_UP):
        model(x)
    start, end = (torch.acc.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(MEASURED):
        model(x)
    end.record()
    step = start.elapsed_time(end) / 1000 / MEASURED
    return step, max(seconds, swapped.split.bytes_per_pass / BANDWIDTH)


def best_even_step(blocks: Blocks, splits: Sequence[Split], ratio: float) -> float:
    """What the fastest of ``splits`` takes, by how long each block really computes."""
    timing = Timing(blocks.seconds(ratio), {"cpu": BANDWIDTH}, shares=blocks.work)
    return min(predict(split, timing) for split in splits)


def even_splits(split: Split) -> list[Split]:
    """Splits with as much memory as ``split`` that swap some of each kind of block, evenly spread.

    For every number of the blocks of other sizes, the fewest of the smallest.
    """
    blocks = split.sizes.blocks
    kinds = [
        [i for i, block in enumerate(blocks) if block.nbytes == nbytes]
        for nbytes in sorted({block.nbytes for block in blocks}, reverse=True)
    ]
    *larger, smallest = ([_spread(kind, n) for n in range(len(kind) + 1)] for kind in kinds)
    splits = []
    for slots, chosen in product((2, 3), product(*larger)):
        choices = (sum(chosen, ()) + few for few in smallest)
        fitting = (c for c in choices if fits(split, c, slots))
        swapped = next(fitting, None)
        if swapped:
            homes = tuple("cpu" if i in swapped else COMPUTE for i in range(len(blocks)))
            splits.append(replace(split, homes=homes, slots=slots))
    return splits


def fits(split: Split, swapped: Sequence[int], slots: int) -> bool:
    """Whether the quota of ``split`` has room with other blocks swapped."""
    return compute_bytes(split.sizes, swapped, slots) <= split.quotas[0].nbytes


def _spread(kind: Sequence[int], number: int) -> tuple[int, ...]:
    """So many of ``kind``, evenly spread."""
    return tuple(kind[-(-(j + 1) * len(kind) // number) - 1] for j in range(number))


def grid(blocks: Blocks, shares: Sequence[int], ratios: Sequence[float]) -> tuple[list[str], float]:
    """The Markdown table for one model, and its worst ratio."""
    worst, worse, sizes = 0.0, 0.0, blocks.sizes
    lines = [
        blocks.name,
        "",
        "| swapped | quota | slots | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |",
        "|" + "---:|" * (3 + len(ratios)),
    ]
    for share in shares:
        split = split_with(sizes, share, COMPUTE)
        steps = [step_and_bound(blocks, split, ratio) for ratio in ratios]
        points = [step / bound for step, bound in steps]
        worst = max(worst, *points)
        if not blocks.limited:
            even = even_splits(split)
            best = (best_even_step(blocks, even, ratio) for ratio in ratios)
            worse = max(worse, *(s / b for (s, _), b in zip(steps, best, strict=True)))
        row = [
            f"{len(split.swapped)} of {len(sizes.blocks)}",
            f"{split.quotas[0].nbytes / sizes.total_bytes:.0%}",
            str(split.slots),
            *(f"{point:.3f}" for point in points),
        ]
        lines.append(f"| {' | '.join(row)} |")
    end = f"; {worse:.3f} times the best even split" if worse else ""
    return [*lines, "", f"worst: {worst:.3f}{end}", ""], worst


def print_grids(limit: float, unequal: float, everything: bool) -> list[str]:
    """Print the grids of all models; returns what is above its limit.

    ``unequal`` is that of blocks of different sizes. Without ``everything`` they are a sample.
    """
    problems = []
    simulator.install()
    simulator.clock.flops = float("inf")
    simulator.clock.inline_bytes = 0  # the blocks are small for speed, not by nature
    simulator.clock.set_bandwidth(BANDWIDTH)
    logging.disable(logging.WARNING)  # the plugin's table, once per point
    with torch.inference_mode():
        for blocks in MODELS:
            points = (SHARES, RATIOS) if everything or blocks.equal else SAMPLE
            lines, worst = grid(blocks, *points)
            print("\n".join(lines))
            allowed = limit if blocks.equal else unequal
            if blocks.limited and worst > allowed:
                problems.append(f"{blocks.name}: {worst:.3f} times the bound, not {allowed}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--all", action="store_true", help="all points, also for blocks of different sizes")
    add("--limit", type=float, default=1.05, help="largest step / bound allowed, of equal blocks")
    add("--limit-unequal", type=float, default=1.05, help="the same for blocks of two sizes")
    args = parser.parse_args()
    problems = print_grids(args.limit, args.limit_unequal, args.all)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
