"""A CUDA driver's page-locking without CUDA: it counts, and it can refuse."""

import types


class Cudart:
    """Stands in for `torch.cuda.cudart()`: `cudaHostRegister` and `cudaHostUnregister`.

    `held` maps addresses to bytes, `calls` counts registrations that were asked for, and from the
    one with number `refuse_from` on (0 is the first) all are refused. A range that overlaps one
    that is held, or the end of one that is not, is an error, as it is for the driver.
    """

    ERROR = 712  # cudaErrorHostMemoryAlreadyRegistered

    def __init__(self):
        self.held = {}
        self.calls = 0
        self.peak = 0
        self.refuse_from = None

    @property
    def nbytes(self):
        return sum(self.held.values())

    def cudaHostRegister(self, pointer, size, flags):
        self.calls += 1
        if self.refuse_from is not None and self.calls > self.refuse_from:
            return 2  # cudaErrorMemoryAllocation
        for start, nbytes in self.held.items():
            if start < pointer + size and pointer < start + nbytes:
                return self.ERROR
        self.held[pointer] = size
        self.peak = max(self.peak, self.nbytes)
        return 0

    def cudaHostUnregister(self, pointer):
        return 0 if self.held.pop(pointer, None) is not None else self.ERROR


def install(monkeypatch, mm, budget):
    """Let ComfyUI's `model_management` page-lock `budget` bytes through a new `Cudart`."""
    cudart = Cudart()
    monkeypatch.setattr("torch.cuda.cudart", lambda: cudart)
    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", budget)
    return cudart


def pinning(cudart, room=None):
    """The functions that `page_locks.Pinning` wants, on `cudart` alone."""
    return types.SimpleNamespace(
        pin=lambda t: cudart.cudaHostRegister(t.data_ptr(), t.nbytes, 1) == 0,
        unpin=lambda t: cudart.cudaHostUnregister(t.data_ptr()) == 0,
        room=room or (lambda: 1 << 60),
        make_room=lambda nbytes: None,
        able=lambda: True,
        allowed=True,
    )
