"""After a pass that failed, everything is at home and the next pass is right."""

import pytest
import torch

from rig.comfy_host import PromptError


@pytest.fixture
def loaded(bench, expected):
    """A loader whose model has sampled once, with half of it swapped."""
    expected("small", 2)  # not to be made while the model is there
    loader = bench.distorch(bench.text("small", 0.5), unet_name="small.safetensors")
    bench.sample(loader)
    assert len(bench.state().split.swapped) > bench.state().split.slots
    return loader


def failing(bench, act, call):
    """A hook that calls `act` before one of the inner blocks runs, for the `call`-th time."""
    blocks = bench.loaded().model.diffusion_model.blocks
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == call:
            act()

    return blocks[len(blocks) // 2].register_forward_pre_hook(hook)


@pytest.mark.parametrize("call", [1, 2])
def test_out_of_memory_in_a_pass_and_then_a_right_one(bench, card, expected, loaded, call):
    handle = failing(bench, card.exhaust, call)
    with pytest.raises(PromptError) as caught:
        bench.sample(loaded, 2)
    handle.remove()
    assert "OutOfMemoryError" in caught.value.exception_type
    # ComfyUI then lets every model go, and with them what was page-locked.
    assert bench.mm.current_loaded_models == []
    assert torch.equal(bench.sample(loaded, 2), expected("small", 2))
    assert bench.at_home()


def test_out_of_memory_for_the_slots_and_then_a_right_pass(bench, card, expected, loaded):
    """What another model took meanwhile: the slots are allocated when a pass begins."""
    patcher = bench.loaded()
    model = patcher.model.diffusion_model
    inputs = bench.inputs(patcher)
    with torch.inference_mode():
        before = model(*inputs)
        patcher.partially_unload(patcher.offload_device, 1)
        card.reset()
        ballast = card.ballast(left=bench.state().split.slot_bytes // 2)
        with pytest.raises(torch.OutOfMemoryError):
            model(*inputs)
        del ballast
        assert bench.at_home()
        assert torch.equal(model(*inputs), before)
    assert torch.equal(bench.sample(loaded, 2), expected("small", 2))


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupt_in_a_pass_and_then_a_right_one(bench, expected, loaded, call):
    model = bench.loaded().model

    def interrupt():
        raise bench.mm.InterruptProcessingException

    handle = failing(bench, interrupt, call)
    with pytest.raises(PromptError) as caught:
        bench.sample(loaded, 2)
    handle.remove()
    assert caught.value.exception_type == "InterruptProcessingException"
    assert bench.at_home()
    assert torch.equal(bench.sample(loaded, 2), expected("small", 2))
    assert bench.loaded().model is model


def test_control_c_in_a_pass_and_then_a_right_one(bench, loaded):
    patcher = bench.loaded()
    model, inputs = patcher.model.diffusion_model, bench.inputs(patcher)

    def stop():
        raise KeyboardInterrupt

    with torch.inference_mode():
        before = model(*inputs)
        handle = failing(bench, stop, 1)
        with pytest.raises(KeyboardInterrupt):
            model(*inputs)
        handle.remove()
        assert bench.at_home()
        assert torch.equal(model(*inputs), before)
