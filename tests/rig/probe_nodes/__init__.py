"""What a test puts into ComfyUI: nodes of its own, and a look at the process over HTTP.

- Nodes: conditioning without a text encoder, a place where a test finds its latents, a model that
  runs out of memory.
- `OPENED` counts how often each model file was opened for reading since this was imported.
- GET `/probe` replies with `state()`, GET `/probe/turns` with `turns()`.
"""

import collections
import functools
import gc
import hashlib
import os
import sys

import comfy.model_management as mm
import folder_paths
import psutil
import safetensors
import safetensors.torch
import server
import torch
from aiohttp import web

TEXT_DIM = 4096
MODEL_SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt")

# key -> the latent that ProbeLatent last saw under it, on the CPU.
LATENTS: dict[str, torch.Tensor] = {}

# Path below the models folder, with "/" -> how often it was opened for reading.
OPENED: collections.Counter[str] = collections.Counter()

# The queue flags that the worker has acted upon, one dict for each of its turns that had any.
TAKEN: list[dict] = []


class ProbeConditioning:
    """Seeded noise in the shape of a text encoder's output, [1, length, width] (Wan: 4096), and
    of its pooled output, [1, pooled], if that is not 0; a mask goes with it if `masked`."""

    CATEGORY = "tests"
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "seed": ("INT", {"default": 0, "min": 0}),
                "length": ("INT", {"default": 16, "min": 1}),
            },
            "optional": {
                "width": ("INT", {"default": TEXT_DIM, "min": 1}),
                "pooled": ("INT", {"default": 0, "min": 0}),
                "masked": ("BOOLEAN", {"default": False}),
            },
        }

    def encode(self, seed, length, width=TEXT_DIM, pooled=0, masked=False):
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn((1, length, width), generator=generator)
        extra = {}
        if pooled:
            extra["pooled_output"] = torch.randn((1, pooled), generator=generator)
        if masked:
            extra["attention_mask"] = torch.ones((1, length), dtype=torch.long)
        return ([[text, extra]],)


class ProbeEncoding:
    """Keeps the text of a conditioning in `LATENTS[key]`."""

    CATEGORY = "tests"
    FUNCTION = "keep"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "key": ("STRING", {"default": "text"}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **_inputs):
        return float("nan")

    def keep(self, conditioning, key):
        LATENTS[key] = conditioning[0][0].detach().to("cpu", copy=True)
        return ()


class ProbeLatent:
    """Passes a latent on and keeps a copy of it in `LATENTS[key]`."""

    CATEGORY = "tests"
    FUNCTION = "keep"
    RETURN_TYPES = ("LATENT",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "latent": ("LATENT",),
                "key": ("STRING", {"default": "latent"}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, **_inputs):
        return float("nan")  # run in every prompt, also where the sampler's result is cached

    def keep(self, latent, key):
        LATENTS[key] = latent["samples"].detach().to("cpu", copy=True)
        return (latent,)


class ProbeOutOfMemory:
    """A model whose first `times` evaluations in this process run out of memory, in all its clones
    together; later ones are the model's own. `raised` is how often it has happened."""

    CATEGORY = "tests"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)

    raised = 0

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "times": ("INT", {"default": 1, "min": 0}),
            }
        }

    def patch(self, model, times):
        def evaluate(apply_model, arguments):
            if ProbeOutOfMemory.raised < times:
                ProbeOutOfMemory.raised += 1
                raise torch.OutOfMemoryError("ProbeOutOfMemory has no memory left")
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        patched = model.clone()
        patched.set_model_unet_function_wrapper(evaluate)
        return (patched,)


def state() -> dict:
    """Return the state of this process after a garbage collection, as JSON knows it.

    - `devices`: simulated device -> bytes allocated; `races`: what the simulator found
    - `rss`: bytes of host memory, what lies on simulated devices among them
    - `opened`: see `OPENED`
    - `loaded`: ComfyUI's loaded models in its order: the classes of patcher and model, the flag of
      "free", bytes loaded and device; the first two are null where the patcher is gone
    - `latents`: key -> SHA-256 of the bytes of `LATENTS[key]`
    - what `turns` returns
    """
    gc.collect()
    simulator = sys.modules.get("rig.simulator")
    return {
        "devices": dict(simulator.ledger.allocated) if simulator else {},
        "races": [str(race) for race in simulator.races] if simulator else [],
        "rss": psutil.Process().memory_info().rss,
        "opened": dict(OPENED),
        "loaded": [_describe(loaded) for loaded in list(mm.current_loaded_models)],
        "latents": {key: _digest(latent) for key, latent in list(LATENTS.items())},
        **turns(),
    }


def turns() -> dict:
    """Return what ComfyUI's worker is at: the `flags` pending on its queue, those `taken` (see
    `TAKEN`), and whether it is `idle`: waits, and was not told that there is something to do.

    What the condition's private list holds decides, under the lock by which it is changed: one who
    sets a flag or queues a prompt takes the worker from the list before he lets go of the lock.
    """
    queue = server.PromptServer.instance.prompt_queue
    with queue.mutex:
        return {
            "flags": dict(queue.flags),
            "taken": list(TAKEN),
            "idle": bool(queue.not_empty._waiters),
        }


def _describe(loaded) -> dict:
    patcher = loaded.model
    gone = patcher is None
    return {
        "class": None if gone else type(patcher).__name__,
        "name": None if gone else type(patcher.model).__name__,
        "flag": None if gone else getattr(patcher.model, "_mgpu_unload_distorch_model", None),
        "loaded_bytes": 0 if gone else patcher.loaded_size(),
        "device": str(loaded.device),
    }


def _digest(latent: torch.Tensor) -> str:
    content = latent.contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy()).hexdigest()


def _count(path) -> None:
    """Count the opening of `path` if it is a model file of this ComfyUI."""
    if not isinstance(path, str | os.PathLike) or not str(path).endswith(MODEL_SUFFIXES):
        return
    models = os.path.realpath(folder_paths.models_dir)
    below = os.path.relpath(os.path.realpath(path), models)
    if not below.startswith(os.pardir):
        OPENED[below.replace(os.sep, "/")] += 1


def _audit(event: str, arguments: tuple) -> None:
    if event == "open":
        path, _mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR) == 0:
            _count(path)


def _watch_files() -> None:
    """Count from now on: what Python opens, and what safetensors opens without Python."""
    sys.addaudithook(_audit)
    safe_open = safetensors.safe_open

    @functools.wraps(safe_open)
    def counted(filename, *args, **kwargs):
        _count(filename)
        return safe_open(filename, *args, **kwargs)

    safetensors.safe_open = safetensors.torch.safe_open = counted


def _watch_queue(queue) -> None:
    get_flags = queue.get_flags

    def noted(reset=True):
        with queue.mutex:  # so that nobody sees flags that are neither pending nor taken
            flags = get_flags(reset)
            if flags and reset:
                TAKEN.append(flags)
            return flags

    queue.get_flags = noted


def _add_routes(routes: web.RouteTableDef) -> None:
    for path, look in (("/probe", state), ("/probe/turns", turns)):

        async def reply(_request, look=look):
            return web.json_response(look())

        routes.get(path)(reply)


_watch_files()
if instance := getattr(server.PromptServer, "instance", None):
    _watch_queue(instance.prompt_queue)
    _add_routes(instance.routes)

NODE_CLASS_MAPPINGS = {
    "ProbeConditioning": ProbeConditioning,
    "ProbeEncoding": ProbeEncoding,
    "ProbeLatent": ProbeLatent,
    "ProbeOutOfMemory": ProbeOutOfMemory,
}
