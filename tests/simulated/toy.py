"""A small model with a Wan's shape: a block list that its own forward loops over."""

import torch

from block_swap.packed_weights import Pack
from block_swap.swap_executor import BlockSwap
from rig import simulator

COMPUTE = torch.device("acc:0")


class Block(torch.nn.Module):
    def __init__(self, dim, generator):
        super().__init__()
        self.up = torch.nn.Linear(dim, 2 * dim)
        self.down = torch.nn.Linear(2 * dim, dim)
        self.modulation = torch.nn.Parameter(torch.empty(1, dim))
        self.register_buffer("scale", torch.tensor(0.5))
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, x):
        return x + self.scale * self.down(torch.tanh(self.up(x + self.modulation)))


class Model(torch.nn.Module):
    """``skip`` leaves blocks out, ``order`` runs them otherwise, ``fail_at`` raises in one."""

    def __init__(self, layers=8, dim=32, side=0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = torch.nn.Linear(dim, dim)
        torch.nn.init.normal_(self.embed.weight, std=0.3, generator=generator)
        torch.nn.init.normal_(self.embed.bias, std=0.3, generator=generator)
        self.blocks = torch.nn.ModuleList(Block(dim, generator) for _ in range(layers))
        self.side_blocks = torch.nn.ModuleList(Block(dim, generator) for _ in range(side))
        self.skip = ()
        self.fail_at = None
        self.requires_grad_(False)

    def forward(self, x):
        return self.loop(self.embed(x))

    def loop(self, x):
        for i, block in enumerate(self.blocks):
            if i in self.skip:
                continue
            if i == self.fail_at:
                raise InterruptedError(f"stopped in block {i}")
            x = block(x)
            every = len(self.blocks) // max(1, len(self.side_blocks))
            if len(self.side_blocks) and i % every == 0:
                x = self.side_blocks[i // every](x)
        return x


def swap_of(model, homes, slots=2, lists=("blocks",), drive=True):
    """A ``BlockSwap`` over ``model`` with the given home of every block, in order of the lists."""
    blocks = [block for name in lists for block in getattr(model, name)]
    packs = [Pack.layout(block.modules()) for block in blocks]
    model.embed.to(COMPUTE)
    for pack, home in zip(packs, homes, strict=True):
        pack.place(torch.device(home))
    calls = [[f"{name}.{i}"] for name in lists for i in range(len(getattr(model, name)))]
    swap = BlockSwap(COMPUTE, packs, calls)
    swap.update(slots)
    swap.allocate_slots()
    if drive:
        swap.drive(model)
    simulator.reset()
    return swap


def at_home(swap, model):
    """Whether every tensor of every block lies on its home."""
    return all(
        tensor.device == pack.device
        for pack in swap._packs
        for tensor in (weight.table[weight.name] for weight in pack._weights)
    )
