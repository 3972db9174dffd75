"""The joins to MultiGPU: its DisTorch2 loader nodes, and when ComfyUI's own loading is patched.

A DisTorch2 loader makes a plain ``ModelPatcher`` and has its allocation string checked. What
becomes of a model that carries an allocation stands in ``model_patcher_patch``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from .allocation_parser import CPU
from .host_memory import accounting_patches
from .model_blocks import is_swappable
from .model_lookup import META, STATE, allocation_text, follow_allocation
from .model_patcher_patch import patches
from .multigpu_strings import check_inputs, stored_allocations
from .patch_table import Patch, PatchTable

logger = logging.getLogger("MultiGPU")


@contextmanager
def plain_loading() -> Iterator[None]:
    """Models made inside get a plain ``ModelPatcher``, real weights, and start out on the CPU.

    With DynamicVRAM, patchers are ``ModelPatcherDynamic``, which overrides ``partially_load`` and
    so never comes to an allocation, and layers are built without weights. With more VRAM free than
    RAM, or with --highvram, ComfyUI would put the whole model on the compute device first.
    """
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    def on_the_cpu(*_args, **_kwargs):
        return torch.device(CPU)

    switches = [
        (comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher),
        (comfy.memory_management, "aimdo_enabled", False),
        (comfy.model_management, "unet_inital_load_device", on_the_cpu),
        (comfy.model_management, "unet_offload_device", on_the_cpu),
        (comfy.model_management, "text_encoder_initial_device", on_the_cpu),
        (comfy.model_management, "text_encoder_offload_device", on_the_cpu),
    ]
    switches = [switch for switch in switches if hasattr(*switch[:2])]
    before = [getattr(owner, name) for owner, name, _ in switches]
    for owner, name, value in switches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _take_allocation(multigpu: ModuleType, patcher) -> None:
    """Move the allocation of a model with blocks from MultiGPU's table to the model itself.

    That is where MultiGPU leaves it from 2.5.6 on. Up to 2.5.5 its table has keys of class, size
    and first weights: Wan 2.2's two experts, and the same file loaded by another node, share one.
    """
    distorch_2 = sys.modules.get(f"{multigpu.__name__}.distorch_2")
    table = getattr(distorch_2, "safetensor_allocation_store", None)
    if table is not None and is_swappable(patcher.model):
        text = table.pop(distorch_2.create_safetensor_model_hash(patcher, "block_swap"), "")
        if text:
            setattr(patcher.model, META, {"full_allocation": text})


def _give_allocation(outputs, inputs: dict) -> None:
    """Leave the typed allocation on a ControlNet, where MultiGPU drops it.

    It looks for a ``model`` or a ``patcher`` of what a loader returns, and a ControlNet has neither
    under that name. The text is what MultiGPU would make of a node's ``inputs``.
    """
    patcher = getattr(outputs[0], "control_model_wrapped", None)
    text = stored_allocations(inputs)[0]
    if not text or patcher is None:
        return
    if is_swappable(patcher.model):
        setattr(patcher.model, META, {"full_allocation": text})
    else:
        name = type(patcher.model).__name__
        logger.info(f"[MultiGPU] block swap: {name} has no blocks to swap: left to ComfyUI")


def _loader(join: LoadingJoin):
    def load(wrapped, node, args, kwargs):
        join.arm()
        check_inputs(kwargs)  # an error belongs to this node, not to the sampler
        with plain_loading():
            outputs = wrapped(*args, **kwargs)
        _give_allocation(outputs, kwargs)
        for patcher in patchers_of(outputs):
            _take_allocation(join.multigpu, patcher)
            if allocation_text(patcher.model):
                follow_allocation(patcher)
        return outputs

    return load


def patchers_of(outputs) -> Iterator:
    """The patchers among the outputs of a loader node; CLIP, VAE and ControlNet carry theirs."""
    for output in outputs:
        for patcher in (
            output,
            getattr(output, "patcher", None),
            getattr(output, "control_model_wrapped", None),
        ):
            # CLIP vision has a model and a load device, but is no patcher.
            if hasattr(patcher, "model") and hasattr(patcher, "model_patches_to"):
                yield patcher


def distorch2_nodes(multigpu: ModuleType) -> dict[str, type]:
    """The DisTorch2 loader nodes of MultiGPU's package, by id, legacy forms included."""
    return {n: node for n, node in multigpu.NODE_CLASS_MAPPINGS.items() if "DisTorch" in n}


class LoadingJoin:
    """Installs the patches of this module.

    The loader nodes are patched when MultiGPU is there; ComfyUI itself only when the first of them
    runs, after MultiGPU has put its own replacements in place. Who loads nothing with DisTorch2
    runs on an untouched ComfyUI. ``ram_for`` makes room in RAM for so many bytes of an inner model,
    where it can, and says what there is.
    """

    def __init__(self, ram_for: Callable[[int, object], int]) -> None:
        self._table = PatchTable()
        self._ram_for = ram_for
        self.multigpu: ModuleType | None = None
        self._armed = False
        self._host_load_models_gpu: Callable | None = None  # before MultiGPU replaced it

    def install(self, multigpu: ModuleType) -> None:
        """Patch the DisTorch2 loader nodes of ``multigpu``, MultiGPU's package."""
        self.multigpu = multigpu
        loader = _loader(self)
        self._table.apply(
            Patch(node, node.FUNCTION, loader) for node in distorch2_nodes(multigpu).values()
        )

    def arm(self) -> None:
        """Patch ComfyUI, once, on top of what MultiGPU patches when its first loader runs."""
        if self._armed:
            return
        import comfy.model_management as mm

        if self._host_load_models_gpu is None:
            self._host_load_models_gpu = mm.load_models_gpu
        self.multigpu.register_patched_safetensor_modelpatcher()
        self._table.apply(patches(self._ram_for))
        self._table.apply(accounting_patches(self._host_load_models_gpu))
        self._armed = True

    def uninstall(self) -> None:
        """Unload what this plugin has loaded and restore every patched attribute."""
        if self._armed:
            loaded_models = sys.modules["comfy.model_management"].current_loaded_models
            for loaded in list(loaded_models):
                model = None if loaded.model is None else loaded.model.model
                if getattr(model, STATE, None) is not None:
                    loaded.model_unload()
                    loaded_models[:] = [other for other in loaded_models if other is not loaded]
                    delattr(model, STATE)
        self._table.remove()
        self._armed = False
