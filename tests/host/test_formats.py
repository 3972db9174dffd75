"""Weight formats on a real ComfyUI, with and without LoRAs: fp8 by the loader and in checkpoints,
layers quantised one by one (fp8, nvfp4, mxfp8), GGUF."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from conftest import COMPUTE
from rig import simulator
from rig.formats import GGUF, LAYERWISE, check, loader

SPLIT = "acc:0,5mb;acc:1,1mb;cpu,*"
# Where ComfyUI keeps what is not quantised in float32, the weights beside the blocks take 6.6 MiB.
FLOAT32_SPLIT = "acc:0,9mb;cpu,*"

ALIGNMENT = 256


def check_travel(bench, swapped):
    """In each of four passes every swapped block moves once, as it is stored; nothing goes down."""
    split = bench.state().split
    assert {block.nbytes for block in bench.state().sizes.blocks} == {split.slot_bytes}
    simulator.ledger.clear_copies()
    bench.sample(swapped, seed=2)
    moved = [copy for copy in simulator.ledger.copies if copy.nbytes == split.slot_bytes]
    assert len(moved) == 4 * len(split.swapped)
    assert all(c.destination != "cpu" for c in simulator.ledger.copies if c.nbytes > 20_000)


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_fp8_by_the_loaders_weight_dtype(bench, weight_dtype):
    plain = bench.plain()
    plain["inputs"]["weight_dtype"] = weight_dtype
    check(bench, plain, bench.distorch(SPLIT, weight_dtype=weight_dtype))
    dtypes = {p.dtype for p in bench.loaded().model.diffusion_model.blocks[0].parameters()}
    assert getattr(torch, "float8_" + weight_dtype[4:]) in dtypes


def test_scaled_fp8(bench):
    state = check(bench, loader(bench, "scaled_fp8"), loader(bench, "scaled_fp8", SPLIT))
    if "QuantizedTensor" not in _weight_types(bench):  # ComfyUI that keeps the scale beside it
        assert any("scale" in name for name in bench.loaded().model.state_dict())
    # What travels is fp8: half of what bf16 would be.
    assert max(block.nbytes for block in state.sizes.blocks) < 0.6 * 1_584_640


@pytest.mark.parametrize(
    ("kind", "native"),
    [(kind, False) for kind in LAYERWISE] + [("float8_e4m3fn", True)],
)
def test_layers_quantised_one_by_one(bench, kind, native, monkeypatch):
    """Weights dequantised at use, and as operands of a product of their own format.

    A CPU has no such product for the others.
    """
    if native:
        monkeypatch.setattr(bench.mm, "supports_fp8_compute", lambda *_: True)
    swapped = loader(bench, kind, FLOAT32_SPLIT)
    state = check(bench, loader(bench, kind), swapped, strengths=[0.8])
    assert "QuantizedTensor" in _weight_types(bench)
    layer = bench.loaded().model.diffusion_model.blocks[0].self_attn.q
    assert layer._full_precision_mm is not native
    # What travels is what the file holds; ComfyUI keeps biases in the dtype it computes in.
    stored = _stored_block_bytes(bench, swapped)
    assert all(stored <= block.nbytes < stored + 8192 for block in state.sizes.blocks)
    check_travel(bench, swapped)


def _weight_types(bench):
    return {
        type(module.weight).__name__
        for module in bench.loaded().model.diffusion_model.blocks[0].modules()
        if getattr(module, "weight", None) is not None
    }


def _stored_block_bytes(bench, node):
    """Bytes of one block's tensors in the file of a loader node, each aligned."""
    folder = bench.host.base_dir / "models" / "diffusion_models"
    weights = safetensors.torch.load_file(folder / node["inputs"]["unet_name"])
    return sum(
        -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
        for name, weight in weights.items()
        if name.startswith("blocks.0.") and not name.endswith("comfy_quant")
    )


@pytest.mark.parametrize("kind", GGUF)
def test_gguf(bench, kind):
    swapped = loader(bench, kind, FLOAT32_SPLIT)
    state = check(bench, loader(bench, kind), swapped, strengths=[0.8])
    assert state.split.slot_bytes < (0.6 if kind == "Q8_0" else 0.35) * 1_584_640
    check_travel(bench, swapped)


@pytest.mark.parametrize("kind", GGUF)
def test_loading_a_gguf_leaves_no_mapping_of_the_file(bench, kind):
    node = loader(bench, kind, FLOAT32_SPLIT)
    patcher = bench.load(node)
    assert node["inputs"]["unet_name"] in Path("/proc/self/maps").read_text(encoding="utf-8")
    with torch.inference_mode():
        bench.mm.load_models_gpu([patcher])
    assert node["inputs"]["unet_name"] not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(patcher.current_loaded_device()) == COMPUTE


@pytest.mark.parametrize("kind", ["bf16", "scaled_fp8", "nvfp4", "Q8_0"])
def test_weights_in_a_slot_are_contiguous_and_aligned(bench, kind):
    """Kernels that load whole vectors fault on addresses that are not."""
    node = loader(bench, kind, "acc:0,4mb;cpu,*")
    bench.sample(node)
    swap, seen = bench.state().swap, set()

    def look(index, part):
        (slot,) = [slot for slot in swap._slots if slot.block == index and slot.uses]
        start, end = slot.buffer.data_ptr(), slot.buffer.data_ptr() + slot.buffer.nbytes
        for name, weight in [*part.named_parameters(), *part.named_buffers()]:
            for tensor in _memory_of(weight):
                assert tensor.is_contiguous(), name
                assert start <= tensor.data_ptr() <= end - tensor.nbytes, name
                assert (tensor.data_ptr() - start) % ALIGNMENT == 0, name
                seen.add((index, name))

    model = bench.loaded().model.diffusion_model
    parts = [part.module for part in bench.module("model_blocks").parts_of(model).all]
    swapped = bench.state().split.swapped
    hooks = [
        child.register_forward_pre_hook(lambda _, __, index=index: look(index, parts[index]))
        for index in swapped
        for child in parts[index].children()
    ]
    bench.sample(node, seed=2)
    for hook in hooks:
        hook.remove()
    assert seen == {(i, name) for i in swapped for name, _ in parts[i].named_parameters()}
    assert seen


def _memory_of(weight):
    """The tensors with memory of their own that a weight consists of."""
    if hasattr(type(weight), "__tensor_flatten__"):
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return [weight.as_subclass(torch.Tensor) if hasattr(weight, "tensor_type") else weight]
