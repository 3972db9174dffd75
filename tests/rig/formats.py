"""The formats that weights come in: files of them, and the loader nodes for these files."""

import json

import pytest
import safetensors.torch
import torch

LAYERWISE = ("float8_e4m3fn", "nvfp4", "mxfp8")
GGUF = ("Q8_0", "Q4_0")


def loader(bench, kind, split=None, model="wan"):
    """The loader node for `model` in the format `kind`, with DisTorch2 if it has a split.

    The file is made of that in bf16, `<model>.safetensors`, at its first use. Skips the test where
    the host does not know the format.
    """
    folder = bench.host.base_dir / "models" / "diffusion_models"
    source = folder / f"{model}.safetensors"
    suffix = "gguf" if kind in GGUF else "safetensors"
    file = source if kind == "bf16" else folder / f"{model}-{kind}.{suffix}"
    if not file.exists():
        weights = safetensors.torch.load_file(source)
        if kind in GGUF:
            _write_gguf(weights, file, kind)
        else:
            weights = _scaled_fp8(weights) if kind == "scaled_fp8" else _layerwise(weights, kind)
            safetensors.torch.save_file(weights, file)
    node = bench.plain(file.name) if split is None else bench.distorch(split, unet_name=file.name)
    if kind in GGUF:
        del node["inputs"]["weight_dtype"]
        suffix = "" if split is None else "DisTorch2MultiGPU"
        node = {**node, "class_type": f"UnetLoaderGGUF{suffix}"}
    return node


def check(bench, plain, swapped, strengths=(0.8, 0.3)):
    """The latent of `swapped` is that of `plain`: without a LoRA, with one, and after it.

    Returns the state of the swapped model.
    """
    graphs = [lambda loader: {"1": loader}]
    graphs += [lambda loader, s=s: bench.lora(loader, s) for s in strengths]
    expected = [bench.sample(graph(plain)) for graph in graphs]
    bench.clear()
    graphs, expected = [*graphs, graphs[0]], [*expected, expected[0]]
    latents = []
    for graph in graphs:
        latents.append(bench.sample(graph(swapped)))
        state = bench.state()
        assert state.compute_bytes() <= state.split.compute_bytes  # a LoRA takes no room of its own
    equal = [torch.equal(one, other) for one, other in zip(latents, expected, strict=True)]
    assert equal == [True] * len(graphs)  # plain, with each strength, and plain again
    assert not torch.equal(expected[0], expected[1])
    assert len(state.split.swapped) > state.split.slots
    return state


def _is_linear(name, weight):
    return name.startswith("blocks.") and name.endswith(".weight") and weight.dim() == 2


def _scaled_fp8(weights):
    """Scaled fp8 linear layers, as `scaled_fp8` checkpoints have them."""
    out = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, weight in weights.items():
        if _is_linear(name, weight):
            scale = weight.float().abs().max() / 448
            out[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            out[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            out[name] = weight
    return out


def _layerwise(weights, kind):
    """Linear layers in one of ComfyUI's own formats, each with its `comfy_quant` entry."""
    from comfy import quant_ops

    if kind not in quant_ops.QUANT_ALGOS:
        pytest.skip(f"this ComfyUI does not know {kind}")
    layout = quant_ops.get_layout_class(quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"])
    scale = {} if kind == "mxfp8" else {"scale": "recalculate"}
    marker = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    out = {}
    for name, weight in weights.items():
        if _is_linear(name, weight):
            for suffix, tensor in layout.state_dict_tensors(
                *layout.quantize(weight, **scale)
            ).items():
                is_scale = tensor.dtype == torch.float8_e8m0fnu  # its files have plain bytes
                out[name + suffix] = tensor.view(torch.uint8) if is_scale else tensor
            out[name.removesuffix("weight") + "comfy_quant"] = marker.clone()
        else:
            out[name] = weight
    return out


def _write_gguf(weights, path, kind):
    """Linear layers quantised by the gguf package, the rest in float32."""
    gguf = pytest.importorskip("gguf")
    kind = getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(path, "wan")
    for name, weight in weights.items():
        data = weight.float().numpy()
        if _is_linear(name, weight):
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
