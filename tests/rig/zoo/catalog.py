"""Which model classes a ComfyUI has, by its sources, and which of them have recipes.

A class that a newer ComfyUI brings is found the day the version is added: `unknown` names it.
Wan models are `rig.wan_classes`'s.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from . import audio3d, control, cosmos, flux, image, pixels, seeing, text, unet, video
from .core import Recipes

FAMILIES = (flux, image, pixels, video, cosmos, audio3d, unet, control, text, seeing)
RECIPES: Recipes = {name: ways for family in FAMILIES for name, ways in family.RECIPES.items()}

# Classes without a recipe, and why.
_PART = "a part of another model, or its base class"
WITHOUT = {
    "comfy.ldm.modules.diffusionmodules.mmdit.MMDiT": _PART,
    "comfy.ldm.lightricks.model.LTXBaseModel": _PART,
    "comfy.ldm.lightricks.model.BasicTransformerBlock": _PART,
    "comfy.ldm.modules.attention.SpatialVideoTransformer": _PART,
    "comfy.ldm.supir.supir_modules.GLVControl": _PART,
    "comfy.text_encoders.bert.BertModel_": _PART,
    "comfy.ldm.audio.embedders.NumberConditioner": "stands beside a model, and has no blocks",
    "comfy.ldm.minimax.model.PackedLayout": "no module",
    "comfy.ldm.cascade.controlnet.ControlNet": "an EfficientNet of torchvision, without blocks",
    "comfy.ldm.rt_detr.rtdetr_v4.RTv4": "a detector of convolutions, which needs torchvision",
    "comfy.ldm.sam3.detector.SAM3Model": "of one size, 800 million weights; no diffusion model",
    "comfy.ldm.depth_anything_3.model.DepthAnything3Net": "of four sizes, the smallest 86 MB, and "
    "no diffusion model",
}

_NAMES = re.compile(r"\bcomfy\.c?ldm(?:\.\w+)+")


def find(source: Path) -> list[str]:
    """The dotted names of the model classes in the ComfyUI at `source`, without Wan.

    They are the classes that `comfy.model_base` and `comfy.controlnet` name; those of `comfy.ldm`
    and `comfy.cldm` whose forward takes a time step and a context; and in `comfy.text_encoders`
    and `comfy.clip_model` those made of a `config_dict`, or called to be a `transformer`.
    """
    classes = dict(_classes(source))
    named = set()
    for file in ("comfy/model_base.py", "comfy/controlnet.py"):
        named |= _named((source / file).read_text(encoding="utf-8"))
    found = {
        name
        for name, node in classes.items()
        if name in named or _is_timed(name, node) or _is_encoder(name, node)
    }
    for path in (source / "comfy/text_encoders").glob("*.py"):
        for made in re.findall(r"self\.transformer = (\w+)\(", path.read_text(encoding="utf-8")):
            found.add(f"comfy.text_encoders.{path.stem}.{made}")
    return sorted(name for name in found if not name.startswith("comfy.ldm.wan."))


def present(source: Path) -> list[str]:
    """The names that have recipes and that the ComfyUI at `source` has."""
    return [name for name in RECIPES if _defines(source, name)]


def unknown(source: Path) -> list[str]:
    """The model classes of the ComfyUI at `source` that have neither a recipe nor a reason."""
    return [name for name in find(source) if name not in RECIPES and name not in WITHOUT]


def _defines(source: Path, name: str) -> bool:
    module, _, last = name.rpartition(".")
    path = source / (module.replace(".", "/") + ".py")
    return path.is_file() and bool(
        re.search(rf"^(class )?{last}\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    )


def _classes(source: Path) -> Iterator[tuple[str, ast.ClassDef]]:
    folders = ("comfy/ldm", "comfy/cldm", "comfy/text_encoders")
    paths = [path for folder in folders for path in sorted((source / folder).glob("**/*.py"))]
    for path in (*paths, source / "comfy/clip_model.py"):
        module = ".".join(path.relative_to(source).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                yield f"{module}.{node.name}", node


def _named(text: str) -> set[str]:
    """Whatever a source names in full, or imports from `comfy.ldm` and takes for a model."""
    imported = {
        alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("comfy.ldm.")
        for alias in node.names
    }
    models = set(re.findall(r"unet_model=(\w+)\b", text))
    return set(_NAMES.findall(text)) | {imported[name] for name in models & set(imported)}


def _parameters(node: ast.ClassDef, method: str) -> set[str]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == method:
            return {argument.arg for argument in (*item.args.args, *item.args.kwonlyargs)}
    return set()


def _is_timed(name: str, node: ast.ClassDef) -> bool:
    given = _parameters(node, "forward")
    timed = given & {"timestep", "timesteps"} or {"t", "transformer_options"} <= given
    return bool(timed) and "context" in given and name.startswith(("comfy.ldm.", "comfy.cldm."))


def _is_encoder(name: str, node: ast.ClassDef) -> bool:
    if name.startswith("comfy.clip_model."):  # its models are made of parts that take the same
        return node.name in ("CLIPTextModel", "CLIPVisionModelProjection")
    return name.startswith("comfy.text_encoders.") and "config_dict" in _parameters(
        node, "__init__"
    )
