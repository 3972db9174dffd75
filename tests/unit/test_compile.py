"""``torch.compile`` of a swapped model: the same result, nothing compiled again."""

import pytest
import torch

from block_swap import swap_executor
from block_swap.packed_weights import Pack
from block_swap.swap_executor import BlockSwap

LAYERS = 6

# Another device than "cpu" to everything that compares devices, with the same memory behind it.
COMPUTE = torch.device("cpu", 0)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(16, 32)
        self.down = torch.nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.skip = ()
        self.requires_grad_(False)

    def forward(self, x):
        return self.loop(x)

    def loop(self, x):
        for i, block in enumerate(self.blocks):
            if i not in self.skip:
                x = block(x)
        return x


def swapped_model(slots=2):
    model = Model()
    packs = [Pack.layout(block.modules()) for block in model.blocks]
    for pack in packs:
        pack.place(torch.device("cpu"))
    swap = BlockSwap(COMPUTE, packs, [[f"blocks.{i}"] for i in range(LAYERS)])
    swap.update(slots)
    swap.allocate_slots()
    return model, swap


@pytest.mark.parametrize("per_block", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_compiled_results_are_those_of_the_model_and_nothing_is_compiled_again(
    per_block, inference
):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with torch.inference_mode(inference):
        model, swap = swapped_model()
        swap.drive(model)
        run = model
        if per_block:
            for block in model.blocks:
                block.compile(backend=counter)
        else:
            run = torch.compile(model, backend=counter)
        x = torch.randn(4, 16)
        results, frames = [], []
        for step in range(5):
            results.append(run(x + step))
            frames.append(counter.frame_count)
        reference = Model()
        for step, result in enumerate(results):
            assert torch.equal(result, reference(x + step))
    assert frames[0] > 0
    assert frames[1:] == frames[:1] * 4
    assert all(
        p.data_ptr() == v.data_ptr() for p, v in zip(model.parameters(), _homes(swap), strict=True)
    )


def divided_model(slots):
    """The model with its blocks in two parts each."""
    model = Model()
    parts = [(f"blocks.{i}", name) for i in range(LAYERS) for name in ("up", "down")]
    calls = [[f"{block}.{name}"] for block, name in parts]
    packs = [Pack.layout(model.get_submodule(names[0]).modules()) for names in calls]
    for pack in packs:
        pack.place(torch.device("cpu"))
    wholes = {f"blocks.{i}": (2 * i, 2 * i + 1) for i in range(LAYERS)}
    swap = BlockSwap(COMPUTE, packs, calls, wholes=wholes)
    swap.update(slots)
    swap.allocate_slots()
    return model, swap


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("divided", "slots"), [(False, 2), (True, 2), (True, 4)])
def test_a_block_that_is_compiled_as_one_graph_stays_one(divided, slots, in_place):
    """ComfyUI hangs what it has compiled in place of a block for one call of the model.

    With ``fullgraph`` a hook inside would fail it.
    """
    torch._dynamo.reset()
    model, swap = divided_model(slots) if divided else swapped_model(slots)
    swap.drive(model)
    plain, reference = list(model.blocks), Model()
    x = torch.randn(4, 16)
    assert torch.equal(model(x), reference(x))
    assert not swap.meets_compiled
    with torch.inference_mode():
        if in_place:
            for index in (1, 4):
                plain[index].compile(fullgraph=True, backend="eager")
        for step in range(3):
            if not in_place:
                for index in (1, 4):
                    compiled = torch.compile(plain[index], fullgraph=True, backend="eager")
                    model.blocks[index] = compiled
            assert torch.equal(model(x + step), reference(x + step))
            for index, block in enumerate(plain):
                model.blocks[index] = block
    assert swap.meets_compiled == divided
    assert all(
        p.data_ptr() == v.data_ptr() for p, v in zip(_held(model), _homes(swap), strict=True)
    )


def _held(model):
    return [p for block in model.blocks for p in block.parameters()]


def places_of(model):
    """The addresses at which each block of a model finds its weights, from now on."""
    places = [set() for _ in model.blocks]

    def watch(index, block):
        forward = block.forward

        def watched(x):
            places[index].add(block.up.weight.data_ptr())
            return forward(x)

        block.forward = watched

    for index, block in enumerate(model.blocks):
        watch(index, block)
    return places


@pytest.mark.parametrize(("slots", "keeps"), [(2, True), (3, True), (4, False)])
def test_a_block_keeps_its_slot_where_the_numbers_allow_it(caplog, monkeypatch, slots, keeps):
    """A CUDA graph is good for the addresses that it was recorded with.

    Six blocks take turns in two or three slots and come back to the one they had. In four they do
    not; the log says so once, where graphs are recorded.
    """
    monkeypatch.setattr(swap_executor, "_records_cuda_graphs", lambda: True)
    model, swap = swapped_model(slots)
    swap.drive(model)
    places = places_of(model)
    x = torch.randn(4, 16)
    for _ in range(6):
        assert torch.equal(model(x), Model()(x))
    assert all(len(addresses) == 1 for addresses in places) == keeps
    said = [r for r in caplog.records if "CUDA graph is recorded" in r.message]
    assert len(said) == (not keeps)


def test_a_block_that_was_left_out_does_not_shift_the_others():
    """Skipped blocks (layer guidance, caches) leave every other block in its slot."""
    model, swap = swapped_model()
    swap.drive(model)
    places = places_of(model)
    x = torch.randn(4, 16)
    for skip in ((), (1,), (), (0, 3), (), ()):
        model.skip = skip
        model(x)
    assert [len(addresses) for addresses in places] == [1] * LAYERS


def _homes(swap):
    return [view for pack in swap._packs for view in pack.views]
