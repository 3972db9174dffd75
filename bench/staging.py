"""The rate at which pageable RAM gets through the staging ring on this machine, beside a memcpy.

    python bench/staging.py [--link 25] [--chunks 4 8 16 32 64] [--depths 4 8 16]

A home in pageable RAM is copied into a ring of page-locked chunks by a worker thread, and from
there to the device. Here the device costs nothing: the target has no memory and the events are
always done, so what is timed is the host's part. In the columns of a link every chunk takes its
time on a bus of that many GB/s, one behind the other, and the worker sleeps until the one it wants
has left; that shows whether a ring is deep enough. The main thread meanwhile waits, or runs a loop
in Python that keeps the GIL, or launches small operations of torch, as a forward pass does, each of
which lets go of it. Rounds are interleaved and the best of each is shown: what else the machine
does only makes copies slower. ``--out`` gets staging.json and staging.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import machine as bench_machine
import torch

from block_swap import donor_link

MIB = 1 << 20
HOME_BYTES = 512 * MIB  # about a block; two of them are more than a cache
CHUNKS, DEPTHS = (4, 8, 16, 32, 64), (4, 8, 16)  # MiB, chunks
ENOUGH = 0.95  # of the best rate: what a ring that is as good has
QUIET = 0.5  # load of the machine before: above, sizes differ by who else was running


@dataclass
class Line:
    """One measured thing: ``rates`` in bytes per second, one a round."""

    name: str
    rates: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        return max(self.rates)

    @property
    def spread(self) -> float:
        """How far the median round is below the best one."""
        return 1 - statistics.median(self.rates) / self.best


class Done:
    """An event of a device on which everything is done at once."""

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class OnLink:
    """An event behind the copy of a chunk over a bus, which takes one chunk after the other."""

    def __init__(self, seconds: float, bus: list[float]):
        self._seconds, self._bus, self._done = seconds, bus, 0.0

    def record(self, stream: object = None) -> None:
        self._bus[0] = self._done = max(self._bus[0], time.perf_counter()) + self._seconds

    def synchronize(self) -> None:
        left = self._done - time.perf_counter()
        if left > 0:
            time.sleep(left)

    def query(self) -> bool:
        return self._done <= time.perf_counter()


# -------------------------------------------------------------------------------- the main thread


def wait(future: Future) -> None:
    """What a host does that has nothing to do."""
    future.result()


def loop_in_python(future: Future) -> None:
    """Keep the GIL, but for what the interpreter takes away every few milliseconds."""
    while not future.done():
        for _ in range(1000):
            pass


def launch_operations(future: Future) -> None:
    """Small operations with a little Python between them: each lets go of the GIL."""
    small = torch.zeros(64)
    while not future.done():
        for _ in range(20):
            small.add_(1)


MAIN_THREADS = {
    "idle": wait,
    "Python loop": loop_in_python,
    "operations": launch_operations,
}


# ------------------------------------------------------------------------------------ measuring


def stage(
    homes: Sequence[torch.Tensor],
    chunk_bytes: int,
    depth: int,
    new_event: Callable[[], object],
    main_thread: Callable[[Future], None],
) -> float:
    """Seconds that a ring takes for ``homes``: all that this file knows of ``donor_link.Ring``."""
    buffer = torch.zeros(chunk_bytes * depth, dtype=torch.uint8)
    with (
        mock.patch.object(donor_link, "RING_CHUNKS", depth),
        mock.patch.object(donor_link.device_utils, "blocking_event", lambda _: new_event()),
    ):
        ring = donor_link.Ring(buffer, torch.device("cpu"), lambda: None)
    target = torch.empty(homes[0].nbytes, dtype=torch.uint8, device="meta")
    ring.submit(lambda: None, ring).result()  # the thread is there
    start = time.perf_counter()
    for home in homes:
        last = ring.submit(partial(ring.copy, home, target, None), ring)
    main_thread(last)
    return time.perf_counter() - start


def copy_plainly(source: torch.Tensor, target: torch.Tensor, threads: int) -> float:
    """Seconds of one ``copy_`` by ``threads`` of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        start = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - start
    finally:
        torch.set_num_threads(before)


def measure(
    chunks: Sequence[int], depths: Sequence[int], link: float, rounds: int
) -> Iterator[tuple[list[Line], dict[tuple, Line]]]:
    """After every round, the lines of the plain copies and those of the ring so far.

    Those of the ring are by chunk, depth, what the main thread does, and the link or none.
    """
    homes = [torch.full((HOME_BYTES,), number, dtype=torch.uint8) for number in (1, 2)]
    target = torch.zeros(HOME_BYTES, dtype=torch.uint8)
    counts = dict.fromkeys((1, 2, torch.get_num_threads()))
    plain = {n: Line(f"{n} thread{'s' if n > 1 else ''}") for n in counts}
    ring: dict[tuple, Line] = {}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for threads, line in plain.items():
            seconds = min(copy_plainly(home, target, threads) for home in homes)
            line.rates.append(HOME_BYTES / seconds)
        for chunk in chunks:
            for depth in depths:
                for name, main_thread in MAIN_THREADS.items():
                    for rate in (None, link):
                        new_event = (
                            Done
                            if rate is None
                            else partial(OnLink, chunk * MIB / (rate * 1e9), [0.0])
                        )
                        seconds = stage(homes, chunk * MIB, depth, new_event, main_thread)
                        line = ring.setdefault((chunk, depth, name, rate), Line(name))
                        line.rates.append(HOME_BYTES * len(homes) / seconds)
        yield list(plain.values()), ring


def choose(ring: dict[tuple, Line], link: float, load: float | None) -> tuple[int, int] | None:
    """MiB and number of the chunks of the smallest ring near the best; ``None`` if too noisy.

    All states of the main thread count, by how far a ring is below the best of that state; of
    rings that are about as good the one with the fewest bytes is taken, then the larger chunks.
    """
    if load is None or load > QUIET:
        return None
    best = {
        name: max(line.best for key, line in ring.items() if key[2:] == (name, link))
        for name in MAIN_THREADS
    }
    sizes = {key[:2] for key in ring}

    def worst(size: tuple[int, int]) -> float:
        return min(ring[(*size, name, link)].best / best[name] for name in MAIN_THREADS)

    enough = ENOUGH * max(map(worst, sizes))
    return min(
        (size for size in sizes if worst(size) >= enough),
        key=lambda size: (size[0] * size[1], -size[0]),
    )


# ------------------------------------------------------------------------------------- reporting


def markdown(described: dict, plain: list[Line], ring: dict[tuple, Line], link: float) -> str:
    columns = [(name, rate) for rate in (None, link) for name in MAIN_THREADS]
    facts = ", ".join(f"{key} {value}" for key, value in described.items())
    heads = [f"{name}{'' if rate is None else f', link {rate:g}'}" for name, rate in columns]
    chosen = choose(ring, link, described["load before"])
    if chosen is None:
        verdict = f"No ring is chosen: the load before was not known to be below {QUIET}."
    else:
        verdict = f"The smallest ring within {1 - ENOUGH:.0%} of the best here: "
        verdict += f"{chosen[1]} chunks of {chosen[0]} MiB."
    return "\n".join(
        [
            "# From pageable RAM through the staging ring",
            "",
            facts,
            "",
            "GB/s, the best of all rounds; in brackets how far the median round is below it.",
            "",
            "| plain copy of 512 MiB | GB/s |",
            "|---|---:|",
            *(f"| {line.name} | {_rate(line)} |" for line in plain),
            "",
            "Through the ring, by what the main thread does; first with a device that costs "
            f"nothing, then with a link of {link:g} GB/s:",
            "",
            f"| chunk [MiB] | chunks | {' | '.join(heads)} |",
            "|---:|---:|" + "---:|" * len(heads),
            *(
                f"| {size[0]} | {size[1]} | "
                + " | ".join(_rate(ring[(*size, name, rate)]) for name, rate in columns)
                + " |"
                for size in dict.fromkeys(key[:2] for key in ring)
            ),
            "",
            verdict,
        ]
    )


def _rate(line: Line) -> str:
    return f"{line.best / 1e9:.2f} (-{line.spread:.0%})"


def as_json(described: dict, plain: list[Line], ring: dict[tuple, Line], link: float) -> dict:
    """What was measured: bytes per second, one a round."""
    chosen = choose(ring, link, described["load before"])
    return {
        "machine": described,
        "home_bytes": HOME_BYTES,
        "memcpy": [{"threads": line.name, "rates": line.rates} for line in plain],
        "ring": [
            {
                "chunk_bytes": chunk * MIB,
                "chunks": depth,
                "main_thread": name,
                "link": rate and rate * 1e9,
                "rates": line.rates,
            }
            for (chunk, depth, name, rate), line in ring.items()
        ],
        "chosen": chosen and {"chunk_bytes": chosen[0] * MIB, "chunks": chosen[1]},
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--chunks", nargs="+", type=int, default=CHUNKS, help="MiB of a chunk")
    add("--depths", nargs="+", type=int, default=DEPTHS, help="chunks of a ring")
    add("--link", type=float, default=25.0, help="GB/s of the bus to the device")
    add("--rounds", type=int, default=3)
    add("--out", type=Path, default=bench_machine.ROOT / "bench" / "results")
    args = parser.parse_args()
    described = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads of torch": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        # Of a minute: who else was here.
        "load before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for measured in measure(args.chunks, args.depths, args.link, args.rounds):
        text = markdown(described, *measured, args.link)
        whole = json.dumps(as_json(described, *measured, args.link), indent=1)
        (args.out / "staging.json").write_text(whole + "\n", encoding="utf-8")
        (args.out / "staging.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
