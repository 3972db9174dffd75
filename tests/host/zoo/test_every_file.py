"""Files of many kinds, small, through the host's own loader nodes and those of MultiGPU."""

import pytest
import torch

from rig import prompts, tiny_models

pytestmark = pytest.mark.usefixtures("static_split")

FILE = "tiny.safetensors"
STRINGS = ("acc:0,50%;cpu,50%", "acc:0,30%;acc:1,20%;cpu,*", "cpu,*")


@pytest.fixture(autouse=True)
def understood(bench):
    """ComfyUI knows what the files leave out."""
    with tiny_models.installed():
        yield


@pytest.fixture
def written(bench):
    """Writes a file into a folder of models, for this test."""
    paths = []

    def write(folder, writer, *args):
        path = bench.host.base_dir / "models" / folder / FILE
        path.parent.mkdir(exist_ok=True)
        paths.append(path)
        return writer(path, *args)

    yield write
    for path in paths:
        path.unlink(missing_ok=True)


def kept(bench, prompt, key):
    bench.host.run(prompt)
    return bench.host.custom_module("probe").LATENTS.pop(key)


@pytest.fixture
def assert_swapped(bench, monkeypatch):
    """Runs with a DisTorch2 loader give what is expected, and keep to their split.

    ``run(n)`` runs the prompt with the n-th inputs, ``expected`` are two outputs.
    """
    states = []
    swapped_model = bench.module("swapped_model").SwappedModel
    load = swapped_model.load

    def loaded(state, model):
        states.append(state)
        load(state, model)

    monkeypatch.setattr(swapped_model, "load", loaded)

    def assert_swapped(run, expected):
        assert torch.equal(run(0), expected[0])
        assert torch.equal(run(1), expected[1])  # with what the first has shown never to run
        state = states[-1]
        split, swap = state.split, state.swap
        assert any(home != split.compute_device for home in split.homes)
        floor = split.sizes.non_block_bytes + split.slots * split.slot_bytes
        for quota in split.quotas:
            least = floor if quota.device == split.compute_device else 0
            assert quota.wildcard or split.bytes_on(quota.device) <= max(quota.nbytes, least)
        fills, passes, fill, opened = [], [], swap._fill, swap._open
        swap._fill = lambda slot, index: fills.append(index) or fill(slot, index)
        swap._open = lambda entry, shape: passes.append(entry) or opened(entry, shape)
        assert torch.equal(run(0), expected[0])
        assert states[-1] is state and state.split is split
        assert state.compute_bytes() <= split.compute_bytes
        travels = set(split.swapped) - swap.idle
        assert passes and set(fills) == travels
        assert all(fills.count(index) <= len(passes) for index in travels)
        states.clear()
        bench.clear()

    return assert_swapped


def clip(kind, distorch=None):
    """A loader of a text encoder: ComfyUI's, or MultiGPU's with an allocation."""
    node = {"class_type": "CLIPLoader", "inputs": {"clip_name": FILE, "type": kind}}
    return node if distorch is None else _distorch(node, "device", distorch)


def control(distorch=None):
    """A loader of a ControlNet: ComfyUI's, or MultiGPU's with an allocation."""
    node = {"class_type": "ControlNetLoader", "inputs": {"control_net_name": FILE}}
    return node if distorch is None else _distorch(node, "compute_device", distorch)


def _distorch(node, device, text):
    inputs = {
        **node["inputs"],
        device: "acc:0",
        "virtual_vram_gb": 0.0,
        "donor_device": "cpu",
        "expert_mode_allocations": text,
        "eject_models": False,
    }
    return {"class_type": f"{node['class_type']}DisTorch2MultiGPU", "inputs": inputs}


def assert_loaded(model, weights):
    """A model has exactly the weights of a file."""
    found = model.state_dict()
    assert set(weights) <= set(found)
    for name, weight in weights.items():
        assert torch.equal(found[name].cpu().to(weight.dtype), weight), name


@pytest.mark.parametrize("key", tiny_models.MODELS)
def test_a_model_samples(bench, written, assert_swapped, key):
    weights = written("diffusion_models", tiny_models.write_model, key)
    patcher = bench.load(prompts.plain(FILE))
    model = patcher.model.diffusion_model
    assert f"{type(model).__module__}.{type(model).__name__}" == tiny_models.MODELS[key].cls
    assert_loaded(model, weights)
    assert set(model.state_dict()) == set(weights)
    del patcher, model
    latent = kept(bench, tiny_models.sampling(key, prompts.plain(FILE)), "out")
    assert latent.isfinite().all()
    bench.clear()
    again = kept(bench, tiny_models.sampling(key, prompts.plain(FILE)), "out")
    assert torch.equal(latent, again)
    bench.clear()
    expected = [latent, kept(bench, tiny_models.sampling(key, prompts.plain(FILE), 2), "out")]
    assert not torch.equal(*expected)
    bench.clear()
    for text in STRINGS:
        loader = prompts.distorch(FILE, text)
        seeds = [tiny_models.sampling(key, loader, seed) for seed in (1, 2)]
        assert_swapped(lambda n, seeds=seeds: kept(bench, seeds[n], "out"), expected)


@pytest.mark.parametrize("key", tiny_models.TEXTS)
def test_a_text_encoder_encodes(bench, written, assert_swapped, key):
    weights = written("text_encoders", tiny_models.write_text, key)
    kind = tiny_models.TEXTS[key].kind
    loaded = bench.load(clip(kind))
    transformer = getattr(loaded.cond_stage_model, loaded.cond_stage_model.clip).transformer
    assert type(transformer).__name__ == tiny_models.TEXTS[key].cls.rpartition(".")[2]
    assert_loaded(transformer, weights)
    del loaded, transformer
    text = kept(bench, tiny_models.encoding(clip(kind)), "text")
    assert text.isfinite().all()
    bench.clear()
    assert torch.equal(kept(bench, tiny_models.encoding(clip(kind)), "text"), text)
    bench.clear()
    other = kept(bench, tiny_models.encoding(clip(kind), "the dog runs to a tree"), "text")
    assert other.shape != text.shape or not torch.equal(other, text)
    bench.clear()
    for string in STRINGS:
        loader = clip(kind, string)
        words = [
            tiny_models.encoding(loader),
            tiny_models.encoding(loader, "the dog runs to a tree"),
        ]
        assert_swapped(lambda n, words=words: kept(bench, words[n], "text"), [text, other])


def test_a_control_net_controls(bench, written, assert_swapped):
    written("diffusion_models", tiny_models.write_model, "Flux")
    weights = written("controlnet", tiny_models.write_control)

    assert_loaded(bench.load(control()).control_model, weights)

    def sample(*loaders, seed=1, clear=True):
        if clear:
            bench.clear()
        loader = prompts.plain(FILE)
        return kept(bench, tiny_models.sampling("Flux", loader, seed, *loaders), "out")

    controlled = sample(control())
    assert controlled.isfinite().all()
    assert torch.equal(sample(control()), controlled)
    assert not torch.equal(sample(), controlled)
    expected = [controlled, sample(control(), seed=2)]
    for text in STRINGS:
        bench.clear()
        net = control(text)
        assert_swapped(lambda n, net=net: sample(net, seed=1 + n, clear=False), expected)


@pytest.mark.parametrize(("key", "mebibytes"), [("UMT5", 71), ("Qwen2.5-VL", 3), ("Gemma", 1.9)])
def test_auto_has_room_for_a_text_encoder(bench, written, card, key, mebibytes):
    """Nobody knows yet what an encode needs: a pass that fails gives blocks back."""
    written("text_encoders", tiny_models.write_text, key)
    kind = tiny_models.TEXTS[key].kind
    expected = kept(bench, tiny_models.encoding(clip(kind)), "text")
    bench.clear()
    card(mebibytes)
    prompt = tiny_models.encoding(clip(kind, "acc:0,auto;cpu,*"))
    assert torch.equal(kept(bench, prompt, "text"), expected)
    split = bench.state().split
    assert split.compute_bytes < split.sizes.total_bytes
    assert split.homes[-1] == "cpu"
