"""MultiGPU's side of allocation strings: what it stores for a loader's inputs, what it can read.

A model without blocks, or a VAE, is loaded by MultiGPU. What it reads as it is meant it is given as
it stands; for everything else it is given the same in bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from . import device_utils
from .allocation_parser import CPU, Allocation, Mode, in_bytes, parse_allocation
from .model_lookup import META, allocation_text, is_swapped_here, read_allocation
from .split_chooser import spare_of_donor

# On an inner model that MultiGPU loads: its allocation, and what MultiGPU reads in its place.
TRANSLATED = "_distorch2_in_bytes"

# Where MultiGPU computes if nothing follows the ``#``.
DEFAULT_COMPUTE = "cuda:0"

# Any of these letters, wherever it stands, makes a string one of bytes for MultiGPU; an amount of
# bytes begins like this.
_BYTE_LETTERS = frozenset("gmkb")
_BYTE_AMOUNT = re.compile(r"[0-9]+\.?[0-9]*\s*[gmkb]?")


def stored_allocations(inputs: dict) -> dict[int, str]:
    """What MultiGPU stores for these loader inputs, by the position of the output it is for.

    Follows the contract of MultiGPU 2.6: ``<expert>#<compute>;<virtual_vram_gb>;<donors>``.
    """
    advanced = "unet_compute_device" in inputs
    prefixes = {0: "unet_", 1: "clip_"} if advanced else {0: ""}
    return {position: _stored_allocation(inputs, prefix) for position, prefix in prefixes.items()}


def _stored_allocation(inputs: dict, prefix: str) -> str:
    device = inputs.get(prefix + "compute_device") or inputs.get(prefix + "device")
    expert = inputs.get(prefix + "expert_mode_allocations") or ""
    gigabytes = inputs.get(prefix + "virtual_vram_gb") or 0.0
    donors = inputs.get(prefix + "donor_device", CPU)
    if inputs.get("use_other_vram"):
        others = [name for name in device_utils.device_names() if name not in (CPU, device)]
        donors = ",".join([*others, CPU])
    virtual = f"{device};{gigabytes};{donors}" if gigabytes > 0 else device if expert else ""
    return f"{expert}#{virtual or ''}" if expert or virtual else ""


def check_inputs(inputs: dict) -> None:
    """Check what was typed into a loader, before it reads a file of many gigabytes.

    Raises:
        AllocationError: an allocation cannot be followed as written.
    """
    for text in filter(None, stored_allocations(inputs).values()):
        compute = text.rpartition("#")[2].partition(";")[0]
        parse_allocation(text, device_utils.device_names(), compute or CPU)


def is_readable(allocation: Allocation, devices: Sequence[str]) -> bool:
    """Whether MultiGPU reads the string of an allocation, and reads it as it is meant."""
    expert, _, virtual = allocation.source.partition("#")
    compute, *donors = virtual.split(";")
    if not compute and allocation.compute_device != DEFAULT_COMPUTE:
        return False
    names = [compute or DEFAULT_COMPUTE]
    if not expert:
        names += donors[-1].split(",")
        return all(name in devices for name in names)
    entries = [part.partition(",") for part in expert.split(";")]
    names += [name for name, _, _ in entries]
    values = [value.strip().lower() for _, _, value in entries]
    if any(name not in devices for name in names):
        return False
    if not _BYTE_LETTERS.isdisjoint(expert.lower()):
        bytes_or_rest = all("*" in value or _BYTE_AMOUNT.match(value) for value in values)
        return allocation.mode is Mode.BYTES and bytes_or_rest
    if any("*" in value for value in values):
        return False
    if "%" in expert:  # one ratio alone is all of the model to it
        return allocation.mode is Mode.RATIO and len(values) > 1
    return allocation.mode is Mode.FRACTION


@contextmanager
def readable_by_multigpu(patcher) -> Iterator[None]:
    """Inside, the allocation of a model that MultiGPU loads is one that it can read.

    ``auto`` is what is free when the model is loaded first: every other number would have MultiGPU
    distribute it anew.
    """
    model = getattr(patcher, "model", None)
    text = allocation_text(model) if hasattr(model, META) else ""
    if not text or is_swapped_here(patcher):
        yield
        return
    if model.__dict__.get(TRANSLATED, ("",))[0] != text:
        setattr(model, TRANSLATED, (text, _for_multigpu(patcher)))
    setattr(model, META, {"full_allocation": getattr(model, TRANSLATED)[1]})
    try:
        yield
    finally:
        setattr(model, META, {"full_allocation": text})


def _for_multigpu(patcher) -> str:
    allocation = read_allocation(patcher)
    if not allocation.auto_devices and is_readable(allocation, device_utils.device_names()):
        return allocation.source
    return _in_bytes(patcher, allocation)


def _in_bytes(patcher, allocation: Allocation) -> str:
    import comfy.model_management as mm

    spare = {device: spare_of_donor(device) for device in allocation.auto_devices}
    if allocation.compute_device in spare:
        free = mm.get_free_memory(patcher.load_device) - mm.minimum_inference_memory()
        spare[allocation.compute_device] = max(0, int(free))
    memory = device_utils.total_memories(allocation.devices)
    quotas = allocation.quotas(patcher.model_size(), memory, spare)
    return in_bytes(allocation, quotas)
