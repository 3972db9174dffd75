"""Bit for bit the latent of the unswapped model, in every format that the card computes."""

import pytest
import torch

from rig import formats

HALF = 0.5


def swapped(bench, card, model="small", share=HALF, **inputs):
    text = f"{card.compute},{share:.0%};cpu,*"
    return bench.distorch(text, unet_name=f"{model}.safetensors", **inputs)


@pytest.mark.parametrize(("model", "share"), [("wan", 0.2), ("other", 0.6)])
def test_a_model_of_real_size(bench, card, expected, model, share):
    seeds = (1, 2, 1)
    latents = [expected(model, seed) for seed in seeds]
    loader = swapped(bench, card, model, share)
    equal = []
    for seed, latent in zip(seeds, latents, strict=True):
        equal.append(torch.equal(bench.sample(loader, seed), latent))
    assert equal == [True] * len(seeds)
    assert not torch.equal(latents[0], latents[1])
    assert len(bench.state().split.swapped) > bench.state().split.slots


@pytest.mark.parametrize("flag", ["fp32_unet", "fp16_unet", "bf16_unet"])
def test_every_plain_precision(bench, card, monkeypatch, flag):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "bf16_unet", False)
    monkeypatch.setattr(args, flag, True)
    formats.check(bench, bench.plain("small.safetensors"), swapped(bench, card), strengths=[0.8])
    dtypes = {p.dtype for p in bench.loaded().model.diffusion_model.blocks[0].parameters()}
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    assert names[flag.removesuffix("_unet")] in dtypes


# "fast" multiplies in fp8 where the card can.
@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"])
def test_fp8_by_the_loaders_weight_dtype(bench, card, weight_dtype):
    plain = bench.plain("small.safetensors")
    plain["inputs"]["weight_dtype"] = weight_dtype
    loader = swapped(bench, card, weight_dtype=weight_dtype)
    formats.check(bench, plain, loader, strengths=[0.8])
    dtypes = {p.dtype for p in bench.loaded().model.diffusion_model.blocks[0].parameters()}
    assert getattr(torch, "float8_" + weight_dtype.removesuffix("_fast")[4:]) in dtypes


@pytest.mark.parametrize("kind", ["scaled_fp8", *formats.LAYERWISE, *formats.GGUF])
def test_quantised_files(bench, card, kind):
    if kind in (*formats.LAYERWISE, "scaled_fp8"):
        pytest.importorskip("comfy_kitchen", reason="ComfyUI's quantised layers need comfy-kitchen")
    text = f"{card.compute},{HALF:.0%};cpu,*"
    plain = formats.loader(bench, kind, model="small")
    loader = formats.loader(bench, kind, text, model="small")
    state = formats.check(bench, plain, loader, strengths=[0.8])
    # What travels is what the file holds, and not what it is multiplied as.
    whole = {"scaled_fp8": 0.6, "float8_e4m3fn": 0.6, "mxfp8": 0.6, "Q8_0": 0.6}.get(kind, 0.4)
    block = bench.block_bytes("small")
    assert all(part.nbytes < whole * block for part in state.sizes.blocks)
