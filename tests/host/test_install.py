"""Joins: declared, reversible, idempotent, in either load order, passive without MultiGPU."""

import subprocess
import sys
import textwrap

import torch
import wrapt

from conftest import CACHE, RIG, ROOT

TARGETS = [
    ("comfy.model_patcher", "ModelPatcher", "partially_load"),
    ("comfy.model_patcher", "ModelPatcher", "unpatch_model"),
    ("comfy.model_patcher", "ModelPatcher", "partially_unload"),
    ("comfy.model_patcher", "ModelPatcher", "patch_model"),
    ("comfy.model_patcher", "ModelPatcher", "loaded_size"),
    ("comfy.model_patcher", "ModelPatcher", "get_key_patches"),
    ("comfy.model_patcher", "ModelPatcher", "patch_hooks"),
    ("comfy.model_patcher", "ModelPatcher", "unpatch_hooks"),
    ("comfy.model_management", "LoadedModel", "model_memory_required"),
    ("comfy.model_management", None, "free_memory"),
    ("comfy.model_management", None, "load_models_gpu"),
    ("nodes", None, "load_custom_node"),
]
MANAGEMENT = [
    ("comfy.model_management", None, "unload_all_models"),
    ("comfy.model_management", None, "soft_empty_cache"),
    ("comfy.model_management", None, "get_torch_device"),
    ("execution", "PromptExecutor", "execute"),
]


def attributes(bench):
    """Everything that the plugin patches, as it stands now."""
    found = {}
    for module, owner, name in TARGETS + MANAGEMENT:
        parent = sys.modules[module]
        parent = getattr(parent, owner) if owner else parent
        found[module, owner, name] = vars(parent)[name]
    for name, node in bench.host.nodes.items():
        if "DisTorch" in name:
            found[name] = vars(node)[node.FUNCTION]
            found[name, "INPUT_TYPES"] = vars(node)["INPUT_TYPES"]
    return found


def test_install_twice_then_uninstall_restores_every_object(bench, reference):
    expected = reference[1]
    loader = bench.distorch("acc:0,8mb;cpu,*")
    bench.sample(loader)
    bench.plugin.uninstall()
    bench.clear()  # so that the loader node runs again
    before = attributes(bench)
    assert not any(isinstance(value, wrapt.FunctionWrapper) for value in before.values())

    bench.plugin.install()
    bench.plugin.install()
    patched = attributes(bench)
    changed = {key for key in before if patched[key] is not before[key]}
    assert changed == {key for key in before if "DisTorch" in str(key) or key in MANAGEMENT}
    assert torch.equal(bench.sample(loader), expected)
    patched = attributes(bench)
    changed = {key for key in before if patched[key] is not before[key]}
    assert changed == {key for key in before if key[-1] != "load_custom_node"}
    bench.plugin.install()
    assert all(value is patched[key] for key, value in attributes(bench).items())

    # A model that is loaded when the plugin goes is handed back whole.
    patcher = bench.loaded()
    bench.plugin.uninstall()
    bench.plugin.uninstall()
    after = attributes(bench)
    assert all(after[key] is before[key] for key in before)
    assert {t.device.type for t in patcher.model.state_dict().values()} == {"cpu"}
    assert "forward" not in vars(patcher.model.diffusion_model)
    del patcher
    bench.plugin.install()
    bench.clear()
    assert torch.equal(bench.sample(loader), expected)


def test_another_patch_on_top_survives_uninstall(bench):
    import comfy.model_patcher

    bench.sample(bench.distorch("acc:0,8mb;cpu,*"))
    ours = vars(comfy.model_patcher.ModelPatcher)["partially_load"]

    def theirs(self, *args, **kwargs):
        return ours.__get__(self)(*args, **kwargs)

    comfy.model_patcher.ModelPatcher.partially_load = theirs
    try:
        bench.plugin.uninstall()
        assert vars(comfy.model_patcher.ModelPatcher)["partially_load"] is theirs
    finally:
        comfy.model_patcher.ModelPatcher.partially_load = ours.__wrapped__
        bench.plugin.install()


def test_without_multigpu_the_plugin_says_so_once_and_changes_nothing(bench, tmp_path):
    version = bench.host.mm.__file__.split("comfyui-")[-1].split("/")[0]
    script = f"""
        import sys
        sys.path.insert(0, {str(RIG.parent)!r})
        import logging
        from rig import comfy_host
        source = comfy_host.fetch({version!r}, {str(CACHE)!r})
        host = comfy_host.Host.boot(
            source, {str(tmp_path)!r}, [("block_swap", {str(ROOT)!r})], accelerators=False
        )
        import comfy.model_management, comfy.model_patcher, nodes, wrapt
        from comfy.model_management import LoadedModel
        patched = [
            value
            for owner in (
                vars(comfy.model_patcher.ModelPatcher),
                vars(LoadedModel),
                vars(nodes),
                vars(comfy.model_management),
            )
            for value in owner.values()
            if isinstance(value, wrapt.FunctionWrapper)
        ]
        assert not patched
        host.custom_module("block_swap").uninstall()
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("ComfyUI-MultiGPU is not installed") == 1
