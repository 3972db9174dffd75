"""Which lists of blocks a model has, and how a call goes through them.

A container is a `ModuleList` or `ModuleDict` that no other one contains, at any depth, or a
`Sequential` of the model itself. What a call does is seen by hooks on every module.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.nn.modules import module as hooks

KINDS = (torch.nn.ModuleList, torch.nn.ModuleDict)
REAL = 0.02  # a container of a smaller part of the bytes is not worth a look


@dataclass(frozen=True)
class Container:
    """A container: its qualified name, class, members by key, and its part of the model's bytes."""

    name: str
    kind: str
    members: dict[str, torch.nn.Module]
    share: float

    def __str__(self):
        return f"{self.name}({self.kind} {len(self.members)})"


def nbytes(module: torch.nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def containers(model: torch.nn.Module) -> list[Container]:
    """The containers of a model that hold a real part of its bytes, in its own order."""
    whole = nbytes(model)
    found = []

    def walk(module, name):
        if isinstance(module, KINDS):
            share = nbytes(module) / whole
            if share >= REAL and len(module):
                kind = next(kind.__name__ for kind in KINDS if isinstance(module, kind))
                found.append(Container(name, kind, dict(module.named_children()), share))
            return
        for key, child in module.named_children():
            walk(child, f"{name}.{key}" if name else key)

    walk(model, "")
    return found


@dataclass
class Trace:
    """What one call did with the members of the containers.

    Attributes: `calls` (container, member) of every call of a member's forward, in order;
    `entered` container -> the paths of what was called inside a member while the member's own
    forward was not running, as (member, path), in order; `nested` the calls of a member
    while another member of any container was running.
    """

    calls: list[tuple[str, str]] = field(default_factory=list)
    entered: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    nested: list[tuple[str, str]] = field(default_factory=list)

    def manner(self, container: Container) -> str:
        """How the members of a container were called: "once in order", "never", "from inside: "
        and the paths that others call, or the keys in the order of the calls."""
        keys = list(container.members)
        called = [key for name, key in self.calls if name == container.name]
        words = []
        if called == keys:
            words.append("once in order")
        elif called:
            words.append(" ".join(called))
        if entered := self.entered.get(container.name):
            parts = list(dict.fromkeys(path for _, path in entered))
            members = list(dict.fromkeys(key for key, _ in entered))
            who = "" if members == keys else f" of {' '.join(members)}"
            words.append(f"from inside{who}: {' '.join(parts)}")
        return ", ".join(words) or "never"

    def touched(self, container: Container) -> list[torch.nn.Module]:
        """The members of a container of which anything was called, in its order."""
        keys = {key for name, key in self.calls if name == container.name}
        keys |= {key for key, _ in self.entered.get(container.name, ())}
        return [member for key, member in container.members.items() if key in keys]


@contextlib.contextmanager
def traced(model: torch.nn.Module) -> Iterator[Trace]:
    """Records what the calls in its body do."""
    trace = Trace()
    inside = {}  # id of a module in a member -> (container, member, path in it; "" the member)
    for container in containers(model):
        for key, member in container.members.items():
            for path, module in member.named_modules():
                inside.setdefault(id(module), (container.name, key, path))
    running = []

    def enter(module, _):
        place = inside.get(id(module))
        if place is None:
            return
        name, key, path = place
        if not path:
            trace.calls.append((name, key))
            if running:
                trace.nested.append((name, key))
        elif (name, key) not in running:
            trace.entered.setdefault(name, []).append((key, path))
        running.append((name, key))

    def leave(module, *_):
        if id(module) in inside:
            running.pop()

    handles = (
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
