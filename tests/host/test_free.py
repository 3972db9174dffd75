"""Free, keep, eject in process: flags, retention, the four cases of unload_all_models."""

import gc
import inspect
import types
from collections import Counter

import pytest
import torch

from conftest import COMPUTE
from rig import prompts, simulator

ledger = simulator.ledger
SPLIT = "acc:0,12mb;acc:1,8mb;cpu,*"


@pytest.fixture
def management(bench):
    return bench.module("model_management_mgpu")


@pytest.fixture(autouse=True)
def _frees_when_told(bench):
    if bench.multigpu <= (2, 5, 0):
        pytest.skip("this MultiGPU keeps by default, and frees everything after a load that is not")


@pytest.fixture
def retention(bench):
    retention = bench.plugin._memory.retention
    retention.let_go_all("a test begins")
    yield retention
    retention.let_go_all("a test ends")


@pytest.fixture
def reads(bench, monkeypatch):
    """Model files that were read, by name."""
    import comfy.utils

    seen = []
    load = comfy.utils.load_torch_file

    def note(ckpt, *args, **kwargs):
        seen.append(str(ckpt).rsplit("/", 1)[-1])
        return load(ckpt, *args, **kwargs)

    monkeypatch.setattr(comfy.utils, "load_torch_file", note)
    return seen


def free(bench, unload_models=True, free_memory=True):
    """Free as the buttons do, in one turn of the worker that leaves nothing for the next."""
    bench.host.free(unload_models, free_memory)
    assert bench.host.server.prompt_queue.get_flags(reset=False) == {}


def classes(bench):
    return [type(loaded.model.model).__name__ for loaded in bench.mm.current_loaded_models]


def test_every_distorch2_loader_has_the_switch_as_its_last_input(bench):
    for name, node in bench.host.nodes.items():
        if "DisTorch" not in name or "GGUF" in name:
            continue
        optional = node.INPUT_TYPES()["optional"]
        assert list(optional)[-1] == "keep_loaded", name
        assert optional["keep_loaded"][0] == "BOOLEAN"
        assert optional["keep_loaded"][1]["default"] is False


@pytest.mark.parametrize("keep", [False, True])
def test_a_load_flags_its_model(bench, retention, keep):
    bench.sample(bench.distorch(SPLIT, keep_loaded=keep))
    assert bench.loaded().model._mgpu_unload_distorch_model is not keep
    assert len(retention) == keep


def test_free_ejects_the_flagged_model_from_every_device(bench, reference, retention, reads):
    expected = reference[2]
    before = dict(ledger.allocated)
    bench.sample(bench.distorch(SPLIT), 1)
    reads.clear()
    free(bench, free_memory=False)
    assert bench.mm.current_loaded_models == []
    assert ledger.allocated == before
    assert torch.equal(bench.sample(bench.distorch(SPLIT), 2), expected)
    assert reads == ["wan.safetensors"]


@pytest.mark.usefixtures("static_split")
def test_free_leaves_a_kept_model_exactly_where_it_was(bench, reference, retention, reads):
    expected = reference[2]
    keep = bench.distorch(SPLIT, keep_loaded=True)
    bench.sample(keep, 1)
    before, models = dict(ledger.allocated), bench.mm.current_loaded_models
    model, held = bench.loaded().model, list(models)
    reads.clear()
    ledger.clear_copies()
    free(bench)
    assert bench.mm.current_loaded_models is models
    assert [loaded is other for loaded, other in zip(models, held, strict=True)] == [True]
    assert ledger.allocated["acc:1"] == before["acc:1"]
    assert 0 <= before[COMPUTE] - ledger.allocated[COMPUTE] < 20_000  # the latent
    assert torch.equal(bench.sample(keep, 2), expected)
    assert bench.loaded().model is model
    assert reads == []
    split = bench.state().split
    # Nothing but the swapped blocks of four passes went up.
    block = split.slot_bytes
    assert sum(c.nbytes == block for c in ledger.copies) == 4 * len(split.swapped)


def test_free_parts_the_kept_from_the_flagged(bench, retention, reads):
    keep = bench.distorch("acc:0,8mb;cpu,*", keep_loaded=True)
    bench.sample({"1": keep})
    kept = bench.loaded().model
    bench.sample({"2": bench.distorch("acc:0,8mb;cpu,*", unet_name="other.safetensors")})
    assert len(bench.mm.current_loaded_models) == 2
    free(bench)
    assert [loaded.model.model for loaded in bench.mm.current_loaded_models] == [kept]


def test_a_model_of_another_loader_is_kept_beside_distorch2_models(bench, retention, reads):
    prompt = {
        **prompts.guided({"1": bench.plain("other.safetensors")}, "1", 1, 2),
        "2": bench.distorch("acc:0,8mb;cpu,*"),
        "33": prompts.sampler("2", "20", "21", "22", 1, 2, cfg=5.0),
        "34": prompts.probe("33", "swapped"),
    }
    bench.host.run(prompt)
    assert len(bench.mm.current_loaded_models) == 2
    reads.clear()
    bench.host.free(unload_models=True)
    (loaded,) = bench.mm.current_loaded_models
    assert not hasattr(loaded.model.model, "_distorch_v2_meta")
    del loaded
    prompt["23"]["inputs"]["seed"] = prompt["33"]["inputs"]["seed"] = 2
    bench.host.run(prompt)
    assert reads == ["wan.safetensors"]  # and not the other


def test_without_distorch2_models_free_is_comfyuis(bench, retention):
    bench.sample(bench.plain())
    free(bench)
    assert bench.mm.current_loaded_models == []


def test_eject_models_does_not_override_keep(bench, retention):
    bench.sample(bench.distorch(SPLIT, keep_loaded=True))
    kept = bench.loaded().model
    bench.sample(bench.plain("other.safetensors"))
    other = bench.mm.current_loaded_models[0].model.model
    bench.load(bench.distorch(SPLIT, eject_models=True, unet_name="other.safetensors"))
    assert other._mgpu_unload_distorch_model is True
    assert kept._mgpu_unload_distorch_model is False
    free(bench)
    assert [loaded.model.model for loaded in bench.mm.current_loaded_models] == [kept]


def test_a_changed_string_plans_the_kept_model_anew(bench, reference, retention, reads):
    expected = reference[2]
    bench.sample(bench.distorch(SPLIT, keep_loaded=True), 1)
    model = bench.loaded().model
    reads.clear()
    changed = bench.distorch("acc:0,8mb;cpu,*", keep_loaded=True)
    assert torch.equal(bench.sample(changed, 2), expected)
    assert bench.loaded().model is model
    assert reads == []
    assert bench.state().split.homes[:8] == ("cpu",) * 8
    assert ledger.allocated["acc:1"] == 0
    assert bench.loaded().loaded_size() == bench.state().split.compute_bytes
    assert len(retention) == 1


def test_planning_anew_changes_slots_alone_and_never_exceeds_either_split(bench, retention):
    def sample(text):
        bench.sample(bench.distorch(text, keep_loaded=True))
        return bench.state().split

    before = ledger.allocated[COMPUTE]
    first, second = sample("acc:0,8mb;cpu,*"), sample("cpu,*")
    assert first.homes == second.homes
    assert (first.slots, second.slots) == (3, 2)
    assert 0 <= ledger.allocated[COMPUTE] - before - second.compute_bytes < 20_000
    ledger.reset_peak()
    patcher = bench.loaded()
    patcher.model._distorch_v2_meta = {"full_allocation": "acc:0,14mb;cpu,*#acc:0"}
    bench.module("model_lookup").follow_allocation(patcher)
    bench.mm.load_models_gpu([patcher])
    assert ledger.peak[COMPUTE] - before <= bench.state().split.compute_bytes + 20_000


def test_virtual_vram_inputs_are_stored_as_multigpu_stores_them(bench, retention):
    stored_allocations = bench.module("retention").stored_allocations
    for inputs in (
        {"text": SPLIT, "virtual_vram": 0.0},
        {"text": "", "virtual_vram": 0.005},
        {"text": SPLIT, "virtual_vram": 2.0, "donor": "acc:1"},
    ):
        loader = bench.distorch(**inputs)
        patcher = bench.load(loader)
        stored = patcher.model._distorch_v2_meta["full_allocation"]
        assert stored_allocations(loader["inputs"]) == {0: stored}


def test_a_switch_turned_off_hands_the_model_back_and_lets_it_go(bench, retention, reads):
    bench.sample(bench.distorch(SPLIT, keep_loaded=True))
    reads.clear()
    bench.sample(bench.distorch(SPLIT, keep_loaded=False), 2)
    assert reads == []
    assert len(retention) == 0
    free(bench)
    assert bench.mm.current_loaded_models == []


def test_a_changed_file_is_read_again(bench, retention, reads):
    path = bench.host.base_dir / "models" / "diffusion_models" / "wan.safetensors"
    bench.sample(bench.distorch(SPLIT, keep_loaded=True))
    model = bench.loaded().model
    free(bench)
    reads.clear()
    path.touch()
    bench.sample(bench.distorch(SPLIT, keep_loaded=True), 2)
    assert reads == ["wan.safetensors"]
    assert bench.loaded().model is not model
    assert len(bench.mm.current_loaded_models) == 1


def test_other_inputs_of_the_same_node_let_the_model_go(bench, retention):
    bench.sample(bench.distorch("acc:0,8mb;cpu,*", keep_loaded=True))
    other = bench.distorch("acc:0,8mb;cpu,*", keep_loaded=True, unet_name="other.safetensors")
    bench.sample(other)
    gc.collect()
    assert len(retention) == 1
    assert len(bench.mm.current_loaded_models) == 1


def test_two_nodes_keep_two_models(bench, retention, reads):
    high = bench.distorch("acc:0,8mb;cpu,*", keep_loaded=True)
    low = bench.distorch("acc:0,8mb;cpu,*", keep_loaded=True, unet_name="other.safetensors")
    bench.sample({"1": high})
    bench.sample({"2": low})
    assert len(retention) == 2
    free(bench)
    reads.clear()
    bench.sample({"1": high}, 2)
    bench.sample({"2": low}, 2)
    assert reads == []


def test_a_lora_stack_on_a_kept_model(bench, reference, retention, reads):
    stack = bench.lora(bench.plain(), 0.7)
    expected = bench.sample(stack)
    plain = reference[1]
    bench.clear()
    kept = bench.lora(bench.distorch(SPLIT, keep_loaded=True), 0.7)
    assert torch.equal(bench.sample(kept), expected)
    for _ in range(2):
        free(bench)
        reads.clear()
        assert torch.equal(bench.sample(kept), expected)
        assert reads.count("wan.safetensors") == 0
    assert torch.equal(bench.sample(bench.distorch(SPLIT, keep_loaded=True)), plain)


def test_out_of_memory_lets_everything_go(bench, retention):
    bench.sample(bench.distorch(SPLIT, keep_loaded=True))
    try:
        raise torch.OutOfMemoryError("simulated")
    except torch.OutOfMemoryError:
        bench.mm.unload_all_models()
    assert bench.mm.current_loaded_models == []
    assert len(retention) == 0
    assert ledger.allocated["acc:1"] == 0


def test_without_smart_memory_everything_is_let_go(bench, retention, monkeypatch):
    bench.sample(bench.distorch(SPLIT, keep_loaded=True))
    monkeypatch.setattr(bench.mm, "DISABLE_SMART_MEMORY", True)
    free(bench)
    assert bench.mm.current_loaded_models == []
    assert len(retention) == 0


def test_short_ram_lets_retained_models_go_with_hysteresis(bench, management, monkeypatch):
    """RAM is what a container's limit leaves, as it is for homes."""
    percent = 50.0
    monkeypatch.setattr(management.device_utils, "ram", lambda: (100 - percent, 100))
    watch = management.RamWatch()
    seen = []
    for percent in (50, 84, 86, 88, 90, 92, 97, 98, 84, 86, 79, 86):  # noqa: B007
        seen.append(watch.is_short())
    expected = [False, False, True, False, False, True, False, True, False, False, False, True]
    assert seen == expected


def test_short_ram_forgets_outputs_and_what_was_kept(
    bench, management, retention, reads, monkeypatch
):
    bench.sample(bench.distorch(SPLIT, keep_loaded=True))
    monkeypatch.setattr(management.device_utils, "ram", lambda: (5 << 30, 100 << 30))
    bench.mm.soft_empty_cache()
    assert len(retention) == 0
    assert bench.mm.current_loaded_models == []
    monkeypatch.undo()
    assert ledger.allocated["acc:1"] == 0
    bench.sample(bench.distorch(SPLIT, keep_loaded=True), 2)
    assert len(retention) == 1


def test_a_file_that_ram_has_no_room_for_is_told_before_it_is_read(
    bench, management, retention, monkeypatch, caplog
):
    """What is kept goes first; the file is read all the same."""
    bench.sample(bench.distorch(SPLIT, keep_loaded=True))
    left = [1 << 24]
    monkeypatch.setattr(management.device_utils, "ram", lambda: (left[0], 1 << 24))
    management.logger.addHandler(caplog.handler)
    try:
        bench.sample(bench.distorch(SPLIT, unet_name="other.safetensors"))
        assert len(retention) == 0
        told = {r.getMessage() for r in caplog.records if "may end in swapping" in r.getMessage()}
        assert len(told) == 1 and "other.safetensors is" in told.pop()
        caplog.clear()
        left[0] = 1 << 40
        bench.clear()
        bench.sample(bench.distorch(SPLIT))
        assert not [r for r in caplog.records if "may end in swapping" in r.getMessage()]
    finally:
        management.logger.removeHandler(caplog.handler)


def test_soft_empty_cache_clears_all_devices_when_distorch2_is_active(bench, monkeypatch):
    cleared = []
    empty_cache = type(torch.acc).empty_cache

    def note(module):
        cleared.append(module.current_device())
        return empty_cache(module)

    monkeypatch.setattr(type(torch.acc), "empty_cache", note)
    bench.mm.soft_empty_cache()
    assert cleared == [0]  # ComfyUI's own
    bench.sample(bench.distorch(SPLIT))
    cleared.clear()
    bench.mm.soft_empty_cache()
    assert cleared == [0, 1]


@pytest.fixture
def tidied(bench, management, monkeypatch):
    """How often garbage was collected, and the heap trimmed, by ``soft_empty_cache``."""
    counts = Counter()
    collect, trim = gc.collect, bench.module("device_utils").trim_host_heap

    def counting(name, wrapped):
        def call(*args):
            counts[name] += 1
            return wrapped(*args)

        return call

    stand_in = types.SimpleNamespace(collect=counting("collect", collect))
    monkeypatch.setattr(management, "gc", stand_in)
    monkeypatch.setattr(bench.module("device_utils"), "trim_host_heap", counting("trim", trim))
    return counts


def test_a_prompt_of_many_nodes_collects_no_garbage(bench, tidied, monkeypatch):
    """With DynamicVRAM on, ComfyUI calls ``soft_empty_cache`` after every node."""
    import execution

    calls = []
    get_output_data = execution.get_output_data

    async def and_then_empty(*args, **kwargs):
        outputs = await get_output_data(*args, **kwargs)
        bench.mm.soft_empty_cache()
        calls.append(1)
        return outputs

    monkeypatch.setattr(execution, "get_output_data", and_then_empty)
    chain = {"1": bench.distorch(SPLIT), "40": prompts.conditioning(3)}
    for n in range(41, 60):
        zero_out = {
            "class_type": "ConditioningZeroOut",
            "inputs": {"conditioning": [f"{n - 1}", 0]},
        }
        chain[str(n)] = zero_out
    prompt = prompts.guided(chain, "1", seed=1, steps=1, positive="59")
    bench.host.run(prompt)
    tidied.clear()
    calls.clear()
    chain["40"]["inputs"]["seed"] = 4  # every node but the loader runs again
    bench.host.run(prompts.guided(chain, "1", seed=2, steps=1, positive="59"))
    assert len(calls) >= 20
    assert tidied == {}


def test_what_was_ejected_is_collected_once(bench, tidied):
    bench.sample(bench.distorch(SPLIT))
    bench.mm.unload_all_models()
    tidied.clear()
    for _ in range(5):
        bench.mm.soft_empty_cache()
    assert tidied == {"collect": 1, "trim": 1}


def test_soft_empty_cache_without_a_server_does_not_fail(bench, monkeypatch):
    import server

    monkeypatch.delattr(server.PromptServer, "instance")
    bench.mm.soft_empty_cache(True)


def test_force_resets_the_executor_now_or_after_the_running_prompt(bench, reads):
    queue = bench.host.server.prompt_queue
    bench.sample(bench.plain())
    bench.mm.soft_empty_cache(True)
    assert queue.get_flags() == {}
    reads.clear()
    bench.sample(bench.plain(), 2)
    assert reads == ["wan.safetensors"]  # its loader's output was forgotten
    queue.currently_running[0] = "a prompt"
    try:
        bench.mm.soft_empty_cache(True)
    finally:
        queue.currently_running.clear()
    assert queue.get_flags() == {"unload_models": False, "free_memory": True}


def test_inside_a_pass_the_torch_device_is_the_models(bench):
    bench.sample(bench.distorch(SPLIT))
    seen = []
    model = bench.loaded().model.diffusion_model
    handle = model.blocks[3].register_forward_pre_hook(
        lambda *_: seen.append(bench.mm.get_torch_device())
    )
    multigpu = bench.host.custom_module("ComfyUI-MultiGPU")
    getattr(multigpu, "set_current_device", lambda device: None)("acc:1")
    bench.sample(bench.distorch(SPLIT), 2)
    handle.remove()
    getattr(multigpu, "set_current_device", lambda device: None)("acc:0")
    assert set(seen) == {torch.device(COMPUTE)}


def test_the_named_helpers(bench, management, caplog):
    line = management.comfyui_memory_load("here")
    assert line.startswith("tag=here|cpu=")
    assert "|acc:0=" in line and "|acc:1=" in line
    with caplog.at_level("INFO", logger="MultiGPU"):
        management.logger.addHandler(caplog.handler)
        management.multigpu_memory_log("test", "start")
        management.logger.removeHandler(caplog.handler)
    assert len({r.getMessage() for r in caplog.records}) == 1
    assert "test_start cpu|" in caplog.text
    queue = bench.host.server.prompt_queue
    queue.get_flags()
    assert management.force_full_system_cleanup("test")
    assert queue.get_flags() == {"unload_models": True, "free_memory": True}


def test_two_experts_switch_without_losing_their_donors_blocks(bench, monkeypatch):
    """High and low noise in turn on a card with room for one: MultiGPU's issue 155."""
    loaders = [
        bench.distorch("acc:0,12mb;acc:1,3mb;cpu,*", unet_name=name)
        for name in ("wan.safetensors", "other.safetensors")
    ]
    patchers = [bench.load(loader) for loader in loaders]
    with torch.inference_mode():
        bench.mm.load_models_gpu([patchers[0]])
        states = [bench.state(patchers[0])]
        share = states[0].split.compute_bytes
        donors = states[0].split.bytes_on("acc:1")
        # Room on the compute device for one share and what ComfyUI wants free, no more.
        host_free = bench.mm.get_free_memory
        room = share * 1.5 + bench.mm.minimum_inference_memory()

        def get_free_memory(dev=None, torch_free_too=False):
            dev = bench.mm.get_torch_device() if dev is None else dev
            if str(dev) != COMPUTE:
                return host_free(dev, torch_free_too)
            left = room - ledger.allocated[COMPUTE]
            return (left, 0) if torch_free_too else left

        monkeypatch.setattr(bench.mm, "get_free_memory", get_free_memory)
        ledger.clear_copies()
        in_ram = []
        for round in range(6):
            bench.mm.load_models_gpu([patchers[round % 2]])
            states = [bench.state(p) for p in patchers if hasattr(p.model, "_distorch2_block_swap")]
            away = [state for state in states if state is not bench.state(patchers[round % 2])]
            for state in states:
                held = sum(p.nbytes for p in state.packs if str(p.device) == "acc:1")
                assert held == donors
            assert all(state.compute_bytes() < share for state in away)
            packs = [pack for state in states for pack in state.all_packs()]
            in_ram.append(sum(pack.nbytes for pack in packs if pack.device.type == "cpu"))
        assert ledger.bytes_moved("acc:1", None) == 0
        assert len(set(in_ram[1:])) == 1  # from the first switch on


def test_the_signature_of_the_loaders_is_what_multigpu_made_it(bench):
    node = bench.host.nodes["UNETLoaderDisTorch2MultiGPU"]
    assert "virtual_vram_gb" in inspect.signature(node.override).parameters


def test_a_kept_model_that_ran_out_of_memory_is_kept_again(bench, retention, reads):
    keep = bench.distorch(SPLIT, keep_loaded=True)
    bench.sample(keep)
    try:
        raise torch.OutOfMemoryError("simulated")
    except torch.OutOfMemoryError:
        bench.mm.unload_all_models()
    reads.clear()
    bench.sample(keep, 2)  # ComfyUI still has the loader's output
    assert reads == []
    assert len(retention) == 1
    free(bench)
    bench.sample(keep)
    assert reads == []


@pytest.mark.parametrize("lru", [False, True])
def test_going_back_to_an_earlier_string_plans_anew(bench, retention, reads, lru):
    """A node cache that keeps more than the last prompt must not hide that the plan has changed."""
    import comfy_execution.caching as caching

    executor = bench.host.executor
    if lru:
        outputs = caching.LRUCache(caching.CacheKeySetInputSignature, max_size=50)
        executor.caches.outputs = executor.caches.all[0] = outputs
    homes = []
    for text in (SPLIT, "acc:0,8mb;cpu,*", SPLIT):
        bench.sample(bench.distorch(text, keep_loaded=True))
        homes.append(bench.state().split.homes)
    executor.reset()
    assert homes[0] == homes[2] != homes[1]
    assert reads.count("wan.safetensors") <= 1


def test_a_bad_string_on_a_kept_model_loses_nothing(bench, reference, retention, reads):
    from rig.comfy_host import PromptError

    keep = bench.distorch(SPLIT, keep_loaded=True)
    bench.sample(keep)
    reads.clear()
    with pytest.raises(PromptError, match="AllocationError"):
        bench.sample(bench.distorch("acc:9,1gb", keep_loaded=True))
    assert len(retention) == 1
    assert bench.loaded().model._distorch_v2_meta["full_allocation"].startswith(SPLIT)
    assert torch.equal(bench.sample(keep, 2), reference[2])
    assert reads == []


def test_clip_vision_is_flagged_by_its_patcher_and_let_go(bench, retention, monkeypatch):
    """It has a model and a load device of its own, and is no patcher."""
    import comfy.model_patcher

    class Vision:
        def __init__(self):
            self.model = torch.nn.Linear(2, 2)
            self.load_device = torch.device("cpu")
            cpu = torch.device("cpu")
            self.patcher = comfy.model_patcher.ModelPatcher(self.model, cpu, cpu)

    node = bench.host.nodes["CLIPVisionLoaderDisTorch2MultiGPU"]
    vision = Vision()
    monkeypatch.setattr(node.__mro__[1], "load_clip", lambda self, **_: (vision,))
    outputs = node().override(clip_name="x", keep_loaded=True)
    assert outputs == (vision,)
    assert vision.model._mgpu_unload_distorch_model is False
    try:
        raise torch.OutOfMemoryError("simulated")
    except torch.OutOfMemoryError:
        bench.mm.unload_all_models()


def test_a_kept_checkpoint_with_its_other_outputs(bench, reference, retention, reads):
    loader = prompts.checkpoint("wan.safetensors", SPLIT, keep_loaded=True)
    bench.sample(loader)
    assert len(retention) == 1
    reads.clear()
    free(bench)
    assert torch.equal(bench.sample(loader, 2), reference[2])
    assert reads == []
    retention.let_go_all("the test says so")
    assert bench.mm.current_loaded_models == []
    assert torch.equal(bench.sample(loader), reference[1])
