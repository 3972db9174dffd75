"""Instances as ComfyUI has them: in an inner model, with a patcher."""

import torch

from . import catalog, core


class Inner(torch.nn.Module):
    """What ComfyUI has around a diffusion model, as far as patchers need it."""

    def __init__(self, diffusion_model):
        super().__init__()
        self.diffusion_model = diffusion_model


def built(name, way, operations="disable_weight_init"):
    """The instance that a recipe makes."""
    import comfy.ops

    recipe = catalog.RECIPES[name][way]
    return core.build(core.find(name), recipe, getattr(comfy.ops, operations))


def load(bench, instance, device):
    """Have ComfyUI load an instance to the simulated device; the instance keeps its patcher."""
    import comfy.model_patcher

    instance.patcher = comfy.model_patcher.ModelPatcher(
        Inner(instance.model), torch.device(device), torch.device("cpu")
    )
    with torch.inference_mode():
        bench.mm.load_models_gpu([instance.patcher])
    assert {str(p.device) for p in instance.model.parameters()} == {device}


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))
