"""The joins to loading: MultiGPU's DisTorch2 loader nodes and ComfyUI's ModelPatcher.

A DisTorch2 loader makes a plain ``ModelPatcher`` and has its allocation string checked. A Wan
model that carries an allocation is then loaded, accounted for and unloaded by this plugin; every
other model goes on to whatever ComfyUI and MultiGPU would have done with it.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from types import ModuleType

import torch

from . import device_utils, step_time
from .allocation_parser import (
    CPU,
    Allocation,
    Block,
    ModelSizes,
    Split,
    format_bytes,
    parse_allocation,
    plan_split,
)
from .patch_table import Patch, PatchTable
from .swap_executor import BlockSwap, Pack, PassTime, copy_of

logger = logging.getLogger("MultiGPU")

# Where MultiGPU leaves the allocation, and where this plugin leaves its state: on the inner model,
# which all clones of a patcher share.
META = "_distorch_v2_meta"
STATE = "_distorch2_block_swap"
NO_BLOCKS = "_distorch2_no_blocks"

WAN_MODULES = "comfy.ldm.wan."

# Modules that a Wan calls as a whole before its blocks, large enough to be worth moving. Their
# names stand in every checkpoint.
EMBEDDINGS = ("time_projection", "text_embedding", "img_emb")


# --------------------------------------------------------------------------------------------
# What a Wan model is made of
# --------------------------------------------------------------------------------------------


def allocation_text(model: torch.nn.Module) -> str:
    """The allocation string that MultiGPU stored on an inner model, or ``""``."""
    return getattr(model, META, {}).get("full_allocation", "")


def _diffusion_model(model) -> torch.nn.Module | None:
    """The diffusion model of an inner model; a text encoder or VAE has none."""
    return getattr(model, "diffusion_model", None)


def is_wan(diffusion_model) -> bool:
    """Whether a diffusion model is of a class that ComfyUI defines for Wan, or derived from one."""
    return any(c.__module__.startswith(WAN_MODULES) for c in type(diffusion_model).__mro__)


def block_lists(diffusion_model: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    """The block lists of a Wan diffusion model by name; empty for any other model.

    Its further lists (``vace_blocks``) are told by holding the same kind of block as ``blocks``.
    """
    if not is_wan(diffusion_model):
        return {}
    lists = {
        name: child
        for name, child in diffusion_model.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child)
    }
    if "blocks" not in lists:
        return {}
    kind = type(lists["blocks"][0])
    return {name: child for name, child in lists.items() if isinstance(child[0], kind)}


def embeddings(diffusion_model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The embeddings of a Wan diffusion model that may be swapped, by name."""
    modules = {name: getattr(diffusion_model, name, None) for name in EMBEDDINGS}
    return {name: module for name, module in modules.items() if module is not None}


def is_swapped_here(patcher) -> bool:
    """Whether this plugin, and not MultiGPU, loads the model of ``patcher``."""
    model = patcher.model
    if hasattr(model, STATE):
        return True
    diffusion_model = _diffusion_model(model)
    return (
        diffusion_model is not None
        and bool(allocation_text(model))
        and not getattr(patcher, "is_dynamic", bool)()
        and bool(block_lists(diffusion_model))
    )


def follow_allocation(patcher) -> None:
    """Check the allocation of a patcher's model, and plan anew if it is not the one it had.

    Raises:
        AllocationError: the string cannot be followed as written.
    """
    allocation = read_allocation(patcher)
    state = getattr(patcher.model, STATE, None)
    if state is not None:
        state.follow(allocation)


def forget_homes(patcher) -> None:
    """Free the RAM that a patcher's model has as homes of what is resident."""
    state = getattr(patcher.model, STATE, None)
    if state is not None:
        state.forget_homes()


def read_allocation(patcher) -> Allocation:
    """The parsed allocation of a patcher's model.

    Raises:
        AllocationError: the string cannot be followed as written.
    """
    names = device_utils.device_names()
    compute = device_utils.name_of(patcher.load_device)
    return parse_allocation(allocation_text(patcher.model), names, compute)


# --------------------------------------------------------------------------------------------
# A model loaded by this plugin
# --------------------------------------------------------------------------------------------

# Resident blocks keep homes in RAM while this share of all RAM stays available; not so on devices
# whose memory is RAM.
AVAILABLE_RAM = 0.2
SHARE_RAM = (CPU, "mps")


def has_room_for_homes(nbytes: int, available: int, total: int) -> bool:
    """Whether RAM has room for ``nbytes`` of homes; ``available`` and ``total`` RAM in bytes."""
    return available - nbytes >= AVAILABLE_RAM * total


class SwappedModel:
    """The weights of one Wan model, packed, and the swap that runs it.

    Lives on the inner model and holds no reference back to it, so that a model which ComfyUI lets
    go is freed at once.
    """

    def __init__(self, model: torch.nn.Module, allocation: Allocation):
        diffusion_model = model.diffusion_model
        lists = block_lists(diffusion_model)
        blocks = _in_execution_order(lists)
        leading = embeddings(diffusion_model)
        parts = [*(block for _, _, block in blocks), *leading.values()]
        in_parts = {id(module) for part in parts for module in part.modules()}
        rest = [module for module in diffusion_model.modules() if id(module) not in in_parts]
        self.packs = [Pack.layout(part.modules()) for part in parts]
        self.non_block = Pack.layout(rest)
        # What the inner model holds beside the diffusion model (sigmas) moves along, unpacked:
        # ComfyUI replaces these modules and buffers at will.
        beside = sum(t.nbytes for module in _beside(model) for t in _tensors(module))
        self.sizes = ModelSizes(
            blocks=tuple(
                Block(f"{name}.{position}", pack.nbytes)
                for (name, position, _), pack in zip(blocks, self.packs, strict=False)
            ),
            embeddings=tuple(
                Block(name, pack.nbytes)
                for name, pack in zip(leading, self.packs[len(blocks) :], strict=True)
            ),
            non_block_bytes=self.non_block.nbytes + beside,
            min_slots=len(lists),
        )
        indices = {
            name: [i for i, (other, _, _) in enumerate(blocks) if other == name] for name in lists
        }
        self.split = self._plan(allocation)
        compute = device_utils.torch_device(self.split.compute_device)
        first = len(blocks)
        self.swap = BlockSwap(
            compute, self.packs, indices, {name: first + i for i, name in enumerate(leading)}
        )
        self._placed: Split | None = None
        self.timing: step_time.Timing | None = None
        self._diffusion_model = weakref.ref(diffusion_model)
        self._undrive: Callable[[], None] | None = None
        self._foreign_bytes = 0

    def _plan(self, allocation: Allocation) -> Split:
        memory = {
            entry.device: device_utils.total_memory(entry.device) for entry in allocation.entries
        }
        return plan_split(allocation, self.sizes, memory)

    def follow(self, allocation: Allocation) -> None:
        """Plan anew if the allocation is another; the next load moves what has to move."""
        if allocation != self.split.allocation:
            self.split = self._plan(allocation)
            if self.timing is not None:
                self.split = step_time.improve(self.split, self.timing)

    @property
    def loaded(self) -> bool:
        """Whether the model is placed by a split, and driven."""
        return self._placed is not None

    def all_packs(self) -> list[Pack]:
        """The packs of the blocks and embeddings, and that of the other non-block weights."""
        return [*self.packs, self.non_block]

    @contextmanager
    def undriven(self) -> Iterator[None]:
        """Inside, the diffusion model has its own methods: ComfyUI swaps them by object patches."""
        self._stop_driving()
        try:
            yield
        finally:
            if self.loaded:
                self._start_driving()

    def _start_driving(self) -> None:
        if self._undrive is None:
            self._undrive = self.swap.drive(self._diffusion_model())

    def _stop_driving(self) -> None:
        if self._undrive is not None:
            self._undrive()
            self._undrive = None

    def absorb(self) -> None:
        """Take over the weights that ComfyUI has hung on the modules."""
        self._foreign_bytes = sum(pack.absorb() for pack in self.all_packs())

    def compute_bytes(self) -> int:
        """Bytes of weights on the compute device now."""
        here = self.swap.compute_device
        placed = sum(p.nbytes for p in self.all_packs() if p.device == here)
        beside = self.split.sizes.non_block_bytes - self.non_block.nbytes if self.loaded else 0
        return placed + beside + self._foreign_bytes + self.swap.slot_bytes

    def load(self, model: torch.nn.Module, pin, unpin) -> None:
        """Put every block where the split wants it, straight, one at a time, and print the split.

        Where everything is in place already, nothing is touched: what the slots hold stays good.
        """
        if self._placed is self.split and [pack.device for pack in self.packs] == self._homes():
            return
        for module in _beside(model):
            module.to(self.swap.compute_device)
        self._pin, self._unpin = pin, unpin
        self._place()
        timed = weakref.WeakMethod(self._timed)
        self.swap.time_passes(lambda pass_time: timed()(pass_time))
        logger.info("\n".join([self.split.table(), *self._remarks()]))
        self._start_driving()

    def _homes(self) -> list[torch.device]:
        return [device_utils.torch_device(home) for home in self.split.homes]

    def _place(self) -> None:
        """Move what is not where the split wants it."""
        compute = self.swap.compute_device
        self.swap.drop_slots()
        targets = [*zip(self.packs, self._homes(), strict=True), (self.non_block, compute)]
        keep_homes = self._has_room_for_homes([p for p, home in targets if home == compute])
        try:
            # What leaves the compute device goes first: it never holds more than the split says.
            for pack, home in sorted(targets, key=lambda target: target[1] == compute):
                pack.place(home, keep_home=keep_homes and home == compute)
                if home != compute:
                    pack.lock(self._pin, self._unpin)
            self._placed = self.split
        finally:
            # A split without slots needs some once ``give_back`` has taken resident blocks away.
            self.swap.update(self.split.slots or 2)

    def _has_room_for_homes(self, resident: list[Pack]) -> bool:
        """Whether what is to be resident keeps homes in RAM."""
        if self.swap.compute_device.type in SHARE_RAM:
            return False
        in_ram = torch.device(CPU)
        added = sum(p.nbytes for p in resident if p.device != in_ram and not p.home_bytes)
        return has_room_for_homes(added, *device_utils.ram())

    def _timed(self, pass_time: PassTime) -> None:
        """Say what the split costs now that it is known, and improve it where that pays."""
        compute = pass_time.total - pass_time.waiting
        if compute <= 0:
            return
        moved: dict[str, list[float]] = {}
        for donor, nbytes, seconds in pass_time.copies:
            sums = moved.setdefault(device_utils.name_of(donor), [0, 0.0])
            sums[0] += nbytes
            sums[1] += seconds
        bandwidth = {donor: nbytes / s for donor, (nbytes, s) in moved.items() if s > 0}
        known = {} if self.timing is None else self.timing.bandwidth
        self.timing = step_time.Timing(compute, {**known, **bandwidth})
        planned, before = self.split, [pack.device for pack in self.packs]
        # What was given back to other models is not taken again before the next load.
        if before == self._homes():
            self.split = step_time.improve(planned, self.timing)
        if self.split is not planned:
            try:
                self._place()
                logger.info(self.split.table())
            except RuntimeError as error:  # no memory for what should have fitted
                logger.warning(f"[MultiGPU] block swap: the split stays as it was: {error}")
                self.split = planned
                self._place()
                self.swap.time_passes(None)  # nor is that tried again before the next load
        logger.info(f"[MultiGPU] block swap: {step_time.report(self.split, self.timing)}")

    def _remarks(self) -> Iterator[str]:
        """Lines for the table: what a pass will take, what there is in RAM, and how."""
        if self.timing is not None:
            yield f"  {step_time.report(self.split, self.timing)}"
        elif self.split.bytes_per_pass:
            yield step_time.transfer_line(self.split)
        compute = self.swap.compute_device
        swapped = [pack for pack in self.packs if pack.device == torch.device(CPU) != compute]
        if swapped:
            locked, staged = sum(pack.locked for pack in swapped), self.swap.count_staged()
            yield (
                f"  RAM: of {len(swapped)} homes {locked} are page-locked, {staged} staged through "
                f"page-locked memory, {len(swapped) - locked - staged} pageable"
            )
        homes = sum(pack.home_bytes for pack in self.all_packs())
        if homes:
            yield f"  RAM: {format_bytes(homes)} of homes for what is resident: unloading is free"
        elif compute.type not in SHARE_RAM:
            yield (
                f"  RAM: no homes for what is resident, {AVAILABLE_RAM:.0%} of all RAM is to stay "
                f"available"
            )

    def forget_homes(self) -> None:
        """Free the homes of what is resident: RAM is short, or they no longer hold what it does."""
        for pack in self.all_packs():
            pack.forget_home()

    def give_back(self, nbytes: int, offload_device: torch.device) -> int:
        """Free at least ``nbytes`` of the compute device if possible; returns the bytes freed.

        The slots go first, then resident blocks move to ``offload_device`` one by one. The model
        still runs, in slots allocated when it does, and the next load restores the split.
        """
        before = self.compute_bytes()
        self.swap.drop_slots()
        for pack in self.packs:
            if before - self.compute_bytes() >= nbytes:
                break
            if pack.device == self.swap.compute_device:
                pack.place(self._storage(offload_device))
                pack.lock(self._pin, self._unpin)  # it travels now
        self.swap.update(self.split.slots or 2)
        return before - self.compute_bytes()

    def unload(self, device: torch.device, donors_too: bool) -> torch.device:
        """Take the weights off the compute device; nothing is swapped any more.

        Blocks on other accelerators stay there unless ``donors_too``. Returns where the weights
        went: ``device``, or the CPU if that is the compute device.
        """
        storage = self._storage(device)
        self.swap.drop_slots()
        for pack in self.all_packs():
            if donors_too or pack.device in (None, self.swap.compute_device):
                pack.place(storage)
            if donors_too:
                pack.unlock()
        self._stop_driving()
        self._placed = None
        return storage

    def _storage(self, device: torch.device) -> torch.device:
        """Where to put what leaves the compute device, which --highvram names itself."""
        return torch.device(CPU) if device == self.swap.compute_device else device


def _in_execution_order(
    lists: dict[str, torch.nn.ModuleList],
) -> list[tuple[str, int, torch.nn.Module]]:
    """(list, position, block) of every block; lists of different length run side by side."""
    blocks = [
        ((position + 0.5) / len(modules), order, name, position, block)
        for order, (name, modules) in enumerate(lists.items())
        for position, block in enumerate(modules)
    ]
    return [entry[2:] for entry in sorted(blocks, key=lambda entry: entry[:2])]


def _beside(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [child for name, child in model.named_children() if name != "diffusion_model"]


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


# --------------------------------------------------------------------------------------------
# ModelPatcher
# --------------------------------------------------------------------------------------------


def _state(patcher) -> SwappedModel:
    """The swap state of a patcher's model, made at its first load."""
    state = getattr(patcher.model, STATE, None)
    if state is not None and state.swap.compute_device != patcher.load_device:
        state.unload(patcher.offload_device, donors_too=True)
        state = None
    if state is None:
        state = SwappedModel(patcher.model, read_allocation(patcher))
        setattr(patcher.model, STATE, state)
    return state


def partially_load(wrapped, patcher, args, kwargs):
    """Load a Wan model by its split; its quota, not ``extra_memory``, says how much."""
    if not is_swapped_here(patcher):
        _say_if_blocks_are_missing(patcher.model)
        return wrapped(*args, **kwargs)
    return _load(patcher, *args, **kwargs)


def _say_if_blocks_are_missing(model) -> None:
    """One line per model for a Wan that carries an allocation but has no blocks to swap."""
    diffusion_model = _diffusion_model(model)
    if not allocation_text(model) or not is_wan(diffusion_model) or hasattr(model, NO_BLOCKS):
        return
    if not block_lists(diffusion_model):
        setattr(model, NO_BLOCKS, True)
        name = type(diffusion_model).__name__
        logger.warning(f"[MultiGPU] {name} has no blocks to swap: left to MultiGPU")


def _load(patcher, device_to, extra_memory=0, force_patch_weights=False, **_):
    import comfy.model_management as mm
    from comfy.patcher_extension import CallbacksMP

    model, state = patcher.model, _state(patcher)
    with patcher.use_ejected(skip_and_inject_on_exit_only=True):
        before = model.model_loaded_weight_memory
        applied = model.current_weight_patches_uuid
        changed = applied is not None and (applied != patcher.patches_uuid or force_patch_weights)
        # Weights are unpatched where they lie: no device is named, so nothing moves.
        patcher.unpatch_model(None, unpatch_weights=changed)
        patcher.patch_model(load_weights=False)
        try:
            state.load(model, mm.pin_memory, mm.unpin_memory)
            if model.current_weight_patches_uuid is None:
                patcher.unpatch_hooks()
                with state.swap.writing_homes():
                    _patch_weights(patcher, state, device_to)
            state.swap.allocate_slots()
        except BaseException:
            patcher.detach()
            raise
        model.model_lowvram = False
        model.device = device_to
        model.current_weight_patches_uuid = patcher.patches_uuid
        model.model_loaded_weight_memory = state.compute_bytes()
        for callback in patcher.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(patcher, device_to, extra_memory, force_patch_weights, True)
        patcher.apply_hooks(patcher.forced_hooks, force_apply=True)
        return model.model_loaded_weight_memory - before


def _patch_weights(patcher, state: SwappedModel, device_to) -> None:
    """Apply the patcher's weight patches, computed on the compute device, where the weights lie.

    Follows ``ModelPatcher.load`` for a model that is loaded completely. A patched weight hangs on
    its module for a moment and is then absorbed by the pack; ``backup`` holds the originals of
    patched weights and nothing else.
    """
    from comfy.model_patcher import (
        key_param_name_to_key,
        move_weight_functions,
        wipe_lowvram_weight,
    )

    if patcher.weight_inplace_update:
        state.forget_homes()
    for entry in patcher._load_list():
        name, module, params = entry[-3:]
        module.comfy_force_cast_weights = patcher.force_cast_weights
        if hasattr(module, "comfy_cast_weights"):
            wipe_lowvram_weight(module)
            if patcher.force_cast_weights:
                module.prev_comfy_cast_weights = module.comfy_cast_weights
                module.comfy_cast_weights = True
        for param, functions in (("weight", "weight_function"), ("bias", "bias_function")):
            wrappers = patcher.weight_wrapper_patches.get(f"{name}.{param}", [])
            if wrappers:
                getattr(module, functions).extend(wrappers)
        move_weight_functions(module, device_to)
        for param in params:
            key = key_param_name_to_key(name, param)
            if key not in patcher.patches:
                continue
            home, new = module._parameters[param], key not in patcher.backup
            patcher.patch_weight_to_device(key, device_to=device_to)
            if new and key in patcher.backup:
                # ComfyUI keeps the original itself where that lies on the offload device.
                entry = patcher.backup[key]
                if entry.weight.device == home.device:
                    patcher.backup[key] = entry._replace(weight=copy_of(entry.weight))
            state.absorb()
        module.comfy_patched_weights = True


# Whether models that are unloaded keep their blocks on other accelerators.
_donors_stay: ContextVar[bool] = ContextVar("donors_stay", default=False)

# ComfyUI asks for this much, or more, to mean "everything".
EVERYTHING = 1e29


def free_memory(wrapped, instance, args, kwargs):
    """Who needs room on one device gains nothing from blocks that leave another."""
    memory_required = kwargs["memory_required"] if "memory_required" in kwargs else args[0]
    token = _donors_stay.set(memory_required < EVERYTHING)
    try:
        return wrapped(*args, **kwargs)
    finally:
        _donors_stay.reset(token)


def unpatch_model(wrapped, patcher, args, kwargs):
    """Before weights are unpatched or moved away: no copy may be under way, nothing swapped."""

    def bind(device_to=None, unpatch_weights=True):
        return device_to, unpatch_weights

    device_to, unpatch_weights = bind(*args, **kwargs)
    model = patcher.model
    state = getattr(model, STATE, None)
    if state is None:
        return wrapped(*args, **kwargs)
    if not unpatch_weights:
        with state.undriven():
            return wrapped(*args, **kwargs)
    with state.swap.writing_homes(), state.undriven():
        if any(entry.inplace_update for entry in patcher.backup.values()):
            state.forget_homes()
        storage = None
        if device_to is not None:
            storage = state.unload(device_to, donors_too=not _donors_stay.get())
        result = wrapped(None, True)  # to name the device would move the donors' blocks too
        state.absorb()
    if storage is not None:
        for module in _beside(model):
            module.to(storage)
        model.device = storage
    return result


def patch_model(wrapped, patcher, args, kwargs):
    """Object patches are set on the model itself, not on what drives it."""
    state = getattr(patcher.model, STATE, None)
    with nullcontext() if state is None else state.undriven():
        return wrapped(*args, **kwargs)


def partially_unload(wrapped, patcher, args, kwargs):
    """Give memory of the compute device back, slots first."""
    state = getattr(patcher.model, STATE, None)
    if state is None or not state.loaded:
        return wrapped(*args, **kwargs)

    def bind(device_to, memory_to_free=0, force_patch_weights=False):
        return device_to, memory_to_free

    device_to, memory_to_free = bind(*args, **kwargs)
    return state.give_back(memory_to_free, device_to)


def loaded_size(wrapped, patcher, args, kwargs):
    """What is there now: slots come and go with passes, not only with loads."""
    state = getattr(patcher.model, STATE, None)
    return wrapped(*args, **kwargs) if state is None else state.compute_bytes()


# Whether weights are being asked for to patch hooks with, which nobody keeps.
_for_hooks: ContextVar[bool] = ContextVar("for_hooks", default=False)


def change_hooks(wrapped, patcher, args, kwargs):
    """Hooks write into the weights: no slot may keep what they were, no copy may read them."""
    state = getattr(patcher.model, STATE, None)
    writes = patcher.hook_backup or any(hooks is not None for hooks in (*args, *kwargs.values()))
    if state is None or not writes:
        return wrapped(*args, **kwargs)
    token = _for_hooks.set(True)
    try:
        with state.swap.writing_homes():
            state.forget_homes()  # hooks write into resident weights, too
            return wrapped(*args, **kwargs)
    finally:
        _for_hooks.reset(token)


def get_key_patches(wrapped, patcher, args, kwargs):
    """Weights that a merge keeps must not be views of packs, which are written and moved."""
    patches = wrapped(*args, **kwargs)
    if not hasattr(patcher.model, STATE) or _for_hooks.get():
        return patches
    for key, ((weight, convert), *rest) in patches.items():
        patches[key] = [(weight.detach().to("cpu", copy=True), convert), *rest]
    return patches


# --------------------------------------------------------------------------------------------
# comfy.model_management
# --------------------------------------------------------------------------------------------


def model_memory_required(wrapped, loaded_model, args, kwargs):
    """What a load will take of the compute device: the split's share, less what is there."""
    patcher = loaded_model.model
    if not is_swapped_here(patcher):
        return wrapped(*args, **kwargs)
    state = _state(patcher)
    return max(0, state.split.compute_bytes - state.compute_bytes())


def _load_models_gpu(original):
    """MultiGPU's ``load_models_gpu`` computes with the whole model and evicts everything else.

    ``original`` is ComfyUI's, which computes with ``model_memory_required``.
    """

    def load_models_gpu(wrapped, instance, args, kwargs):
        models = kwargs["models"] if "models" in kwargs else args[0]
        if any(hasattr(m, "model") and is_swapped_here(m) for m in models):
            return original(*args, **kwargs)
        return wrapped(*args, **kwargs)

    return load_models_gpu


# --------------------------------------------------------------------------------------------
# DisTorch2 loader nodes
# --------------------------------------------------------------------------------------------


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
    """Move the allocation of a Wan model from MultiGPU's table to the model itself.

    That is where MultiGPU leaves it from 2.5.6 on. Up to 2.5.5 its table has keys of class, size
    and first weights: Wan 2.2's two experts, and the same file loaded by another node, share one.
    """
    distorch_2 = sys.modules.get(f"{multigpu.__name__}.distorch_2")
    table = getattr(distorch_2, "safetensor_allocation_store", None)
    if table is not None and block_lists(_diffusion_model(patcher.model)):
        text = table.pop(distorch_2.create_safetensor_model_hash(patcher, "block_swap"), "")
        if text:
            setattr(patcher.model, META, {"full_allocation": text})


def _loader(join: LoadingJoin):
    def load(wrapped, node, args, kwargs):
        join.arm()
        with plain_loading():
            outputs = wrapped(*args, **kwargs)
        for patcher in patchers_of(outputs):
            _take_allocation(join.multigpu, patcher)
            if is_swapped_here(patcher):
                follow_allocation(patcher)  # an error belongs to this node, not to the sampler
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
    runs on an untouched ComfyUI.
    """

    def __init__(self) -> None:
        self._table = PatchTable()
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
        patcher, manager = "comfy.model_patcher", "comfy.model_management"
        self._table.apply(
            [
                Patch(patcher, "ModelPatcher.partially_load", partially_load),
                Patch(patcher, "ModelPatcher.unpatch_model", unpatch_model),
                Patch(patcher, "ModelPatcher.partially_unload", partially_unload),
                Patch(patcher, "ModelPatcher.patch_model", patch_model),
                Patch(patcher, "ModelPatcher.loaded_size", loaded_size),
                Patch(patcher, "ModelPatcher.get_key_patches", get_key_patches),
                Patch(patcher, "ModelPatcher.patch_hooks", change_hooks),
                Patch(patcher, "ModelPatcher.unpatch_hooks", change_hooks),
                Patch(manager, "LoadedModel.model_memory_required", model_memory_required),
                Patch(manager, "free_memory", free_memory),
                Patch(manager, "load_models_gpu", _load_models_gpu(self._host_load_models_gpu)),
            ]
        )
        self._armed = True

    def uninstall(self) -> None:
        """Unload what this plugin has loaded and restore every patched attribute."""
        if self._armed:
            loaded_models = sys.modules["comfy.model_management"].current_loaded_models
            for loaded in list(loaded_models):
                if loaded.model is not None and hasattr(loaded.model.model, STATE):
                    model = loaded.model.model
                    loaded.model_unload()
                    loaded_models[:] = [other for other in loaded_models if other is not loaded]
                    delattr(model, STATE)
        self._table.remove()
        self._armed = False
