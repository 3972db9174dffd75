"""The prompts of the server tests, and what a test reads off the server."""

from rig import prompts as nodes
from rig.prompts import plain

FILES = {"flagged": "wan.safetensors", "kept": "other.safetensors", "plain": "wan.safetensors"}
PATHS = {role: f"diffusion_models/{file}" for role, file in FILES.items()}
SPLIT = "acc:0,7mb;acc:1,2mb;cpu,*"


def distorch(file, text=SPLIT, **inputs):
    """A DisTorch2 loader with a split over all three devices."""
    return nodes.distorch(file, text, **inputs)


def loaders(*roles, keep=True):
    """The loader of each role; with `keep` False the kept model's switch is off."""
    kinds = {
        "flagged": lambda: distorch(FILES["flagged"]),
        "kept": lambda: distorch(FILES["kept"], keep_loaded=keep),
        "plain": lambda: plain(FILES["plain"]),
    }
    return {role: kinds[role]() for role in roles}


def graph(loaders, seed=1, steps=1, out_of_memory=0, lora=None):
    """Loaders by role, each with a sampler of its own; the latent is found under the role.

    With `out_of_memory` the model of the last one fails at its first evaluation, when it is the
    process's that manieth such graph. With `lora`, a strength, a LoRA lies on top of each.
    """
    prompt = {"1": nodes.conditioning(1), "2": nodes.EMPTY_LATENT}
    for role, loader in loaders.items():
        # One model, one place in the workflow.
        first = 10 + 10 * list(FILES).index(role)
        ids = [str(first + offset) for offset in range(5)]
        model = ids[0]
        prompt[model] = loader
        if lora is not None:
            prompt[ids[1]] = nodes.lora(model, lora)
            model = ids[1]
        if out_of_memory and role == list(loaders)[-1]:
            inputs = {"model": [model, 0], "times": out_of_memory}
            prompt[ids[2]] = {"class_type": "ProbeOutOfMemory", "inputs": inputs}
            model = ids[2]
        prompt[ids[3]] = nodes.sampler(model, "1", "1", "2", seed, steps, cfg=1.0)
        prompt[ids[4]] = nodes.probe(ids[3], role)
    return prompt


def reads(before, after):
    """Which model files were opened between two looks at the server, and how often."""
    counts = {path: n - before["opened"].get(path, 0) for path, n in after["opened"].items()}
    return {path: n for path, n in counts.items() if n}
