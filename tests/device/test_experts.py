"""Wan 2.2: two models in turn, high noise and low, on a card with room for one of them."""

import torch

from rig import prompts

MODELS = ("wan", "other")
SHARE = 0.6


def both(bench, loaders, seed):
    """A prompt that samples with each of the two; latents by model."""
    prompt = {"1": loaders["wan"], "2": loaders["other"]}
    prompt = prompts.guided(prompt, "1", seed, bench.card.steps, key="wan", latent=bench.latent)
    prompt["33"] = prompts.sampler("2", "20", "21", "22", seed, bench.card.steps, cfg=5.0)
    prompt["34"] = prompts.probe("33", "other")
    bench.host.run(prompt)
    latents = bench.host.custom_module("probe").LATENTS
    return {model: latents.pop(model) for model in MODELS}


def test_two_experts_take_turns(bench, card, expected):
    latents = {seed: {model: expected(model, seed) for model in MODELS} for seed in (1, 2)}
    text = bench.text("wan", SHARE)
    loaders = {model: bench.distorch(text, unet_name=f"{model}.safetensors") for model in MODELS}
    share = int(SHARE * bench.size("wan"))
    # Room for one and a half of the two shares, and what ComfyUI wants free.
    ballast = card.ballast(int(1.5 * share + bench.mm.minimum_inference_memory()))
    both(bench, loaders, seed=1)
    for seed in (2, 1, 2):
        with card.traffic() as traffic:
            found = both(bench, loaders, seed)
        equal = {model: torch.equal(found[model], latents[seed][model]) for model in MODELS}
        assert equal == dict.fromkeys(MODELS, True)
        states = [bench.state(entry.model) for entry in bench.mm.current_loaded_models]
        resident = [s.split.compute_bytes - s.split.slots * s.split.slot_bytes for s in states]
        # One had to give way to the other, and what it gives up has a home already.
        assert [s.compute_bytes() < s.split.compute_bytes for s in states] == [False, True]
        lots = states[0].split.slot_bytes // 2
        down = sum(copy.nbytes for copy in traffic.others() if copy.destination == "cpu")
        assert 0 < down < lots
        up = sum(copy.nbytes for copy in traffic.others() if copy.destination != "cpu")
        assert up < sum(resident) + lots
    del ballast
