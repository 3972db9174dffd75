"""Weight formats on a real ComfyUI: fp8 plain and scaled, GGUF, each with and without a LoRA."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from conftest import COMPUTE
from rig import simulator

SPLIT = "acc:0,5mb;acc:1,1mb;cpu,*"


@pytest.fixture(scope="module")
def scaled_fp8(bench):
    """The tiny Wan with scaled fp8 linear layers, as ``scaled_fp8`` checkpoints have them."""
    models = bench.host.base_dir / "models" / "diffusion_models"
    weights = safetensors.torch.load_file(models / "wan.safetensors")
    out = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, weight in weights.items():
        linear = name.startswith("blocks.") and name.endswith(".weight") and weight.dim() == 2
        if linear:
            scale = weight.float().abs().max() / 448
            out[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            out[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            out[name] = weight
    safetensors.torch.save_file(out, models / "scaled_fp8.safetensors")
    return "scaled_fp8.safetensors"


@pytest.fixture(scope="module", params=["Q8_0", "Q4_0"])
def gguf_file(request, bench):
    """The tiny Wan as GGUF, quantised by the gguf package."""
    if not request.config.getoption("gguf"):
        pytest.skip("needs a checkout of ComfyUI-GGUF: --gguf DIR")
    import gguf

    models = bench.host.base_dir / "models" / "diffusion_models"
    kind = getattr(gguf.GGMLQuantizationType, request.param)
    writer = gguf.GGUFWriter(models / f"wan_{request.param}.gguf", "wan")
    for name, weight in safetensors.torch.load_file(models / "wan.safetensors").items():
        data = weight.float().numpy()
        if name.startswith("blocks.") and name.endswith(".weight") and weight.dim() == 2:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"wan_{request.param}.gguf"


def gguf_nodes(bench, file, split=None):
    if split is None:
        return {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": file}}
    node = bench.distorch(split, unet_name=file)
    node["inputs"].pop("weight_dtype")
    return {"class_type": "UnetLoaderGGUFDisTorch2MultiGPU", "inputs": node["inputs"]}


def check(bench, plain, swapped, strengths=(0.8, 0.3)):
    """The latent of ``swapped`` is that of ``plain``: without a LoRA, with one, and after it."""
    graphs = [lambda loader: {"1": loader}]
    graphs += [lambda loader, s=s: bench.lora(loader, s) for s in strengths]
    graphs += graphs[:1]
    expected = [bench.sample(graph(plain)) for graph in graphs]
    bench.clear()
    latents = [bench.sample(graph(swapped)) for graph in graphs]
    equal = [torch.equal(one, other) for one, other in zip(latents, expected, strict=True)]
    assert equal == [True] * len(graphs)  # plain, with each strength, and plain again
    assert not torch.equal(expected[0], expected[1])
    return bench.state()


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_fp8_by_the_loaders_weight_dtype(bench, weight_dtype):
    plain = bench.plain()
    plain["inputs"]["weight_dtype"] = weight_dtype
    state = check(bench, plain, bench.distorch(SPLIT, weight_dtype=weight_dtype))
    assert len(state.split.swapped) > state.split.slots
    dtypes = {p.dtype for p in bench.loaded().model.diffusion_model.blocks[0].parameters()}
    assert getattr(torch, "float8_" + weight_dtype[4:]) in dtypes


def test_scaled_fp8(bench, scaled_fp8):
    state = check(bench, bench.plain(scaled_fp8), bench.distorch(SPLIT, unet_name=scaled_fp8))
    assert len(state.split.swapped) > state.split.slots
    kinds = {
        type(module.weight).__name__
        for module in bench.loaded().model.diffusion_model.blocks[0].modules()
        if getattr(module, "weight", None) is not None
    }
    if "QuantizedTensor" not in kinds:  # ComfyUI that keeps the scale beside a plain fp8 weight
        assert any("scale" in name for name in bench.loaded().model.state_dict())
    # What travels is fp8: half of what bf16 would be.
    assert max(block.nbytes for block in state.sizes.blocks) < 0.6 * 1_584_640


def test_gguf(bench, gguf_file):
    state = check(bench, gguf_nodes(bench, gguf_file), gguf_nodes(bench, gguf_file, SPLIT))
    bench.clear()
    loader = gguf_nodes(bench, gguf_file, "acc:0,4mb;cpu,*")
    bench.sample(loader)
    state = bench.state()
    simulator.ledger.clear_copies()
    bench.sample(loader, 2)
    block = state.split.slot_bytes
    assert block < (0.6 if "Q8" in gguf_file else 0.35) * 1_584_640
    moved = [c.nbytes for c in simulator.ledger.copies if c.nbytes == block]
    assert len(moved) == 4 * len(state.split.swapped)
    assert all(c.destination != "cpu" for c in simulator.ledger.copies if c.nbytes > 20_000)


def test_loading_a_gguf_leaves_no_mapping_of_the_file(bench, gguf_file):
    patcher = bench.load(gguf_nodes(bench, gguf_file, "acc:0,4mb;cpu,*"))
    with torch.inference_mode():
        bench.mm.load_models_gpu([patcher])
    assert gguf_file not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(patcher.current_loaded_device()) == COMPUTE
