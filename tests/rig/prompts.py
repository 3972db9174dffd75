"""Nodes of prompts in API format, as a front end queues them: loaders, LoRA, sampler, probe."""

EMPTY_LATENT = {
    "class_type": "EmptyHunyuanLatentVideo",
    "inputs": {"width": 64, "height": 64, "length": 5, "batch_size": 1},
}


def plain(file):
    """ComfyUI's own loader of a diffusion model."""
    return {"class_type": "UNETLoader", "inputs": {"unet_name": file, "weight_dtype": "default"}}


def distorch(file, text, compute="acc:0", **inputs):
    """A DisTorch2 loader as a workflow of MultiGPU 2.6.3 has it, which knows no `keep_loaded`."""
    return {
        "class_type": "UNETLoaderDisTorch2MultiGPU",
        "inputs": {
            "unet_name": file,
            "weight_dtype": "default",
            "compute_device": compute,
            "virtual_vram_gb": 0.0,
            "donor_device": "cpu",
            "expert_mode_allocations": text,
            "eject_models": False,
            **inputs,
        },
    }


def checkpoint(file, text, compute="acc:0", **inputs):
    """The DisTorch2 form of ComfyUI's checkpoint loader."""
    node = distorch(file, text, compute, **inputs)
    node["inputs"]["ckpt_name"] = node["inputs"].pop("unet_name")
    del node["inputs"]["weight_dtype"]
    return {**node, "class_type": "CheckpointLoaderSimpleDisTorch2MultiGPU"}


def lora(model, strength, file="lora.safetensors"):
    """A LoRA on top of the node `model`."""
    inputs = {"model": [model, 0], "lora_name": file, "strength_model": strength}
    return {"class_type": "LoraLoaderModelOnly", "inputs": inputs}


def conditioning(seed, length=16):
    """Seeded noise for a text encoding of `length` tokens.

    Prompts of lengths like 16 and 17 keep ComfyUI from batching cond and uncond.
    """
    return {"class_type": "ProbeConditioning", "inputs": {"seed": seed, "length": length}}


def sampler(model, positive, negative, latent, seed, steps, cfg):
    """KSampler on the nodes of these ids."""
    return {
        "class_type": "KSampler",
        "inputs": {
            "model": [model, 0],
            "seed": seed,
            "steps": steps,
            "cfg": cfg,
            "sampler_name": "euler",
            "scheduler": "simple",
            "positive": [positive, 0],
            "negative": [negative, 0],
            "latent_image": [latent, 0],
            "denoise": 1.0,
        },
    }


def probe(latent, key):
    """Keeps the latent of the node `latent` under `key`."""
    return {"class_type": "ProbeLatent", "inputs": {"latent": [latent, 0], "key": key}}


def guided(nodes, model, seed, steps, positive="20", key="out", latent=EMPTY_LATENT):
    """`nodes`, and sampling with classifier-free guidance of the node `model`: two passes a step.

    Ids from 20 on are taken by this function; `positive` names another positive conditioning, and
    `latent` is the node to start from.
    """
    return {
        **nodes,
        "20": conditioning(1, 16),
        "21": conditioning(2, 17),
        "22": latent,
        "23": sampler(model, positive, "21", "22", seed, steps, cfg=5.0),
        "24": probe("23", key),
    }
