"""What a recipe is: a model class of ComfyUI, built small, and what one call of it is."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = Callable[[torch.Generator], dict[str, Any]]


def _forward(model: torch.nn.Module, inputs: dict):
    return model(**inputs)


@dataclass(frozen=True)
class Recipe:
    """One way to build and call a class.

    Attributes:
        inputs: makes the arguments of one call, on the CPU, from a generator.
        arguments: go to the constructor, beside dtype, device and operations; or a function that
            makes them, where that takes a class of ComfyUI.
        call: what one call is; "the sampler calls the forward" for most.
        shrink: replaces what the constructor would make too large, given the operations.
        odd: container -> how its members are called, where that is not each one once, in order.
            The words are those of `trace.Trace.manner`.
        mute: containers that are called although nothing comes of it.
        share: the least part of the bytes that the containers must hold.
        operations: makes what the class wants of the operations that it is built with.
        rounds: the CPU has another kernel for a layout or a composite operation of this one than
            a device has, so that the two agree up to rounding.
        newer: arguments that older versions of the class do not know, and are spared.
    """

    inputs: Inputs
    arguments: Mapping[str, Any] | Callable[[], dict] = field(default_factory=dict)
    call: Callable[[torch.nn.Module, dict], Any] = _forward
    shrink: Callable[[torch.nn.Module, Any], None] | None = None
    odd: Mapping[str, str] = field(default_factory=dict)
    mute: frozenset[str] = frozenset()
    share: float = 0.5
    operations: Callable[[type], type] = lambda given: given
    rounds: bool = False
    newer: frozenset[str] = frozenset()


Recipes = dict[str, dict[str, Recipe]]


class Instance:
    """A model built by a recipe. `call` is the same for equal seeds, whatever was called before."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe):
        self.model, self.recipe = model, recipe

    def call(self, seed: int = 1, device: str = "cpu") -> list[torch.Tensor]:
        """The tensors that one call with the inputs of a seed gives, on the CPU.

        The model has to be on `device`, or to come there by itself.
        """
        inputs = self.recipe.inputs(torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            out = self.recipe.call(self.model, at(inputs, device))
            return [tensor.cpu() for tensor in tensors_in(out)]


def find(name: str) -> type | None:
    """The class of a dotted name, or None where this ComfyUI has none such."""
    module, _, class_name = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), class_name, None)
    except ModuleNotFoundError as error:
        if not name.startswith(error.name):
            raise
        return None


def build(cls: type, recipe: Recipe, operations=None, seed: int = 0) -> Instance:
    """A small model of the class on the CPU, fp32, with random weights.

    Args:
        operations: `comfy.ops.disable_weight_init` (the default), `comfy.ops.manual_cast`, ...
    """
    import comfy.ops

    operations = recipe.operations(operations or comfy.ops.disable_weight_init)
    given = recipe.arguments() if callable(recipe.arguments) else recipe.arguments
    arguments = {
        name: value
        for name, value in given.items()
        if name not in recipe.newer or _knows(cls, name)
    }
    arguments |= {"dtype": torch.float32, "device": torch.device("cpu")}
    # Text encoders have it in short.
    short = "ops" if "ops" in inspect.signature(cls.__init__).parameters else "operations"
    model = cls(**arguments, **{short: operations})
    if recipe.shrink is not None:
        recipe.shrink(model, operations)
    randomise(model, seed)
    return Instance(model.eval().requires_grad_(False), recipe)


def _knows(cls: type, argument: str) -> bool:
    """Whether a constructor knows an argument, or the parameters that it hands all of them to."""
    module = importlib.import_module(cls.__module__)
    parameters = getattr(module, f"{cls.__name__}Params", None)
    fields = {field.name for field in dataclasses.fields(parameters)} if parameters else set()
    return argument in fields | set(inspect.signature(cls.__init__).parameters)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Random weights that keep activations near 1 and let every block show in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            last = name.rpartition(".")[2]
            if parameter.ndim < 2:
                gain = last in ("weight", "scale", "gamma") or "norm" in last
                noise = 1 + noise * 0.02 if gain else noise * 0.02
            elif "modulation" in last or "table" in last:
                noise = noise * 0.3
            else:
                noise = noise * noise[0].numel() ** -0.5
            parameter.copy_(noise)
        # What a file has, too, and the constructor left empty or may as well have.
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in saved and buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)


def at(value, device):
    """`value`, an argument of a forward, with every tensor in it on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: at(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(at(item, device) for item in value)
    return value


def tensors_in(value) -> list[torch.Tensor]:
    """Every tensor of what a forward gave, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def noise(*shape: int) -> Callable[[torch.Generator], torch.Tensor]:
    """Makes noise of a shape."""
    return lambda generator: torch.randn(shape, generator=generator)


def uniform(*shape: int, scale: float = 1.0) -> Callable[[torch.Generator], torch.Tensor]:
    """Makes numbers between 0 and `scale`, such as a timestep."""
    return lambda generator: torch.rand(shape, generator=generator) * scale


def tokens(*shape: int, vocabulary: int) -> Callable[[torch.Generator], torch.Tensor]:
    """Makes token ids."""
    return lambda generator: torch.randint(0, vocabulary, shape, generator=generator)


def always(value) -> Callable[[torch.Generator], Any]:
    """Makes the same value every time."""
    return lambda _: value


def inputs(**makers: Callable[[torch.Generator], Any]) -> Inputs:
    """The arguments of a call, each from its maker, with empty `transformer_options`.

    A maker that is `None` leaves the argument out: for those that take no options.
    """

    def make(generator):
        given = {"transformer_options": always({}), **makers}
        # What a sampler writes into its options must not reach the next call.
        return {
            name: dict(value) if isinstance(value := maker(generator), dict) else value
            for name, maker in given.items()
            if maker is not None
        }

    return make
