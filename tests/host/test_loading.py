"""Loading, accounting, unloading and patching on a real ComfyUI."""

import pytest
import torch

from conftest import COMPUTE, LAYERS
from rig import simulator
from rig.comfy_host import PromptError

ledger = simulator.ledger
SPLIT = "acc:0,12mb;acc:1,8mb;cpu,*"
FILES = ("wan", "other")


def tensors(model):
    """Copies of all tensors of a model, by name, on the CPU."""
    return {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def at_home(bench):
    """Whether every block of the swapped model lies where its split says."""
    state, model = bench.state(), bench.loaded().model.diffusion_model
    assert isinstance(model.blocks, torch.nn.ModuleList)
    return all(
        {str(t.device) for t in block.state_dict().values()} == {home}
        for block, home in zip(model.blocks, state.split.homes[:LAYERS], strict=True)
    )


def test_the_state_dict_is_the_files_while_loaded_and_afterwards(bench):
    patcher = bench.load(bench.distorch(SPLIT))
    before = tensors(patcher.model)
    bench.mm.load_models_gpu([patcher])
    assert same(tensors(patcher.model), before)
    patcher.detach()
    assert same(tensors(patcher.model), before)
    assert {t.device.type for t in patcher.model.state_dict().values()} == {"cpu"}


def test_saving_a_swapped_model_writes_the_files_weights(bench, tmp_path):
    import comfy.utils
    import safetensors.torch

    patcher = bench.load(bench.distorch(SPLIT))
    before = tensors(patcher.model.diffusion_model)
    bench.mm.load_models_gpu([patcher])
    saved = patcher.state_dict_for_saving()
    # Every weight may be asked for lazily; write what would be written.
    saved = {k: v.to("cpu").contiguous() for k, v in saved.items()}
    comfy.utils.save_torch_file(saved, str(tmp_path / "saved.safetensors"))
    written = safetensors.torch.load_file(tmp_path / "saved.safetensors")
    prefix = "model.diffusion_model."
    assert same({k.removeprefix(prefix): v for k, v in written.items()}, before)


def test_accounting_is_true_from_load_to_detach(bench):
    before = dict(ledger.allocated)
    patcher = bench.load(bench.distorch(SPLIT))
    loaded = bench.mm.LoadedModel(patcher)
    with torch.inference_mode():
        required = loaded.model_memory_required(patcher.load_device)
        assert patcher.loaded_size() == 0
        bench.mm.load_models_gpu([patcher])
    split = bench.state(patcher).split
    assert required == split.compute_bytes == patcher.loaded_size()
    assert ledger.allocated[COMPUTE] - before[COMPUTE] == split.compute_bytes
    assert loaded.model_memory_required(patcher.load_device) == 0
    assert patcher.current_loaded_device() == torch.device(COMPUTE)
    patcher.detach()
    assert patcher.loaded_size() == 0
    assert patcher.current_loaded_device() == torch.device("cpu")
    assert ledger.allocated == before
    assert loaded.model_memory_required(patcher.load_device) == split.compute_bytes


def test_what_is_asked_of_free_memory_is_the_splits_share(bench, monkeypatch):
    asked = []
    free_memory = bench.mm.free_memory

    def note(memory_required, device, *args, **kwargs):
        asked.append((memory_required, str(device)))
        return free_memory(memory_required, device, *args, **kwargs)

    patcher = bench.load(bench.distorch(SPLIT))
    monkeypatch.setattr(bench.mm, "free_memory", note)
    bench.mm.load_models_gpu([patcher])
    share = bench.state(patcher).split.compute_bytes
    headroom = bench.mm.minimum_inference_memory()
    assert asked[0] == (share * 1.1 + headroom, COMPUTE)
    asked.clear()
    bench.mm.load_models_gpu([patcher])
    assert asked[0] == (headroom, COMPUTE)


def test_a_load_goes_straight_to_place(bench):
    patcher = bench.load(bench.distorch(SPLIT))
    ledger.clear_copies()
    ledger.reset_peak()
    before = ledger.allocated[COMPUTE]
    bench.mm.load_models_gpu([patcher])
    split = bench.state(patcher).split
    assert ledger.peak[COMPUTE] - before <= split.compute_bytes
    # Up, once: what is resident; across, once: what other donors hold.
    for device in simulator.devices():
        slots = split.slots * split.slot_bytes if device == COMPUTE else 0
        assert ledger.bytes_moved("cpu", device) <= split.bytes_on(device) - slots
    assert ledger.bytes_moved(None, "cpu") == 0


def test_memory_is_given_back_slots_first_and_taken_again_at_the_next_load(bench, reference):
    expected = reference[2]
    loader = bench.distorch("acc:0,14mb;cpu,*")
    bench.sample(loader)
    patcher, split = bench.loaded(), bench.state().split
    resident = split.homes[:LAYERS].count(COMPUTE)
    assert resident > 2
    before = ledger.allocated[COMPUTE]
    slots = split.slots * split.slot_bytes

    freed = patcher.partially_unload(patcher.offload_device, 1)
    assert freed == slots == before - ledger.allocated[COMPUTE]
    assert patcher.loaded_size() == split.compute_bytes - slots

    freed = patcher.partially_unload(patcher.offload_device, split.slot_bytes + 1)
    assert freed == 2 * split.slot_bytes
    assert patcher.loaded_size() == split.compute_bytes - slots - freed

    # Between a prompt's load and its end this may happen too: the model still runs.
    model = patcher.model.diffusion_model
    x = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0)).to(COMPUTE)
    context = torch.randn(1, 16, 4096, generator=torch.Generator().manual_seed(0)).to(COMPUTE)
    t = torch.full((1,), 500.0).to(COMPUTE)
    dtype = patcher.model.get_dtype_inference()
    with torch.inference_mode():
        partly = model(x.to(dtype), t, context.to(dtype)).cpu()

    assert torch.equal(bench.sample(loader, seed=2), expected)
    assert patcher.loaded_size() == split.compute_bytes
    assert bench.state().split is split
    assert at_home(bench)
    with torch.inference_mode():
        assert torch.equal(model(x.to(dtype), t, context.to(dtype)).cpu(), partly)


def test_asked_for_everything_the_host_unloads_the_model_whole(bench, reference):
    loader = bench.distorch(SPLIT)
    bench.sample(loader)
    bench.mm.free_memory(1e30, torch.device(COMPUTE))
    assert not bench.mm.current_loaded_models
    assert ledger.allocated["acc:1"] == 0
    assert torch.equal(bench.sample(loader, seed=2), reference[2])


@pytest.mark.parametrize("strengths", [(1.0,), (1.0, 0.5, 0.0), (0.0, 0.7)])
def test_loras_added_changed_and_removed(bench, reference, strengths):
    expected, latents = [], []
    for strength in strengths:
        expected.append(bench.sample(bench.lora(bench.plain(), strength)))
    bench.clear()
    for strength in strengths:
        latents.append(bench.sample(bench.lora(bench.distorch(SPLIT), strength)))
    for latent, host in zip(latents, expected, strict=True):
        assert torch.equal(latent, host)
    assert torch.equal(bench.sample(bench.distorch(SPLIT)), reference[1])
    patcher = bench.loaded()
    assert patcher.backup == {}
    assert at_home(bench)


def test_a_patched_model_comes_back_bit_for_bit(bench):
    bench.sample(bench.lora(bench.distorch(SPLIT), 1.0))
    patcher = bench.loaded()
    fresh = bench.load(bench.plain())
    assert not same(tensors(patcher.model), tensors(fresh.model))
    patched = sum(backup.weight.nbytes for backup in patcher.backup.values())
    lora_keys = 8 * LAYERS
    assert 0 < patched <= lora_keys * max(t.nbytes for t in patcher.model.state_dict().values())
    patcher.detach()
    assert same(tensors(patcher.model), tensors(fresh.model))


@pytest.mark.parametrize("kind", ["error", "interrupt", "out of memory"])
def test_an_exception_inside_block_5_leaves_everything_at_home(bench, reference, kind):
    loader = bench.distorch(SPLIT)
    expected = [reference[seed] for seed in (1, 2)]
    assert torch.equal(bench.sample(loader, 1), expected[0])
    errors = {
        "error": RuntimeError("broken"),
        "interrupt": bench.mm.InterruptProcessingException(),
        "out of memory": torch.OutOfMemoryError("simulated"),
    }
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise errors[kind]

    model = bench.loaded().model.diffusion_model
    handle = model.blocks[5].register_forward_pre_hook(fail)
    try:
        with pytest.raises(PromptError) as caught:
            bench.sample(loader, 2)
    finally:
        handle.remove()
    assert caught.value.node_id == "23"
    if kind != "out of memory":  # after which ComfyUI lets every model go
        assert at_home(bench)
    assert torch.equal(bench.sample(loader, 2), expected[1])
    assert at_home(bench)


def test_with_dynamic_vram_a_distorch2_load_gives_a_plain_patcher(bench, reference, monkeypatch):
    import comfy.memory_management
    import comfy.model_patcher

    expected = reference[1]
    dynamic = comfy.model_patcher.ModelPatcherDynamic
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", dynamic)
    assert torch.equal(bench.sample(bench.distorch(SPLIT)), expected)
    patcher = bench.loaded()
    assert type(patcher) is comfy.model_patcher.ModelPatcher
    assert bench.state().split.homes.count("acc:1") > 0
    assert ledger.allocated["acc:1"] == bench.state().split.bytes_on("acc:1")
    assert comfy.model_patcher.CoreModelPatcher is dynamic


@pytest.mark.parametrize(
    ("node", "inner"),
    [
        ("UNETLoaderDisTorch2MultiGPU", "load_unet"),
        ("VAELoaderDisTorch2MultiGPU", "load_vae"),
        ("CLIPLoaderDisTorch2MultiGPU", "load_clip"),
        ("DualCLIPLoaderDisTorch2MultiGPU", "load_clip"),
        ("CLIPVisionLoaderDisTorch2MultiGPU", "load_clip"),
        ("ControlNetLoaderDisTorch2MultiGPU", "load_controlnet"),
        ("CheckpointLoaderSimpleDisTorch2MultiGPU", "load_checkpoint"),
    ],
)
def test_every_distorch2_loader_bypasses_dynamic_vram(bench, monkeypatch, node, inner):
    import comfy.memory_management
    import comfy.model_patcher

    seen = []
    original = bench.host.nodes[node].__mro__[1]
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(
        comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic
    )

    def load(self, *args, **kwargs):
        aimdo = comfy.memory_management.aimdo_enabled
        seen.append((comfy.model_patcher.CoreModelPatcher.__name__, aimdo))
        return (object(),)

    monkeypatch.setattr(original, inner, load)
    instance = bench.host.nodes[node]()
    getattr(instance, instance.FUNCTION)()
    assert seen == [("ModelPatcher", False)]
    assert comfy.memory_management.aimdo_enabled is True
    assert comfy.model_patcher.CoreModelPatcher is comfy.model_patcher.ModelPatcherDynamic

    def fail(self, *args, **kwargs):
        raise FileNotFoundError("gone")

    monkeypatch.setattr(original, inner, fail)
    with pytest.raises(FileNotFoundError):
        getattr(instance, instance.FUNCTION)()
    assert comfy.memory_management.aimdo_enabled is True


def test_a_model_without_blocks_goes_to_multigpus_own_path(bench, no_blocks):
    lookup = bench.module("model_lookup")
    bench.allocate(no_blocks, "acc:0,40%;acc:1,60%#acc:0")
    assert not lookup.is_swapped_here(no_blocks)
    no_blocks.partially_load(torch.device(COMPUTE))
    assert not hasattr(no_blocks.model, lookup.STATE)
    assert {str(p.device) for p in no_blocks.model.parameters()} == {"acc:0", "acc:1"}


# --------------------------------------------------------------- homes of what is resident


@pytest.fixture
def ram(bench, monkeypatch):
    """Sets how much RAM there is, in bytes: `ram(available, total)`."""

    def ram(available, total):
        monkeypatch.setattr(bench.module("device_utils"), "ram", lambda: (available, total))

    return ram


def copies_of(direction, nbytes=20_000):
    """The copies up to the compute device, or down from it, that are larger than a latent."""
    up = direction == "up"
    large = [copy for copy in ledger.copies if copy.nbytes > nbytes]
    return sum(c.nbytes for c in large if (c.destination if up else c.source) == COMPUTE)


def test_with_homes_in_ram_unloading_is_free_and_loading_moves_what_is_resident(bench, ram):
    ram(1 << 40, 1 << 41)
    patcher = bench.load(bench.distorch(SPLIT))
    with torch.inference_mode():
        bench.mm.load_models_gpu([patcher])
    before, state = tensors(patcher.model), bench.state(patcher)
    split = state.split
    resident = split.compute_bytes - split.slots * split.slot_bytes
    beside = split.sizes.non_block_bytes - state.layout.non_block.nbytes
    assert sum(pack.home_bytes for pack in state.all_packs()) == resident - beside
    ledger.clear_copies()
    with torch.inference_mode():
        bench.mm.free_memory(1 << 20, torch.device(COMPUTE))
        bench.mm.current_loaded_models.clear()
        patcher.partially_unload(patcher.offload_device, 1 << 40)
        patcher.unpatch_model(patcher.offload_device)
    assert copies_of("down") == 0
    assert ledger.allocated[COMPUTE] < 20_000
    assert same(tensors(patcher.model), before)
    ledger.clear_copies()
    with torch.inference_mode():
        bench.mm.load_models_gpu([patcher])
    assert 0 <= copies_of("up") - (resident - beside) < 20_000
    assert same(tensors(patcher.model), before)


def test_patches_reach_homes_too(bench, ram, reference):
    ram(1 << 40, 1 << 41)
    plain = bench.sample(bench.lora(bench.plain(), 0.8))
    bench.clear()
    swapped = bench.lora(bench.distorch(SPLIT), 0.8)
    assert torch.equal(bench.sample(swapped), plain)
    patcher, state = bench.loaded(), bench.state()
    assert sum(pack.home_bytes for pack in state.all_packs()) > 0
    # What is resident goes home while the LoRA is applied, and the model runs on.
    ledger.clear_copies()
    patcher.partially_unload(patcher.offload_device, 1 << 40)
    assert copies_of("down") == 0
    assert torch.equal(bench.sample(swapped, seed=1, steps=2), plain)
    assert torch.equal(bench.sample(bench.distorch(SPLIT)), reference[1])


def test_homes_are_let_go_where_ram_is_short(bench, ram, reference):
    ram(1 << 20, 1 << 30)
    assert torch.equal(bench.sample(bench.distorch(SPLIT)), reference[1])
    assert sum(pack.home_bytes for pack in bench.state().all_packs()) == 0
    bench.clear()
    ram(1 << 40, 1 << 41)
    bench.sample(bench.distorch(SPLIT))
    state = bench.state()
    assert sum(pack.home_bytes for pack in state.all_packs()) > 0
    bench.module("model_lookup").forget_homes(bench.loaded())
    assert sum(pack.home_bytes for pack in state.all_packs()) == 0
    assert torch.equal(bench.sample(bench.distorch(SPLIT), 2), reference[2])


def test_the_rule_for_homes(bench):
    has_room = bench.module("swapped_model").has_room_for_homes
    assert has_room(10, available=30, total=100)
    assert not has_room(11, available=30, total=100)


def test_two_experts_take_turns_for_one_upload_of_what_is_resident(bench, ram, monkeypatch):
    ram(1 << 40, 1 << 41)
    loaders = [bench.distorch("acc:0,9mb;cpu,*", unet_name=f"{n}.safetensors") for n in FILES]
    patchers = [bench.load(loader) for loader in loaders]
    host_free = bench.mm.get_free_memory
    room = 9 * (1 << 20) + bench.mm.minimum_inference_memory()

    def get_free_memory(dev=None, torch_free_too=False):
        dev = bench.mm.get_torch_device() if dev is None else dev
        if str(dev) != COMPUTE:
            return host_free(dev, torch_free_too)
        left = room - ledger.allocated[COMPUTE]
        return (left, 0) if torch_free_too else left

    monkeypatch.setattr(bench.mm, "get_free_memory", get_free_memory)
    with torch.inference_mode():
        for patcher in patchers:
            bench.mm.load_models_gpu([patcher])
        for patcher in [*patchers, *patchers]:
            ledger.clear_copies()
            bench.mm.load_models_gpu([patcher])
            state = bench.state(patcher)
            homes = sum(pack.home_bytes for pack in state.all_packs())
            assert homes > 0
            assert copies_of("down") == 0
            assert 0 < copies_of("up") <= homes + 20_000
    del patchers


def test_homes_that_are_there_take_no_further_ram(bench, ram, monkeypatch):
    """A reload is not charged again for what is in RAM already."""
    ram(1 << 40, 1 << 41)
    patcher = bench.load(bench.distorch(SPLIT))
    with torch.inference_mode():
        bench.mm.load_models_gpu([patcher])
        bench.clear()
        ram(1 << 20, 1 << 21)  # half is available, less than the model takes
        bench.mm.load_models_gpu([patcher])
    assert sum(pack.home_bytes for pack in bench.state(patcher).all_packs()) > 0


def test_a_loader_in_short_ram_frees_homes(bench, monkeypatch):
    patcher = bench.load(bench.distorch(SPLIT))
    with torch.inference_mode():
        bench.mm.load_models_gpu([patcher])
    state = bench.state(patcher)
    assert sum(pack.home_bytes for pack in state.all_packs()) > 0
    monkeypatch.setattr(bench.plugin._memory.watch, "is_short", lambda: True)
    bench.load(bench.distorch(SPLIT, unet_name="other.safetensors"))
    assert sum(pack.home_bytes for pack in state.all_packs()) == 0
