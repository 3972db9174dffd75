"""`auto` and nodes that keep state from pass to pass: out of memory, they see one pass or an error.

What wraps a forward lies outside of what runs again; what replaces it, as TeaCache's nodes do, is
run once.
"""

import re
from unittest import mock

import pytest
import torch

from conftest import COMPUTE
from rig import comfy_host, prompts

AUTO = f"{COMPUTE},auto;cpu,*"
STEPS = 6

EASY_CACHE = {
    "class_type": "EasyCache",
    "inputs": {
        "model": ["1", 0],
        "reuse_threshold": 3.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "verbose": False,
    },
}
LAZY_CACHE = {**EASY_CACHE, "class_type": "LazyCache"}
WINDOWS = {
    "class_type": "ContextWindowsManual",
    "inputs": {
        "model": ["1", 0],
        "context_length": 3,
        "context_overlap": 1,
        "context_schedule": "standard_static",
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "pyramid",
        "dim": 2,
        "freenoise": True,
        "cond_retain_index_list": "",
        "split_conds_to_windows": False,
        "latent_retain_index_list": "",
        "causal_window_fix": True,
    },
}
TEA_CACHE = {"class_type": "TeaCacheLike", "inputs": {"model": ["1", 0]}}


class TeaCacheLike:
    """What TeaCache's nodes do: around every call another `forward_orig`, which skips the blocks
    where little has changed since the last call of the same conditioning, and notes what it did."""

    CATEGORY = "tests"
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    calls: list = []

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def apply(self, model):
        model = model.clone()
        diffusion_model = model.get_model_object("diffusion_model")
        own, state = type(diffusion_model).forward_orig, {}

        def forward_orig(self, x, t, context, transformer_options, **kwargs):
            conds = tuple(transformer_options["cond_or_uncond"])
            count, residual = state.get(conds, (0, None))
            state[conds] = (count + 1, residual)
            TeaCacheLike.calls.append(conds)
            if count % 2 == 0:
                out = own(self, x, t, context, transformer_options=transformer_options, **kwargs)
                state[conds] = (count + 1, out - x)
                return out
            return x + residual

        def call(model_function, arguments):
            sigmas = arguments["c"]["transformer_options"]["sample_sigmas"]
            if arguments["timestep"][0] == sigmas[0]:  # a run begins
                state.pop(tuple(arguments["cond_or_uncond"]), None)
            bound = forward_orig.__get__(diffusion_model, type(diffusion_model))
            with mock.patch.multiple(diffusion_model, forward_orig=bound):
                return model_function(arguments["input"], arguments["timestep"], **arguments["c"])

        model.set_model_unet_function_wrapper(call)
        return (model,)


@pytest.fixture
def failing(monkeypatch):
    """Makes the attentions of these numbers run out of memory; yields the numbers left."""
    import comfy.ldm.wan.model as wan

    numbers, seen = set(), [0]
    attention = wan.optimized_attention

    def out_of_memory_at_times(*args, **kwargs):
        seen[0] += 1
        if seen[0] in numbers:
            numbers.discard(seen[0])
            raise torch.OutOfMemoryError("Tried to allocate 1.00 MiB.")
        return attention(*args, **kwargs)

    monkeypatch.setattr(wan, "optimized_attention", out_of_memory_at_times)

    def at(*wanted):
        seen[0] = 0
        numbers.update(wanted)
        return numbers

    return at


def sample(bench, loader, node, seed=1):
    """The latent of a video of nine latent frames with `node` on top of the model."""
    nodes = prompts.guided({"1": loader, "2": node}, "2", seed, STEPS)
    nodes["22"] = {
        **prompts.EMPTY_LATENT,
        "inputs": {"width": 64, "height": 64, "length": 25, "batch_size": 1},
    }
    bench.host.run(nodes)
    return bench.host.custom_module("probe").LATENTS.pop("out")


@pytest.mark.parametrize("node", [EASY_CACHE, LAZY_CACHE, WINDOWS], ids=lambda n: n["class_type"])
def test_what_wraps_a_pass_sees_one_of_it(bench, card, failing, log, caplog, node):
    """In the first pass, in the first that follows, and far into the run."""
    if node["class_type"] not in bench.host.nodes:
        pytest.skip("this ComfyUI does not have it")
    card(40)
    caplog.set_level("INFO")
    expected = sample(bench, bench.plain(), node)
    skipped = [m for m in caplog.messages if re.search(r"skipped \d+/", m)]
    bench.clear()
    caplog.clear()
    left = failing(3, 30, 40)
    out = sample(bench, bench.distorch(AUTO), node)
    assert left == set()
    assert len(log("which is repeated with")) >= 3
    assert out.equal(expected)
    assert skipped[-1:] == [m for m in caplog.messages if re.search(r"skipped \d+/", m)][-1:]


def test_what_replaces_the_forward_runs_once_and_the_next_prompt_works(
    bench, card, failing, log, monkeypatch
):
    card(40)
    monkeypatch.setitem(bench.host.nodes, "TeaCacheLike", TeaCacheLike)
    expected = sample(bench, bench.plain(), TEA_CACHE)
    bench.clear()
    TeaCacheLike.calls.clear()
    left = failing(3)
    with pytest.raises(comfy_host.PromptError) as caught:
        sample(bench, bench.distorch(AUTO), TEA_CACHE)
    assert "OutOfMemoryError" in caught.value.exception_type
    assert left == set() and len(TeaCacheLike.calls) == 1
    assert log("which is repeated with") == []
    assert sample(bench, bench.distorch(AUTO), TEA_CACHE).equal(expected)
