"""What ComfyUI itself, and ComfyUI-MultiGPU on it, do with a model that does not fit."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch
from machine import import_package
from way import Way

from rig import comfy_host


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
