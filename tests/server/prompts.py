"""Prompts in API format as a front end queues them, and what a test reads off the server."""

FILES = {"flagged": "wan.safetensors", "kept": "other.safetensors", "plain": "wan.safetensors"}
PATHS = {role: f"diffusion_models/{file}" for role, file in FILES.items()}
SPLIT = "acc:0,7mb;acc:1,2mb;cpu,*"


def distorch(file, text=SPLIT, **inputs):
    """A DisTorch2 loader as a workflow of MultiGPU 2.6.3 has it, which knows no `keep_loaded`."""
    return {
        "class_type": "UNETLoaderDisTorch2MultiGPU",
        "inputs": {
            "unet_name": file,
            "weight_dtype": "default",
            "compute_device": "acc:0",
            "virtual_vram_gb": 0.0,
            "donor_device": "cpu",
            "expert_mode_allocations": text,
            "eject_models": False,
            **inputs,
        },
    }


def plain(file):
    return {"class_type": "UNETLoader", "inputs": {"unet_name": file, "weight_dtype": "default"}}


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
    nodes = {
        "1": {"class_type": "ProbeConditioning", "inputs": {"seed": 1, "length": 16}},
        "2": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 64, "height": 64, "length": 5, "batch_size": 1},
        },
    }
    for role, loader in loaders.items():
        # One model, one place in the workflow.
        first = 10 + 10 * list(FILES).index(role)
        model = [str(first), 0]
        nodes[str(first)] = loader
        if lora is not None:
            inputs = {"model": model, "lora_name": "lora.safetensors", "strength_model": lora}
            nodes[str(first + 1)] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
            model = [str(first + 1), 0]
        if out_of_memory and role == list(loaders)[-1]:
            inputs = {"model": model, "times": out_of_memory}
            nodes[str(first + 2)] = {"class_type": "ProbeOutOfMemory", "inputs": inputs}
            model = [str(first + 2), 0]
        nodes[str(first + 3)] = {
            "class_type": "KSampler",
            "inputs": {
                "model": model,
                "seed": seed,
                "steps": steps,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "positive": ["1", 0],
                "negative": ["1", 0],
                "latent_image": ["2", 0],
                "denoise": 1.0,
            },
        }
        inputs = {"latent": [str(first + 3), 0], "key": role}
        nodes[str(first + 4)] = {"class_type": "ProbeLatent", "inputs": inputs}
    return nodes


def reads(before, after):
    """Which model files were opened between two looks at the server, and how often."""
    counts = {path: n - before["opened"].get(path, 0) for path, n in after["opened"].items()}
    return {path: n for path, n in counts.items() if n}
