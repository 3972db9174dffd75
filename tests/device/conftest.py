"""The promises of the README on a card, with a real ComfyUI.

    pytest tests/device --card cuda|simulated [--comfyui 0.30.0]
                        [--multigpu DIR|double:VERSION] [--gguf DIR|double]

MULTIGPU_DIR and GGUF_DIR name checkouts of ComfyUI-MultiGPU and ComfyUI-GGUF, too. On simulated
devices the models are tiny, and times say nothing.
"""

import gc
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from rig import comfy_host, multigpu, tiny_wan
from rig.card import CARDS
from rig.workbench import Workbench

ROOT = Path(__file__).parents[2]
RIG = ROOT / "tests" / "rig"
ALIGNMENT = 256  # of tensors in a packed block


def pytest_addoption(parser):
    double = multigpu.DEFAULT
    parser.addoption("--card", default="simulated", choices=CARDS, help="what to run on")
    parser.addoption("--comfyui", default="0.30.0", help="ComfyUI version, from PyPI")
    chosen = os.environ.get("MULTIGPU_DIR") or double
    parser.addoption("--multigpu", default=chosen, help=multigpu.HELP)
    chosen = os.environ.get("GGUF_DIR") or "double"
    parser.addoption("--gguf", default=chosen, help="a checkout of ComfyUI-GGUF, or double")


def pytest_configure(config):
    if config.getoption("card") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"--card cuda: torch {torch.__version__} finds no CUDA device on this machine. Nothing "
            "was tested, and that is no pass. --card simulated runs what can be shown without one."
        )


def pytest_report_header(config):
    options = [config.getoption(name) for name in ("card", "comfyui", "multigpu", "gguf")]
    return "card: {}, ComfyUI {}, MultiGPU {}, GGUF {}".format(*options)


class Bench(Workbench):
    """The workbench on a card."""

    def __init__(self, host, version, card):
        latent = {"class_type": "EmptyHunyuanLatentVideo", "inputs": dict(card.video)}
        super().__init__(host, version, card.compute, latent)
        self.card = card

    def sample(self, loader, seed=1):
        """The latent of a run of `card.steps`, each of two passes: cond and uncond."""
        return super().sample(loader, seed, self.card.steps)

    def size(self, model):
        """Bytes of a model's weights, as of its file."""
        folder = self.host.base_dir / "models" / "diffusion_models"
        return (folder / f"{model}.safetensors").stat().st_size

    def block_bytes(self, model):
        """Bytes of one packed block of a model, as its file has it."""
        folder = self.host.base_dir / "models" / "diffusion_models"
        weights = safetensors.torch.load_file(folder / f"{model}.safetensors")
        block = [weight for name, weight in weights.items() if name.startswith("blocks.0.")]
        return sum(-(-weight.nbytes // ALIGNMENT) * ALIGNMENT for weight in block)

    def inputs(self, patcher):
        """What a pass of the model takes, the same in every test: latent, timestep, text."""
        generator, dtype = torch.Generator().manual_seed(0), patcher.model.get_dtype_inference()
        video = self.card.video
        frames = (video["length"] - 1) // 4 + 1
        latent = torch.randn(
            (1, tiny_wan.LATENT_CHANNELS, frames, video["height"] // 8, video["width"] // 8),
            generator=generator,
        )
        text = torch.randn((1, 16, tiny_wan.TEXT_DIM), generator=generator)
        time = torch.full((1,), 500.0).to(patcher.load_device)
        return latent.to(patcher.load_device, dtype), time, text.to(patcher.load_device, dtype)

    def text(self, model, share, rest="cpu,*"):
        """A quota in bytes of a share of the model, on the compute device; `rest` follows."""
        return f"{self.compute},{int(share * self.size(model))}b;{rest}"

    def place(self, loader):
        """Load a loader's model as a sampler does; returns its patcher."""
        patcher = self.load(loader)
        with torch.inference_mode():
            self.mm.load_models_gpu([patcher])
        return patcher

    def free(self):
        """Press both buttons."""
        self.host.free(unload_models=True, free_memory=True)
        gc.collect()

    def at_home(self):
        """Whether every block of the swapped model lies where its split says."""
        split, model = self.state().split, self.loaded().model.diffusion_model
        assert isinstance(model.blocks, torch.nn.ModuleList)
        homes = split.homes[: len(model.blocks)]
        return all(
            {str(tensor.device) for tensor in block.state_dict().values()} == {home}
            for block, home in zip(model.blocks, homes, strict=True)
        )


@pytest.fixture(scope="session")
def session_bench(pytestconfig, tmp_path_factory):
    card = CARDS[pytestconfig.getoption("card")]()
    base = tmp_path_factory.mktemp("comfyui")
    folder = base / "models" / "diffusion_models"
    loras = base / "models" / "loras"
    for path in (folder, loras):
        path.mkdir(parents=True)
    for name, sizes in card.sizes.items():
        tiny_wan.write_wan(folder / f"{name}.safetensors", **sizes)
    small = {name: n for name, n in card.sizes["small"].items() if name in ("layers", "dim")}
    tiny_wan.write_lora(loras / "lora.safetensors", **small)
    package, version = multigpu.package(pytestconfig.getoption("multigpu"))
    gguf = pytestconfig.getoption("gguf")
    nodes = [
        ("ComfyUI-GGUF", RIG / "gguf_double" if gguf == "double" else Path(gguf)),
        ("probe", RIG / "probe_nodes"),
        ("ComfyUI-MultiGPU", package),
        ("block_swap", ROOT),
    ]
    source = comfy_host.fetch(pytestconfig.getoption("comfyui"), ROOT / ".cache")
    # The weights stay in the file's bf16, and nodes are cached by the graph alone.
    host = card.boot(source, base, nodes, ("--bf16-unet", "--cache-classic"))
    print(f"\n{card.describe()}")
    bench = Bench(host, version, card)
    # What the first pass on a card takes for ever: its context, kernels, workspaces.
    bench.sample(bench.plain("small.safetensors"))
    bench.clear()
    gc.freeze()  # ComfyUI collects after every prompt: spare it going through its own modules
    return bench


@pytest.fixture
def card(session_bench):
    return session_bench.card


@pytest.fixture
def bench(session_bench, card):
    """The workbench. Every test starts on an empty card, and ends without a race and with every
    page-lock given back."""
    session_bench.clear()
    card.reset()
    locked = dict(card.locks.held)
    yield session_bench
    session_bench.clear()
    assert card.locks.held == locked
    assert card.locks.errors == []
    card.check()


@pytest.fixture
def static_split(bench, monkeypatch):
    """No slot is exchanged for a block, for tests that count copies over several passes."""
    monkeypatch.setattr(bench.module("step_time"), "WORTH", 1.0)


@pytest.fixture(scope="session")
def expected(session_bench):
    """Latents of the unswapped model, by file and seed, made at their first use."""
    made = {}

    def latent(model, seed=1):
        if (model, seed) not in made:
            session_bench.clear()
            latent = session_bench.sample(session_bench.plain(f"{model}.safetensors"), seed)
            assert torch.isfinite(latent).all()
            made[model, seed] = latent
            session_bench.clear()
        return made[model, seed]

    return latent


@pytest.fixture
def second(card):
    """A second device of the same kind."""
    if not card.others:
        pytest.skip(f"this machine has one device: {card.describe()}")
    return card.others[0]
