"""`auto` beside models that are not swapped: what ComfyUI is told stays true, whatever comes."""

import gc

import pytest
import torch

from conftest import COMPUTE, MIB
from rig import prompts, simulator, tiny_models

ledger = simulator.ledger
AUTO = f"{COMPUTE},auto;cpu,*"
CARD = 29
TINY = "tiny.safetensors"
# What is not weights, and still there between two prompts: tables of positions and the like.
BESIDE = MIB // 8


@pytest.fixture
def written(bench):
    """A text encoder, Gemma, of 2 MiB, a Flux of 30 and its ControlNet of 19, as files."""
    writers = {
        "text_encoders": lambda path: tiny_models.write_text(path, "Gemma"),
        "diffusion_models": lambda path: tiny_models.write_model(path, "Flux"),
        "controlnet": tiny_models.write_control,
    }
    paths = {folder: bench.host.base_dir / "models" / folder / TINY for folder in writers}
    with tiny_models.installed():
        for folder, path in paths.items():
            path.parent.mkdir(exist_ok=True)
            writers[folder](path)
        yield
    for path in paths.values():
        path.unlink()


@pytest.fixture
def neighbours(bench, card, written, monkeypatch):
    """What comes and goes on the compute device, by name."""
    monkeypatch.setattr(bench.mm, "text_encoder_device", lambda: torch.device(COMPUTE))
    card(CARD)
    clip = {"class_type": "CLIPLoader", "inputs": {"clip_name": TINY, "type": "lumina2"}}
    control = {"class_type": "ControlNetLoader", "inputs": {"control_net_name": TINY}}
    latents, held = bench.host.custom_module("probe").LATENTS, []

    def text_encoder():
        with monkeypatch.context() as patch:
            patch.setattr(bench.mm, "minimum_inference_memory", lambda: 8 * MIB)
            bench.host.run(tiny_models.encoding(clip))
        assert latents.pop("text").isfinite().all()

    def controlled():
        """As the sampler does it: the ControlNet is asked for together with the model."""
        net = bench.load(control)
        held[:] = [net]
        swapped = [m.model for m in bench.mm.current_loaded_models]
        patcher = next(iter(swapped), None) or bench.load(bench.distorch(AUTO))
        held.append(patcher)
        with torch.inference_mode():
            bench.mm.load_models_gpu(
                [patcher, *net.get_models()],
                memory_required=patcher.model.memory_required([1, 16, 2, 8, 8]),
            )
        assert bench.state(patcher).loaded
        for beside in net.get_models():  # whole, though `auto` held the card before
            assert beside.loaded_size() == beside.model_size()
        # In whatever order they were loaded: the ControlNet is not what a pass will take.
        state = bench.state(patcher)
        assert state.needs.others == ledger.allocated[COMPUTE] - state.compute_bytes()

    def plain():
        held[:] = [bench.load(bench.plain("other.safetensors"))]
        with torch.inference_mode():
            bench.mm.load_models_gpu(held)

    yield {"text encoder": text_encoder, "ControlNet": controlled, "plain model": plain}
    held.clear()
    bench.clear()
    gc.collect()


def check(bench):
    """What ComfyUI is told is what there is."""
    assert ledger.peak[COMPUTE] <= CARD * MIB
    device, told = torch.device(COMPUTE), 0
    for loaded in bench.mm.current_loaded_models:
        told += loaded.model_loaded_memory()
        if bench.module("model_lookup").is_swapped_here(loaded.model):
            state = bench.state(loaded.model)
            assert loaded.model_loaded_memory() == state.compute_bytes()
            required = loaded.model_memory_required(device)
            assert required == max(0, state.sizes.total_bytes - state.compute_bytes())
            assert loaded.model_memory() == 0  # of RAM: its homes are there
    assert told <= ledger.allocated[COMPUTE] <= told + BESIDE


SETTINGS = {
    "default": {},
    "disable-smart-memory": {"DISABLE_SMART_MEMORY": True},
    "reserve-vram": {"EXTRA_RESERVED_VRAM": 2 * MIB},
    "lowvram": {"vram_state": "LOW_VRAM"},
    "highvram": {"vram_state": "HIGH_VRAM"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_accounting_is_true_with_neighbours_in_between(
    bench, neighbours, reference, monkeypatch, setting
):
    for name, value in SETTINGS[setting].items():
        value = getattr(bench.mm.VRAMState, value) if name == "vram_state" else value
        monkeypatch.setattr(bench.mm, name, value)
    ledger.reset_peak()
    assert bench.sample(bench.distorch(AUTO), seed=1).equal(reference[1])
    for comes in neighbours.values():
        if setting == "disable-smart-memory":  # nothing outlives a prompt
            assert bench.mm.current_loaded_models == []
            bench.mm.load_models_gpu([patcher := bench.load(bench.distorch(AUTO))])
            check(bench)
            del patcher
        comes()
        check(bench)
        assert bench.sample(bench.distorch(AUTO), seed=2).equal(reference[2])
        check(bench)


def test_what_is_asked_of_the_host_is_what_the_load_takes(bench, neighbours, monkeypatch):
    """`free_memory` is asked for the whole model, and for what the pass needs; others make room."""
    bench.sample(bench.distorch(AUTO))
    bench.clear()
    neighbours["text encoder"]()
    asked, free_memory = [], bench.mm.free_memory

    def noted(memory_required, device, *args, **kwargs):
        asked.append((memory_required, str(device)))
        return free_memory(memory_required, device, *args, **kwargs)

    monkeypatch.setattr(bench.mm, "free_memory", noted)
    bench.sample(bench.distorch(AUTO))
    total = bench.state().sizes.total_bytes
    assert any(total <= nbytes < 2 * total and on == COMPUTE for nbytes, on in asked)
    assert [type(m.model.model).__name__ for m in bench.mm.current_loaded_models] == ["WAN21"]


def test_a_neighbour_takes_a_part_of_what_auto_holds(bench, neighbours):
    """`partially_unload` says what it gave, and the next load takes back what is free."""
    bench.sample(bench.distorch(AUTO))
    patcher, device = bench.loaded(), torch.device(COMPUTE)
    state = bench.state(patcher)
    held, free = state.compute_bytes(), bench.mm.get_free_memory(device)
    with torch.inference_mode():
        given = patcher.partially_unload(torch.device("cpu"), 3 * MIB)
    assert given >= 3 * MIB
    assert bench.mm.get_free_memory(device) - free == given == held - patcher.loaded_size()
    check(bench)
    bench.sample(bench.distorch(AUTO), seed=2)
    assert state.compute_bytes() >= held
    check(bench)


def test_a_control_net_has_its_room_in_a_real_prompt(bench, card, written):
    """Flux beside it: the same latent as unswapped, and both on the card when the next one runs."""
    control = {"class_type": "ControlNetLoader", "inputs": {"control_net_name": TINY}}
    latents = bench.host.custom_module("probe").LATENTS

    def sampled(loader, seed, *controls):
        bench.host.run(tiny_models.sampling("Flux", loader, seed, *controls))
        return latents.pop("out")

    card(200)
    plain = prompts.plain(TINY)
    alone, controlled = sampled(plain, 1), [sampled(plain, seed, control) for seed in (1, 2)]
    bench.clear()
    auto = bench.distorch(AUTO, unet_name=TINY)
    card(42)  # holds the model of 30, or the ControlNet of 19 and a part of the model
    for _ in range(2):
        assert sampled(auto, 1).equal(alone)
        assert sampled(auto, 2).isfinite().all()
    assert bench.state().split.bytes_per_pass == 0
    for seed, expected in enumerate(controlled, start=1):
        assert sampled(auto, seed, control).equal(expected)
        assert bench.state().split.bytes_per_pass > 0
        sizes = [(m.model.loaded_size(), m.model.model_size()) for m in beside_auto(bench)]
        assert sizes and all(loaded == whole for loaded, whole in sizes)
    bench.clear()


def beside_auto(bench):
    swapped = bench.module("model_lookup").is_swapped_here
    return [m for m in bench.mm.current_loaded_models if not swapped(m.model)]
