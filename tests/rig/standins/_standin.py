"""What the stand-ins for packages without a CPU build are made of."""


class Missing:
    """An attribute of a package that is not installed: it can be imported, but not used."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> "Missing":
        return missing_attributes(self._name)(name)

    def __call__(self, *args, **kwargs):
        raise ImportError(f"{self._name} was called, but the tests only have a stand-in for it")


def missing_attributes(module: str):
    """Return a module-level `__getattr__` that has a `Missing` for every public name."""

    def __getattr__(name: str) -> Missing:
        if name.startswith("_"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return Missing(f"{module}.{name}")

    return __getattr__
