"""What the swap costs the host per forward pass, on the CPU, with no copy made.

    python bench/host_time.py [--limit 1.02]

Real Wan blocks of dim 1024: the same forward unpatched, and driven with none, half and all of its
blocks swapped; and the swap alone, whose blocks compute nothing. Copies are left out, so that what
is timed is the work that the host of a GPU has to get done ahead of the kernels (but for recording
events, which a CPU has not). Rounds are interleaved, and the shortest passes are compared: what the
machine does besides only makes them longer. Exits with 1 where a ratio is above ``--limit``, or the
swap alone above ``--limit-us`` per block.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from machine import ROOT, VERSION, comfy_host, import_comfy
from model import Weights
from shapes import WAN, Length

from block_swap import donor_link, swap_executor
from block_swap.packed_weights import Pack

BLOCKS = 8
NARROW = {"dim": 1024, "ffn_dim": 4096, "num_heads": 8, "num_layers": BLOCKS}
SHAPE = replace(WAN, arguments={**WAN.arguments, **NARROW})
LENGTH = Length("short", 1, 8, 8)
SHARES = {"resident": 0.0, "half swapped": 0.5, "all swapped": 1.0}
ROUNDS, ALONE = 10, 200

# Two names of one device: a block whose home is the other is as good as swapped.
COMPUTE, DONOR = torch.device("cpu", 0), torch.device("cpu")


def driven(weights: Weights, share: float) -> tuple[torch.nn.Module, Callable[[], None]]:
    """A model of which ``share`` of the blocks is swapped, and a pass that computes nothing."""
    model = weights.model().float()
    packs = [Pack.layout(block.modules()) for block in model.blocks]
    for index, pack in enumerate(packs):
        pack.place(DONOR)
        if index >= share * BLOCKS:
            pack.flat = _Elsewhere(pack.flat)
    swap = swap_executor.BlockSwap(COMPUTE, packs, [[f"blocks.{i}"] for i in range(BLOCKS)])
    swap.update(2)
    swap.allocate_slots()
    swap.drive(model)
    model(**given())

    def alone() -> None:
        with swap.forward_pass():
            for index in range(BLOCKS):
                swap.enter_block(index)
                swap.leave_block(index)

    return model, alone


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def given() -> dict[str, object]:
    inputs = SHAPE.inputs(LENGTH, DONOR)
    tensors = {k: v.float() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    return {**inputs, **tensors}


class _Elsewhere:
    """A buffer that says that it lies on the compute device."""

    def __init__(self, flat: torch.Tensor):
        self.flat, self.device = flat, COMPUTE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, help="largest ratio to the unpatched forward")
    parser.add_argument("--limit-us", type=float, help="most microseconds per block")
    args = parser.parse_args()
    import_comfy(comfy_host.fetch(VERSION, ROOT / ".cache"), "--cpu")
    weights = Weights(SHAPE, "bf16")
    torch.set_num_threads(1)  # threads that wait for each other wait for the machine
    arguments, problems = given(), []
    with torch.inference_mode():
        models = {"unpatched": (weights.model().float(), lambda: None)}
        models |= {name: driven(weights, share) for name, share in SHARES.items()}
        with mock.patch.object(donor_link.Link, "queue", lambda *_: None):
            rounds = [
                {
                    name: seconds_of(lambda m=model: m(**arguments))
                    for name, (model, _) in models.items()
                }
                for _ in range(ROUNDS)
            ]
            alone = {
                name: min(seconds_of(run) for _ in range(ALONE)) / BLOCKS * 1e6
                for name, (_, run) in models.items()
            }
    passes = {name: min(times[name] for times in rounds) for name in models}
    print("| | pass [ms] | ratio | swap alone, per block [us] |\n|---|---:|---:|---:|")
    for name, seconds in passes.items():
        ratio = seconds / passes["unpatched"]
        print(f"| {name} | {seconds * 1e3:.2f} | {ratio:.4f} | {alone[name]:.1f} |")
        if args.limit is not None and ratio > args.limit:
            problems.append(f"{name}: {ratio:.4f} times the unpatched forward, not {args.limit}")
        if args.limit_us is not None and alone[name] > args.limit_us:
            problems.append(f"{name}: {alone[name]:.1f} us per block, not {args.limit_us}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
