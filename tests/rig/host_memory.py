"""What this process holds in RAM, now and at the peak. Linux with glibc only."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLE_SECONDS = 0.002
FIELDS = {"rss": "VmRSS", "anon": "RssAnon", "file": "RssFile"}
M_MMAP_THRESHOLD = -3  # malloc.h


def read() -> dict[str, int]:
    """Bytes in RAM: `rss`, and its parts `anon`, memory of the process's own, and `file`, pages of
    mapped files: copies of what is on the disk, which the kernel drops when it needs room."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return {name: int(lines[field].split()[0]) << 10 for name, field in FIELDS.items()}


@contextmanager
def peak() -> Iterator[dict[str, int]]:
    """Yields a dict that holds, after the block, the most of each figure of `read` inside it."""
    most, done = read(), threading.Event()

    def sample():
        most.update((name, max(most[name], value)) for name, value in read().items())

    def sample_on():
        while not done.wait(SAMPLE_SECONDS):
            sample()

    thread = threading.Thread(target=sample_on, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()
        sample()


def is_mapped(path: Path) -> bool:
    """Whether this process maps the file `path`."""
    return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")


def return_freed_memory_at_once() -> None:
    """From now on, blocks of 256 KiB and more go back to the system when they are freed, so that
    what is resident is what is held. glibc, left alone, keeps of them what suits its threshold."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 256 << 10)
