"""Hooks on the calls of a model's modules, and which of its modules are called from where.

A hook stands in the ``__dict__`` of one instance, in front of the method that the call would have
come to, or of what others have put there; it hooks no class and no other model, and a copy of the
model has none.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import sys
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch

# What ``Module.compile`` leaves, and ``Module.__call__`` runs instead of ``forward``.
COMPILED = "_compiled_call_impl"

Wrap = Callable[[Callable], Callable]


class _Method:
    """A method of a module's class, called on the module without holding it.

    In the ``__dict__`` of a module it changes nothing; that is what a copy has in place of a hook,
    as a copier can leave nothing out. Whoever unpickles one needs no plugin for it.
    """

    __slots__ = ("__weakref__", "_module", "_name")

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self._module = weakref.ref(module)
        self._name = name

    @property
    def __wrapped__(self) -> Callable:
        return getattr(type(self._module()), self._name)

    def __call__(self, *args, **kwargs):
        module = self._module()
        return getattr(type(module), self._name)(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> _Method:
        return _Method(copy.deepcopy(self._module(), memo), self._name)

    def __reduce__(self):
        return getattr, (self._module(), self._name)


class _Hook:
    """What stands in front of a call. A copy of the module gets what stood there ``before``."""

    def __init__(self, hook: Callable, before: Callable) -> None:
        functools.update_wrapper(self, before)
        self._hook, self._before = hook, before

    def __call__(self, *args, **kwargs):
        return self._hook(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Callable:
        return copy.deepcopy(self._before, memo)

    def __reduce__(self):
        return operator.getitem, ((self._before,), 0)


class CallSite:
    """One place in a model: calls of the module that hangs there go through a wrapper.

    ``path`` names the place, ``methods`` what is wrapped. ``wrap`` is given what would have been
    called, and returns what is called instead. Holds neither modules nor hooks. Nothing is hooked
    before the first ``follow``.
    """

    def __init__(self, model: torch.nn.Module, path: str, methods: Iterable[str], wrap: Wrap):
        above, _, self._key = path.rpartition(".")
        self._parent = weakref.ref(model.get_submodule(above))
        self._methods = tuple(methods)
        self._wrap = wrap
        self._module: weakref.ref | None = None
        self._before: dict[str, Callable | None] = {}  # what stood in place of each hook
        self._own: dict[str, weakref.ref] = {}  # the hooks

    def _at_place(self) -> torch.nn.Module | None:
        parent = self._parent()
        return parent if parent is None or not self._key else parent._modules.get(self._key)

    def _attach(self) -> None:
        """Hook the module that hangs there now."""
        module = self._at_place()
        if module is None:
            return
        self._module = weakref.ref(module)
        for name in self._names(module):
            before = module.__dict__.get(name)
            if isinstance(before, _Method):  # of a copy of a model
                before = None
            self._before[name] = before
            called = _Method(module, name) if before is None else before
            hook = _Hook(self._wrap(called), called)
            self._own[name] = weakref.ref(hook)
            module.__dict__[name] = hook

    def detach(self) -> None:
        """Leave the module as it was found; what others have put over a hook since is theirs."""
        module = None if self._module is None else self._module()
        for name, before in self._before.items():
            if module is not None and self._hooks(module, name):
                if before is None:
                    del module.__dict__[name]
                else:
                    module.__dict__[name] = before
        self._module, self._before, self._own = None, {}, {}

    def follow(self) -> None:
        """Hook what hangs there, and is called, by now: modules are exchanged, or compiled."""
        module = self._at_place()
        if module is not None and not self._is_hooked(module):
            self.detach()
            self._attach()

    def _hooks(self, module: torch.nn.Module, name: str) -> bool:
        hook = self._own.get(name)
        return hook is not None and module.__dict__.get(name) is hook()

    def _is_hooked(self, module: torch.nn.Module) -> bool:
        if self._module is None or module is not self._module():
            return False
        names = self._names(module) if _is_compiled(module) else self._before
        return all(self._hooks(module, name) for name in names)

    def _names(self, module: torch.nn.Module) -> list[str]:
        """Where the calls come to in a module; what hangs in its place may have fewer methods."""
        own = [name for name in self._methods if hasattr(type(module), name)]
        return [_called(module, name) for name in own]

    @property
    def is_compiled(self) -> bool:
        """Whether ``torch.compile`` has made something of the module that hangs there."""
        module = self._at_place()
        return module is not None and ("_orig_mod" in module._modules or _is_compiled(module))

    @property
    def is_plain(self) -> bool:
        """Whether the module's own code is what runs under the hooks, and nothing over them."""
        module = self._at_place()
        own = all(before is None for before in self._before.values())
        return own and module is not None and self._is_hooked(module)


class DividedSite:
    """A block whose parts are wanted one by one, or all at once where it is compiled as a whole.

    A hook inside of what is compiled would break its graph.
    """

    def __init__(self, parts: Sequence[CallSite], whole: CallSite):
        self._parts = tuple(parts)
        self._whole = whole
        self.is_compiled = False  # when last followed

    def follow(self) -> None:
        """Hook what is called by now."""
        self.is_compiled = self._whole.is_compiled
        for site in self._parts if self.is_compiled else (self._whole,):
            site.detach()
        for site in (self._whole,) if self.is_compiled else self._parts:
            site.follow()

    def detach(self) -> None:
        """Leave the modules as they were found."""
        for site in (*self._parts, self._whole):
            site.detach()


Site = CallSite | DividedSite


def _called(module: torch.nn.Module, name: str) -> str:
    """Where a call of ``name`` comes to: compiled in place, no ``forward`` may be in the way."""
    return COMPILED if name == "forward" and _is_compiled(module) else name


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module was compiled in place."""
    return module.__dict__.get(COMPILED) is not None


def has_forward(module: torch.nn.Module) -> bool:
    """Whether a module can be called; lists of modules cannot."""
    return getattr(type(module).forward, "__name__", "") != "_forward_unimplemented"


def entry_methods(model_class: type, children: Collection[str]) -> list[str]:
    """``forward`` and every method of the class whose code names one of ``children``."""
    names = {
        name
        for name, function in methods_of(model_class)
        if not names_in(function).isdisjoint(children)
    }
    return sorted({"forward", *names})


def methods_called_by(above: Iterable[type], module_class: type) -> list[str]:
    """``forward`` and the methods of a class that the code of the classes ``above`` names."""
    named = set().union(*(names_used(cls) for cls in above))
    return sorted({"forward", *(name for name, _ in methods_of(module_class) if name in named)})


def children_called_by(above: Iterable[type], module: torch.nn.Module) -> list[str]:
    """Direct children that the module itself does not name, or that classes ``above`` name."""
    own = names_used(type(module))
    named = set().union(*(names_used(cls) for cls in above))
    return [name for name, _ in module.named_children() if name not in own or name in named]


@functools.cache
def names_used(cls: type) -> frozenset[str]:
    """Every name of an attribute in the code of a class's own methods."""
    return frozenset().union(*(names_in(function) for _, function in methods_of(cls)))


@functools.cache
def names_around(cls: type) -> frozenset[str]:
    """The same, and what is named by the functions of the module that a class is defined in."""
    module = vars(sys.modules[cls.__module__])
    functions = (member for member in module.values() if isinstance(member, types.FunctionType))
    local = (function for function in functions if function.__module__ == cls.__module__)
    return names_used(cls).union(*map(names_in, local))


def methods_of(cls: type) -> Iterator[tuple[str, types.FunctionType]]:
    """The methods of a class and of those it is derived from, up to ``torch.nn.Module``."""
    for base in cls.__mro__:
        if base in torch.nn.Module.__mro__:
            continue
        for name, member in vars(base).items():
            if isinstance(member, types.FunctionType) and not name.startswith("__"):
                yield name, member


@functools.cache
def names_in(function: types.FunctionType) -> frozenset[str]:
    """Every name in the code of a function, and of those that are made in it."""
    names, codes = set(), [function.__code__, inspect.unwrap(function).__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    return frozenset(names)
