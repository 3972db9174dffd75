"""Retention: holds the models whose user said keep, and hands them back to their loader."""

from __future__ import annotations

import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from .allocation_parser import AllocationError
from .distorch2_patch import patchers_of
from .model_lookup import META, allocation_text, follow_allocation
from .multigpu_strings import stored_allocations
from .patch_table import Patch, PatchTable

logger = logging.getLogger("MultiGPU")

# Inputs of DisTorch2 loaders that say where a model goes, not which one it is. The advanced
# checkpoint loader has them twice, with these prefixes.
PLACEMENT_INPUTS = (
    "virtual_vram_gb",
    "donor_device",
    "use_other_vram",
    "expert_mode_allocations",
    "eject_models",
    "keep_loaded",
)

PART_PREFIXES = ("", "unet_", "clip_")


def unload(mm: ModuleType, model) -> None:
    """Take an inner model off every device and out of ComfyUI's list, which stays the same list."""
    for position in reversed(range(len(mm.current_loaded_models))):
        loaded = mm.current_loaded_models[position]
        if loaded.model is not None and loaded.model.model is model:
            loaded.model_unload()
            mm.current_loaded_models.pop(position)


@dataclass(frozen=True)
class FileState:
    """A file as it was when it was read."""

    path: str
    size: int  # bytes
    modified: int  # nanoseconds

    @classmethod
    def of(cls, path: str) -> FileState:
        stat = Path(path).stat()
        return cls(path, stat.st_size, stat.st_mtime_ns)

    def unchanged(self) -> bool:
        try:
            return FileState.of(self.path) == self
        except OSError:
            return False


@dataclass
class Retained:
    """The outputs of one loader node, held for the nodes ``owners`` (their ids)."""

    outputs: tuple
    files: list[FileState]
    owners: set = field(default_factory=set)


class Retention:
    """Holds the outputs of loader nodes whose user said keep, by loader and model inputs.

    ComfyUI forgets node outputs when memory is freed, and a model that nobody holds is gone. Where
    it still caches the outputs of an earlier prompt, ``generation`` tells it whether they are what
    the loader would give now; what was let go is then found again, as long as somebody holds it.
    """

    def __init__(self, on_let_go: Callable[[], None]) -> None:
        self._on_let_go = on_let_go
        self._retained: dict[tuple, Retained] = {}
        self._let_go: dict[tuple, tuple[list[weakref.ref], list[FileState]]] = {}
        self._generations: Counter = Counter()

    def __len__(self) -> int:
        return len(self._retained)

    def generation(self, key: tuple) -> int:
        """How often what the loader gives for ``key`` has become another thing."""
        return self._generations[key]

    def changed(self, key: tuple) -> None:
        """What the loader gives for ``key`` has become another thing."""
        self._generations[key] += 1

    def hold(self, key: tuple, retained: Retained) -> None:
        """Hold the outputs of a loader, for its owners and those that it was held for before."""
        if key in self._retained:
            retained.owners |= self._retained[key].owners
        self._retained[key] = retained

    def find(self, key: tuple, owner) -> Retained | None:
        """What is held under ``key``, or was and still lives, if its files are unchanged.

        What else was held for the node ``owner`` alone is let go: its inputs have changed.
        """
        for other, retained in list(self._retained.items()):
            if other != key and owner in retained.owners:
                retained.owners.discard(owner)
                if not retained.owners:
                    self.let_go(other, "its loader has other inputs")
        self.revive(key)
        retained = self._retained.get(key)
        if retained is None or all(file.unchanged() for file in retained.files):
            return retained
        self.let_go(key, "its file has changed")
        return None

    def revive(self, key: tuple) -> None:
        """Hold again what was let go, if somebody else has held it since."""
        references, files = self._let_go.pop(key, ((), []))
        outputs = tuple(reference() for reference in references)
        if outputs and None not in outputs:
            self._retained.setdefault(key, Retained(outputs, files))

    def let_go(self, key: tuple, reason: str) -> None:
        """Stop holding one entry, and take its models off their devices."""
        mm = sys.modules["comfy.model_management"]
        retained = self._retained.pop(key)
        self.changed(key)
        self._on_let_go()
        with suppress(TypeError):  # a checkpoint without a CLIP gives None for it
            references = [weakref.ref(output) for output in retained.outputs]
            self._let_go[key] = (references, retained.files)
        for patcher in patchers_of(retained.outputs):
            logger.info(f"[MultiGPU] no longer kept, {reason}: {type(patcher.model).__name__}")
            unload(mm, patcher.model)
            patcher.detach()  # where ComfyUI had evicted it already

    def let_go_all(self, reason: str, spared: Sequence[object] = ()) -> None:
        """Stop holding everything, but what has one of the inner models ``spared``."""
        for key, retained in list(self._retained.items()):
            models = [patcher.model for patcher in patchers_of(retained.outputs)]
            if not any(model is other for model in models for other in spared):
                self.let_go(key, reason)

    def forget(self, key: tuple) -> None:
        """Stop holding an entry; its models stay where they are."""
        if self._retained.pop(key, None) is not None:
            self.changed(key)


@contextmanager
def files_read(before_reading: Callable[[FileState], None]) -> Iterator[list[FileState]]:
    """Collects the state of every model file that is looked up or read inside.

    ``before_reading`` is called with each that is read whole.
    """
    import comfy.utils
    import folder_paths

    seen: dict[str, FileState] = {}

    def note(path) -> None:
        if path is not None and Path(path).is_file():
            seen.setdefault(str(path), FileState.of(str(path)))

    def full_path(wrapped, instance, args, kwargs):
        path = wrapped(*args, **kwargs)
        note(path)
        return path

    def load_file(wrapped, instance, args, kwargs):
        path = str(kwargs["ckpt"] if "ckpt" in kwargs else args[0])
        note(path)
        if path in seen:
            before_reading(seen[path])
        return wrapped(*args, **kwargs)

    table = PatchTable()
    table.apply(
        [
            Patch(folder_paths, "get_full_path", full_path),
            Patch(comfy.utils, "load_torch_file", load_file),
        ]
    )
    files: list[FileState] = []
    try:
        yield files
    finally:
        table.remove()
        files.extend(seen.values())


def model_key(node_class: str, args: tuple, kwargs: dict) -> tuple:
    """What tells one model from another: the loader, and its inputs but those of placement."""
    placement = {prefix + name for prefix in PART_PREFIXES for name in PLACEMENT_INPUTS}
    inputs = sorted((name, repr(value)) for name, value in kwargs.items() if name not in placement)
    return (node_class, repr(args), *inputs)


def is_retainable(retained: Retained, inputs: dict) -> bool:
    """Whether the files and inputs that a model came from can be told from others."""
    plain = (str, int, float, type(None))
    return bool(retained.files) and all(isinstance(value, plain) for value in inputs.values())


def executing_node():
    """The id of the node that ComfyUI is executing, or ``None``."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return None
    context = get_executing_context()
    return None if context is None else context.node_id


def place_anew(outputs: tuple, inputs: dict) -> bool | None:
    """Give retained outputs the allocations of these inputs: whether that changes anything.

    ``None`` where it is not possible: a model that had an allocation and is to have none, or the
    reverse, has to be loaded anew.

    Raises:
        AllocationError: a string cannot be followed as written; every part keeps what it had.
    """
    texts = stored_allocations(inputs)
    parts = {n: next(patchers_of(outputs[n : n + 1]), None) for n in texts}
    parts = {n: patcher for n, patcher in parts.items() if patcher is not None}
    before = {n: allocation_text(patcher.model) for n, patcher in parts.items()}
    if any(bool(before[n]) != bool(texts[n]) for n in parts):
        return None
    try:
        for n, patcher in parts.items():
            if texts[n]:
                setattr(patcher.model, META, {"full_allocation": texts[n]})
                follow_allocation(patcher)
    except AllocationError:
        for n, patcher in parts.items():
            if before[n]:
                setattr(patcher.model, META, {"full_allocation": before[n]})
                follow_allocation(patcher)
        raise
    return any(before[n] != texts[n] for n in parts)
