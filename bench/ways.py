"""The ways to run a Wan whose blocks do not all fit on the compute device, behind one interface.

A way gets a model with its weights in RAM and makes it ready to run on the compute device with a
given number of its blocks' weights elsewhere. Ways of others run their own code where it is at
hand; WanVideoWrapper's is told in words of our own.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from machine import Machine
from model import import_package

from block_swap.allocation_parser import parse_allocation
from block_swap.host_memory import page_locks
from block_swap.packed_weights import Pack
from block_swap.page_locks import Need
from block_swap.split import Block, ModelSizes, Split
from block_swap.split_planner import plan_split
from block_swap.swap_executor import BlockSwap
from rig import comfy_host

Pass = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Point:
    """How much is swapped: ``split`` is this plugin's, the others get ``swapped`` of its blocks."""

    form: str
    share: int  # percent asked for
    split: Split

    @property
    def swapped(self) -> int:
        return len(self.split.swapped)

    @property
    def layers(self) -> int:
        return len(self.split.homes)

    @property
    def swapped_bytes(self) -> int:
        """Bytes of the swapped blocks: what has to move in every pass."""
        return sum(self.split.sizes.blocks[i].nbytes for i in self.split.swapped)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all other weights: what may stay on the compute device."""
        return self.split.sizes.total_bytes - self.swapped_bytes


class Way(ABC):
    """One way. ``load`` and ``unload`` alternate; a way is loaded with one model at a time."""

    name = ""
    only_bf16 = False
    only_everything = False  # swaps all blocks or none
    mode: Callable[[], AbstractContextManager] = torch.inference_mode  # of loading and running

    def __init__(self, machine: Machine):
        self.machine, self.device = machine, machine.device

    def missing(self) -> str | None:
        """Why this way is not at hand here; ``None`` where it is."""
        return None

    def does_not_take(self, point: Point) -> str | None:
        """Why this way has nothing to measure at ``point``."""
        if self.only_bf16 and point.form != "bf16":
            return "bf16 only"
        if self.only_everything and point.swapped < point.layers:
            return "swaps all blocks or none"
        return None if point.swapped else "nothing to swap"

    @abstractmethod
    def load(self, model: torch.nn.Module, point: Point) -> Pass:
        """Make ``model`` ready; returns what runs one forward pass."""

    def unload(self) -> None:  # noqa: B027  some ways have nothing to let go of
        """Let go of everything that ``load`` made."""

    def remark(self) -> str | None:
        """What a reader of the figures should know of the load, once per point."""
        return None

    def device_bytes_beside(self) -> int:
        """Bytes on the compute device that PyTorch's allocator does not know of."""
        return 0


class Resident(Way):
    """Everything on the compute device: the time that no other way can be below."""

    name = "everything resident"

    def does_not_take(self, point):
        return None

    def load(self, model, point):
        return model.to(self.device)


# --------------------------------------------------------------------------------------------
# This plugin
# --------------------------------------------------------------------------------------------


class BlockSwapWay(Way):
    """This plugin: homes in page-locked RAM, slots, one copy ahead of the computation."""

    name = "this plugin"
    lock = True
    slots: int | None = None

    def does_not_take(self, point):
        return None

    def load(self, model, point):
        locks = page_locks()
        packs, rest = packs_of(model)
        rest.place(self.device)
        calls = [[f"blocks.{i}"] for i in range(len(packs))]
        swap = BlockSwap(self.device, packs, calls, locks=locks)
        self._locked = []
        for pack, home in zip(packs, point.split.homes, strict=True):
            pack.place(torch.device(home))
            if self.lock and home == "cpu":
                self._locked.append(pack.lock(locks, Need.TRAVELS, swap.links.synchronize))
        swap.update(self.slots or point.split.slots)
        swap.allocate_slots()
        self._loaded = swap, packs, swap.drive(model)
        return model

    def remark(self):
        if self.machine.real and not all(self._locked):
            return f"{sum(self._locked)} of {len(self._locked)} homes are page-locked"
        return None

    def unload(self):
        swap, packs, undo = self._loaded
        undo()
        swap.drop_slots()
        for pack in packs:
            pack.unlock()
        del self._loaded


class PageableBlockSwapWay(BlockSwapWay):
    name = "this plugin, pageable RAM"
    lock = False


class OneSlotBlockSwapWay(BlockSwapWay):
    name = "this plugin, one slot"
    slots = 1


def packs_of(model: torch.nn.Module) -> tuple[list[Pack], Pack]:
    """The packs of the blocks, and that of all other weights."""
    in_blocks = set(model.blocks.modules())
    rest = [module for module in model.modules() if module not in in_blocks]
    return [Pack.layout(block.modules()) for block in model.blocks], Pack.layout(rest)


def sizes_of(model: torch.nn.Module) -> ModelSizes:
    packs, rest = packs_of(model)
    blocks = (Block(f"blocks.{i}", pack.nbytes) for i, pack in enumerate(packs))
    return ModelSizes(tuple(blocks), rest.nbytes)


def split_with(sizes: ModelSizes, swapped: int, compute: str) -> Split:
    """The split in which ``swapped`` blocks are swapped, or the least number above that exists."""
    block = max(block.nbytes for block in sizes.blocks)
    for room in range(len(sizes.blocks), 0, -1):
        text = f"{compute},{sizes.non_block_bytes + room * block}b;cpu,*"
        split = plan_split(parse_allocation(text, ("cpu", compute), compute), sizes, {})
        if len(split.swapped) >= swapped:
            return split
    raise ValueError(f"{swapped} of {len(sizes.blocks)} blocks are never swapped")


# --------------------------------------------------------------------------------------------
# ComfyUI, and MultiGPU on it
# --------------------------------------------------------------------------------------------


class _Inner(torch.nn.Module):
    """What a ModelPatcher patches: ComfyUI's BaseModel, as far as loading looks at it."""

    def __init__(self, diffusion_model: torch.nn.Module):
        super().__init__()
        self.diffusion_model = diffusion_model


class HostLowvram(Way):
    """ComfyUI's own partial loading: layers stay in RAM and are cast when they run.

    With async offload, on streams of its own. It decides by layer; what it leaves in RAM is about
    as large as the swapped blocks.
    """

    name = "ComfyUI lowvram, async offload"

    def load(self, model, point):
        import comfy.model_patcher

        inner = _Inner(model)
        patcher = comfy.model_patcher.ModelPatcher(inner, self.device, torch.device("cpu"))
        patcher.partially_load(self.device, self._memory_for(patcher, point.resident_bytes))
        self._patcher = patcher
        return model

    def _memory_for(self, patcher, resident_bytes: int) -> int:
        """What to offer to ``ModelPatcher.load`` so that it keeps about ``resident_bytes``.

        Follows its rule: the largest layers first, and beside them room for layers in flight.
        """
        layers = sorted((entry[:2] for entry in patcher._load_list()), reverse=True)
        ahead = 1 + self.machine.mm.NUM_STREAMS
        rooms = [
            in_flight + sum(nbytes for _, nbytes in layers[i + 1 : i + ahead])
            for i, (in_flight, _) in enumerate(layers)
        ]

        def kept(memory: int) -> int:
            loaded = buffer = 0
            for room, (_, nbytes) in zip(rooms, layers, strict=True):
                if loaded + nbytes + max(buffer, room) < memory:
                    loaded += nbytes
                else:
                    buffer = max(buffer, room)
            return loaded

        offers = (patcher.model_size() * step // 500 for step in range(1, 1000))
        return min(offers, key=lambda memory: abs(kept(memory) - resident_bytes))

    def remark(self):
        return f"keeps {self._patcher.loaded_size() / 2**20:.1f} MiB on the device"

    def unload(self):
        self._patcher.unpin_all_weights()
        self.machine.mm.reset_cast_buffers()
        del self._patcher


class DynamicVram(Way):
    """ComfyUI's DynamicVRAM, held to the resident bytes by the watermark of its weight buffer.

    A weight that ends above the watermark gets no room in the buffer and comes through the cast
    buffers in every pass (``vbar_fault`` in comfy-aimdo's model-vbar.c). The limit that can be set,
    too, is another thing: the floor that eviction stops at. Every load lifts the watermark to the
    top (``vbar_prioritize``), so it is set behind the load. It counts in pages, rounded up.
    """

    name = "ComfyUI DynamicVRAM"
    only_bf16 = True
    PAGE = 32 << 20  # VBAR_PAGE_SIZE

    def missing(self):
        return self.machine.dynamic_vram

    def load(self, model, point):
        import comfy.memory_management
        import comfy.model_patcher

        comfy.memory_management.aimdo_enabled = True
        inner = _Inner(model)
        patcher = comfy.model_patcher.ModelPatcherDynamic(inner, self.device, torch.device("cpu"))
        self._patcher, self._room = patcher, point.resident_bytes
        patcher.partially_load(self.device)
        # Small weights are on the device already, outside of the buffer.
        room = max(0, self._room - inner.model_loaded_weight_memory)
        patcher._vbar_get().set_watermark(room // self.PAGE * self.PAGE)
        return model

    def remark(self):
        kept, room = self._patcher.loaded_size() / 2**20, self._room / 2**20
        return f"keeps {kept:.1f} MiB on the device, {room:.1f} MiB are allowed"

    def device_bytes_beside(self):
        buffers = self.machine.mm.STREAM_AIMDO_CAST_BUFFERS.values()
        weights = self._patcher._vbar_get().loaded_size()
        return weights + sum(buffer.size() for buffer in buffers)

    def unload(self):
        import comfy.memory_management

        patcher = self.__dict__.pop("_patcher", None)
        if patcher is not None:
            patcher.detach()
            self.machine.mm.reset_cast_buffers()
        comfy.memory_management.aimdo_enabled = False


class MultiGpu(Way):
    """ComfyUI-MultiGPU's DisTorch2, the real one: layers live on donors and are cast as they run.

    It gets fractions of device memory, the one kind of amount that it does not round.
    """

    name = "MultiGPU DisTorch2"
    PACKAGE = "bench_multigpu"

    def missing(self):
        if os.environ.get("MULTIGPU_DIR"):
            return None
        return "not at hand: MULTIGPU_DIR names no checkout of ComfyUI-MultiGPU"

    def _import(self):
        # Its log looks at ComfyUI's server, which is not running here.
        sys.modules.setdefault("server", _NoServer("server"))
        logging.getLogger("MultiGPU").mgpu_mm_log = lambda message: None
        folder = Path(os.environ["MULTIGPU_DIR"])
        package = import_package(self.PACKAGE, folder, "distorch_2")
        if not self.machine.real:
            comfy_host.tell_multigpu_about([str(self.device)], self.PACKAGE)
        return package.distorch_2

    def load(self, model, point):
        self._import().register_patched_safetensor_modelpatcher()
        import comfy.model_patcher

        mm, inner = self.machine.mm, _Inner(model)
        inner.current_weight_patches_uuid = None
        patcher = comfy.model_patcher.ModelPatcher(inner, self.device, torch.device("cpu"))
        here = point.resident_bytes / mm.get_total_memory(self.device)
        there = point.split.sizes.total_bytes / mm.get_total_memory(torch.device("cpu"))
        text = f"{self.device},{here:.9f};cpu,{there:.9f}#{self.device};0;cpu"
        inner._distorch_v2_meta = {"full_allocation": text}
        patcher.partially_load(self.device, 0)
        self._patcher = patcher
        return model

    def unload(self):
        self.machine.mm.reset_cast_buffers()
        del self._patcher


class _NoServer(type(sys)):
    class PromptServer:
        instance = None


# --------------------------------------------------------------------------------------------
# Others
# --------------------------------------------------------------------------------------------


class MoveUpAndBack(Way):
    """WanVideoWrapper's block swap, in our words: a block moves up, runs, and moves back.

    The last blocks are swapped. Before a block runs, the move of the next one is started on a
    stream of its own (its prefetch of 1, with non-blocking moves), and the host waits for the
    arrival of the block that is to run. What it leaves on the device is copied back in the stream
    of the computation. Two waits are ours, without which a block could be overwritten while it is
    computed with, or be read on its way down: the allocator gets memory back only when the
    computation is done with it, and a block moves up only after it has come down.
    """

    name = "move up and back (WanVideoWrapper)"

    def load(self, model, point):
        self._module = self.machine.module
        self._stream = self._module.Stream(device=self.device)
        self._blocks = list(model.blocks)
        self._first = point.layers - point.swapped
        self._up: dict[int, object] = {}
        self._down: dict[int, object] = {}
        for name, child in model.named_children():
            if name != "blocks":
                child.to(self.device)
        for index, block in enumerate(self._blocks):
            if index < self._first:
                block.to(self.device)
            block.register_forward_pre_hook(partial(self._before, index))
            block.register_forward_hook(partial(self._after, index))
        return model

    def _move_up(self, index: int) -> None:
        if index < self._first or index >= len(self._blocks) or index in self._up:
            return
        computing = self._module.current_stream(self.device)
        with self._module.stream(self._stream):
            if index in self._down:
                self._stream.wait_event(self._down[index])
            self._blocks[index].to(self.device, non_blocking=True)
            self._up[index] = self._module.Event()
            self._up[index].record(self._stream)
        for parameter in self._blocks[index].parameters():
            parameter.data.record_stream(computing)

    def _before(self, index: int, *_) -> None:
        self._move_up(index)
        self._move_up(index + 1)
        if index in self._up:
            self._up[index].synchronize()

    def _after(self, index: int, *_) -> None:
        if index >= self._first:
            self._blocks[index].to("cpu", non_blocking=True)
            self._down[index] = self._module.Event()
            self._down[index].record()
            del self._up[index]

    def unload(self):
        self._module.synchronize(self.device)
        self._blocks = self._up = self._down = None


class GroupOffloading(Way):
    """diffusers' group offloading by block, with a stream, which prefetches the next group."""

    name = "diffusers group offloading"
    only_bf16 = only_everything = True
    mode = torch.no_grad

    def missing(self):
        return _missing_package("diffusers")

    def load(self, model, point):
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(
            model,
            onload_device=self.device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
            record_stream=True,
        )
        return model


class Mmgp(Way):
    """mmgp (WanGP's memory management) with page-locked RAM, async transfers and a budget.

    Its budget is for blocks: the resident ones, two in flight, and half a one for all else that it
    does not swap. The embeddings it swaps always.
    """

    name = "mmgp"
    only_bf16 = True
    mode = torch.no_grad

    def missing(self):
        if not self.machine.real:
            return "not on simulated devices: it knows CUDA only"
        return _missing_package("mmgp")

    def load(self, model, point):
        from mmgp import offload

        model.patch_embedding._lock_dtype = torch.float32
        budget = (point.layers - point.swapped + 2.5) * point.split.sizes.blocks[0].nbytes
        self._offload = offload.all(
            {"transformer": model},
            pinnedMemory=True,
            quantizeTransformer=False,
            convertWeightsFloatTo=None,
            budgets={"transformer": budget / 2**20},
            asyncTransfers=True,
            perc_reserved_mem_max=0.9,
            verboseLevel=0,
        )
        torch.set_default_device(None)  # it leaves "cuda" there
        return model

    def unload(self):
        torch.set_default_device(None)
        offload = self.__dict__.pop("_offload", None)
        if offload is not None:
            offload.release()


def _missing_package(name: str) -> str | None:
    found = importlib.util.find_spec(name) is not None
    return None if found else f"not at hand: the package {name} is not installed"


WAYS: dict[str, type[Way]] = {
    "resident": Resident,
    "plugin": BlockSwapWay,
    "lowvram": HostLowvram,
    "dynamic": DynamicVram,
    "multigpu": MultiGpu,
    "wrapper": MoveUpAndBack,
    "diffusers": GroupOffloading,
    "mmgp": Mmgp,
    "plugin-pageable": PageableBlockSwapWay,
    "plugin-one-slot": OneSlotBlockSwapWay,
}
DEFAULT_WAYS = tuple(WAYS)[:8]
