"""`torch.compile` of swapped blocks with the compiler that people use, which wants a real card."""

import pytest
import torch


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_nothing_is_compiled_after_the_second_pass(bench, card, mode):
    """Guards are tested without a card in `tests/unit/test_compile.py`; here is the rest of it."""
    if card.compute.startswith("acc"):
        pytest.skip("inductor has no code for simulated devices")
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    patcher = bench.place(bench.distorch(bench.text("small", 0.5), unet_name="small.safetensors"))
    model = patcher.model.diffusion_model
    inputs = bench.inputs(patcher)
    with torch.inference_mode():
        expected = model(*inputs)
        for block in model.blocks:
            block.compile(mode=mode)
        graphs = []
        for _ in range(5):
            out = model(*inputs).clone()
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] > 0
    assert graphs[1:] == graphs[1:2] * 4
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
