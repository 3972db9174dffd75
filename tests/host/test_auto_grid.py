"""`auto` on cards of 8 to 24 "GB", beside a model of 27, for videos of three lengths.

One GB is a MiB here. A sample runs by default; with THOROUGH=1 (`make auto`) every cell does, and
200 prompts instead of 24.
"""

import gc
import os
import random
from itertools import product

import pytest
import torch

from conftest import COMPUTE, MIB, RESERVED
from rig import comfy_host, prompts, simulator, tiny_models, tiny_wan

ledger = simulator.ledger
AUTO = f"{COMPUTE},auto;cpu,*"
MODEL, TEXT = "wan14.safetensors", "gemma.safetensors"
LAYERS = 16
THOROUGH = bool(os.environ.get("THOROUGH"))

CARDS = (8, 12, 16, 24)
VIDEOS = {"short": (64, 64, 5), "medium": (128, 128, 25), "long": (128, 128, 33)}
NEIGHBOURS = ("nothing", "a kept model", "a text encoder")
QUOTAS = (2, 4, 6, 9, 13, 19)


def sample_of(cells, number):
    cells = list(cells)
    return cells if THOROUGH else random.Random(2).sample(cells, number)


def latent_node(size):
    inputs = dict(zip(("width", "height", "length"), size, strict=True))
    return {**prompts.EMPTY_LATENT, "inputs": {**inputs, "batch_size": 1}}


@pytest.fixture(scope="module")
def model(bench):
    """The model of 27 "GB" and a text encoder, as files."""
    models = bench.host.base_dir / "models"
    (models / "text_encoders").mkdir(exist_ok=True)
    tiny_wan.write_wan(models / "diffusion_models" / MODEL, layers=LAYERS)
    with tiny_models.installed():
        tiny_models.write_text(models / "text_encoders" / TEXT, "Gemma")
        yield
    (models / "diffusion_models" / MODEL).unlink()
    (models / "text_encoders" / TEXT).unlink()


def sample(bench, loader, video, seed=1, steps=1, beside=None):
    nodes = prompts.guided({"1": loader, **(beside or {})}, "1", seed, steps)
    nodes["22"] = latent_node(video)
    bench.host.run(nodes)
    return bench.host.custom_module("probe").LATENTS.pop("out")


@pytest.fixture(scope="module")
def known(bench, model):
    """Of every video: the latents by seed, and what a pass takes beside the weights, in bytes."""
    seen = bench.module("host_memory").pass_memory
    known = {}
    for name, video in VIDEOS.items():
        latents = {seed: sample(bench, bench.plain(MODEL), video, seed) for seed in (1, 2)}
        bench.clear()
        seen.__init__()
        sample(bench, bench.distorch(f"{COMPUTE},1mb;cpu,*", unet_name=MODEL), video)
        known[name] = latents, max(seen._peaks.values())
        bench.clear()
    seen.__init__()
    return known


@pytest.fixture
def comes_first(bench, monkeypatch):
    """What runs before each prompt, by name, and takes room on the card."""
    monkeypatch.setattr(bench.mm, "text_encoder_device", lambda: torch.device(COMPUTE))
    clip = {"class_type": "CLIPLoader", "inputs": {"clip_name": TEXT, "type": "lumina2"}}
    words = iter(("a cat", "the dog", "red"))
    kept = bench.distorch(f"{COMPUTE},4mb;cpu,*", unet_name="other.safetensors", keep_loaded=True)

    def text_encoder():
        bench.host.run(tiny_models.encoding(clip, next(words)))

    def kept_model():
        patcher = bench.load(kept)
        with torch.inference_mode():
            bench.mm.load_models_gpu([patcher])

    return {
        "nothing": lambda: None,
        "a kept model": kept_model,
        "a text encoder": text_encoder,
    }


@pytest.fixture(scope="module")
def floor(bench, model):
    """The least of the model that any split has on the compute device, in bytes."""
    state = planned(bench, bench.distorch(AUTO, unet_name=MODEL))
    return state.choice.plan(state.split.allocation, 0).compute_bytes


def planned(bench, loader):
    """The state of a model that is not loaded yet."""
    return bench.module("host_memory").state_of(bench.load(loader))


@pytest.mark.parametrize(
    ("gigabytes", "video", "neighbour"), sample_of(product(CARDS, VIDEOS, NEIGHBOURS), 10)
)
def test_every_card_is_full_and_never_over(
    bench, card, known, floor, comes_first, gigabytes, video, neighbour
):
    latents, need = known[video]
    card(gigabytes)
    loader = bench.distorch(AUTO, unet_name=MODEL)
    if floor + need > gigabytes * MIB:  # no split could run
        with pytest.raises(comfy_host.PromptError):
            sample(bench, loader, VIDEOS[video])
        return
    for seed in (1, 2):
        comes_first[neighbour]()
        ledger.reset_peak()
        assert sample(bench, loader, VIDEOS[video], seed).equal(latents[seed])
        assert ledger.peak[COMPUTE] <= gigabytes * MIB
    state = bench.state()
    may = min(gigabytes * MIB - 1.03 * need - RESERVED, state.sizes.total_bytes)
    assert state.split.compute_bytes >= max(floor, 0.95 * may - state.sizes.largest_block)


@pytest.mark.parametrize(
    ("gigabytes", "video", "quota"), sample_of(product(CARDS, VIDEOS, QUOTAS), 10)
)
def test_a_typed_quota_is_warned_of_exactly_where_it_leaves_too_little(
    bench, card, known, log, static_split, gigabytes, video, quota
):
    """And where it is not, the prompt runs."""
    _, need = known[video]
    width, height, length = VIDEOS[video]
    latent = (1, 16, (length - 1) // 4 + 1, height // 8, width // 8)
    kind = bench.module("pass_memory").PassKind.of("WanModel", torch.bfloat16, latent)
    bench.module("host_memory").pass_memory.learn(kind, need)
    loader = bench.distorch(f"{COMPUTE},{quota}mb;cpu,*", unet_name=MODEL)
    weights = planned(bench, loader).split.compute_bytes
    card(gigabytes)
    failed = False
    try:
        sample(bench, loader, VIDEOS[video])
    except comfy_host.PromptError as error:
        failed = True
        assert "OutOfMemoryError" in error.exception_type
    told = log("too little of it")
    assert bool(told) == (weights > gigabytes * MIB - 1.03 * need - RESERVED)
    assert told or not failed


def test_prompts_of_random_sizes_models_and_cards(bench, card, log):
    """Whatever comes, it runs, is right, moves nothing to and fro, and leaves nothing behind."""
    rng = random.Random(5)
    files = ("wan.safetensors", "other.safetensors")
    sizes = ((64, 64, 5), (64, 128, 9), (128, 128, 17))
    card(64)
    plain = {file: bench.plain(file) for file in files}
    cases = list(product(files, sizes, (1, 2, 3)))
    expected = {case: sample(bench, plain[case[0]], *case[1:]) for case in cases}
    bench.clear()
    before, seen = None, set()
    for n in range(200 if THOROUGH else 24):
        if before is None or rng.random() < 0.6:
            mebibytes, file, size = rng.choice((12, 14, 16, 20)), *rng.choice(cases)[:2]
        if ledger.allocated[COMPUTE] < mebibytes * MIB:  # nobody can take what is in use
            card(mebibytes)
        seed, failed = n % 3 + 1, len(log("out of memory in a pass"))
        out = sample(bench, bench.distorch(AUTO, unet_name=file), size, seed)
        assert out.equal(expected[file, size, seed]), n
        split, case = bench.state().split, (ledger.capacity[COMPUTE], file, size)
        if before is not None and before[0] == case and size in seen:
            assert split.homes == before[1], n
        if size in seen:  # it was learnt
            assert len(log("out of memory in a pass")) == failed, n
        before = (case, split.homes) if size in seen else None
        seen.add(size)
    bench.clear()
    gc.collect()
    assert set(ledger.allocated.values()) == {0}
