"""Copies of a driven model: plain models, which know nothing of the swap of the one they are of."""

import copy
import gc
import inspect
import io
import weakref

import pytest
import torch

from block_swap.module_calls import CallSite
from rig import simulator
from toy import COMPUTE, Model, swap_of

ledger = simulator.ledger
HOMES = ["acc:0", "cpu", "acc:1", "cpu", "cpu", "acc:0", "acc:1", "cpu"]
X = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))


def driven():
    model = Model()
    return model, swap_of(model, HOMES)


def test_a_deep_copy_is_a_plain_model_that_works():
    expected = Model()(X)
    model, swap = driven()
    twin = copy.deepcopy(model)
    homes = [str(block.up.weight.device) for block in twin.blocks]
    assert homes == HOMES  # real weights, where they were
    originals = {id(t) for t in model.parameters()} | {t.data_ptr() for t in model.parameters()}
    assert all(id(t) not in originals for t in twin.parameters())
    twin.to("cpu")
    ledger.clear_copies()
    assert torch.equal(twin(X), expected)
    assert ledger.count() == 0
    twin.blocks[1].up.weight.zero_()
    assert not torch.equal(twin(X), expected)
    assert torch.equal(model(X.to(COMPUTE)).cpu(), expected)
    assert ledger.count("cpu", COMPUTE) > 0


def test_a_deep_copy_outlives_what_it_is_of():
    expected = Model()(X)
    model, swap = driven()
    twin = copy.deepcopy(copy.deepcopy(model))
    del model, swap
    gc.collect()
    assert torch.equal(twin.to("cpu")(X), expected)
    held = weakref.ref(twin)
    gc.disable()
    try:
        del twin
        assert held() is None
    finally:
        gc.enable()


def test_a_deep_copy_in_a_pass_is_no_part_of_it():
    expected = Model()(X)
    model, swap = driven()
    twins = []
    model.blocks[3].up.register_forward_pre_hook(lambda *_: twins.append(copy.deepcopy(model)))
    assert torch.equal(model(X.to(COMPUTE)).cpu(), expected)
    (twin,) = twins
    twin.blocks[3].up._forward_pre_hooks.clear()
    assert torch.equal(twin.to("cpu")(X), expected)


def test_a_deep_copy_of_one_block():
    model, swap = driven()
    block = copy.deepcopy(model.blocks[2])
    assert torch.equal(block.to("cpu")(X), Model().blocks[2](X))
    assert inspect.signature(block.forward) == inspect.signature(model.blocks[2].forward)


def test_what_others_have_hung_on_a_model_goes_along():
    model = Model()
    model.loop = lambda x: 2 * x
    swap_of(model, HOMES)
    twin = copy.deepcopy(model)
    assert twin.__dict__["loop"](3) == 6
    assert torch.equal(twin.to("cpu")(X), 2 * Model().embed(X))


def test_a_deep_copy_can_be_driven_itself():
    expected = Model()(X)
    model, swap = driven()
    twin = copy.deepcopy(model)
    own = swap_of(twin, HOMES[::-1], drive=False)
    undo = own.drive(twin)
    site = CallSite(twin, "embed", ["forward"], lambda call: call)
    site.follow()
    assert site.is_plain
    site.detach()
    assert torch.equal(twin(X.to(COMPUTE)).cpu(), expected)
    assert torch.equal(model(X.to(COMPUTE)).cpu(), expected)
    undo()
    assert not {"forward", "loop"} & set(twin.__dict__)


@pytest.mark.parametrize("others", [False, True])
def test_a_module_can_be_saved_whole(others):
    model = Model()
    block = model.blocks[1]  # on the CPU
    if others:
        block.forward = block.up.forward
    swap = swap_of(model, HOMES)
    assert swap.slot_bytes
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    expected = Model().blocks[1].up(X) if others else Model().blocks[1](X)
    assert torch.equal(twin(X), expected)
