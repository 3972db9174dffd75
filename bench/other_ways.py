"""The ways of other projects: by their own code, and WanVideoWrapper's in words of our own."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
from way import Way

from block_swap.model_blocks import parts_of


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
        self._blocks = [part.module for part in parts_of(model).blocks]
        self._first = self._first_swapped(point)
        self._up: dict[int, object] = {}
        self._down: dict[int, object] = {}
        stays = {module for block in self._blocks[self._first :] for module in block.modules()}
        for module in model.modules():
            if module not in stays:
                module._apply(lambda tensor: tensor.to(self.device), recurse=False)
        for index, block in enumerate(self._blocks):
            block.register_forward_pre_hook(partial(self._before, index))
            block.register_forward_hook(partial(self._after, index))
        return model

    def _first_swapped(self, point) -> int:
        """From where on the blocks have about as many bytes as are to be swapped."""
        nbytes = [block.nbytes for block in point.split.sizes.blocks]
        firsts = range(len(nbytes) + 1)
        return min(firsts, key=lambda first: abs(sum(nbytes[first:]) - point.swapped_bytes))

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

        for module in model.modules():
            if any(tensor.dtype == torch.float32 for tensor in module.parameters(recurse=False)):
                module._lock_dtype = torch.float32
        sizes = point.split.sizes
        budget = sum(block.nbytes for block in sizes.blocks) - point.swapped_bytes
        budget += 2.5 * sizes.largest_block
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
