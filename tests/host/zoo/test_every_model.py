"""Every transformer class of the host but Wan, small, on the CPU and on a simulated device.

This is what the swap will be tried on: each runs, says the same every time and everywhere, and
keeps most of its bytes in containers whose members are called in a known way.
"""

import pytest
import torch

from conftest import CACHE, COMPUTE
from rig import comfy_host
from rig.zoo import catalog, core, trace
from rig.zoo.hosted import built, equal, load


def pytest_generate_tests(metafunc):
    """One test per class that this host has, or per way to build and call it."""
    if "name" not in metafunc.fixturenames:
        return
    source = comfy_host.fetch(metafunc.config.getoption("comfyui"), CACHE)
    names = catalog.present(source)
    if "way" not in metafunc.fixturenames:
        metafunc.parametrize("name", names, ids=[name.rpartition(".")[2] for name in names])
        return
    ways = [(name, way) for name in names for way in catalog.RECIPES[name]]
    ids = [f"{name.rpartition('.')[2]}-{way}" for name, way in ways]
    metafunc.parametrize(("name", "way"), ways, ids=ids)


# ------------------------------------------------------------------------------ every class


def test_every_class_is_known(bench, pytestconfig):
    source = comfy_host.fetch(pytestconfig.getoption("comfyui"), CACHE)
    unknown = catalog.unknown(source)
    assert not unknown, f"ComfyUI has model classes that the tests have no recipe for: {unknown}"
    for name in catalog.present(source):
        assert issubclass(core.find(name), torch.nn.Module)
    assert not set(catalog.RECIPES) & set(catalog.WITHOUT)


def test_every_recipe_is_of_a_class(bench, pytestconfig):
    """A class that ComfyUI renames must not leave a recipe behind that nobody runs."""
    newest = max(comfy_host.SOURCES, key=lambda v: tuple(map(int, v.split("."))))
    if pytestconfig.getoption("comfyui") != newest:
        pytest.skip(f"only {newest} has them all")
    source = comfy_host.fetch(newest, CACHE)
    assert catalog.present(source) == list(catalog.RECIPES)


def test_is_the_same_on_a_device(bench, name):
    way = next(iter(catalog.RECIPES[name]))  # devices differ in nothing that the ways differ in
    instance, casting = built(name, way), built(name, way, "manual_cast")
    expected = instance.call(1)
    load(bench, instance, COMPUTE)
    there = instance.call(1, COMPUTE)
    if instance.recipe.rounds:
        torch.testing.assert_close(there, expected)
    else:
        assert equal(there, expected)
    load(bench, casting, COMPUTE)
    assert equal(casting.call(1, COMPUTE), there)


def test_is_the_same_and_goes_through_its_containers(bench, name, way):
    instance = built(name, way)
    with trace.traced(instance.model) as seen:
        expected = instance.call(1)
    assert expected and all(out.isfinite().all() for out in expected)
    with trace.traced(instance.model) as again:
        assert not equal(instance.call(2), expected)
    assert equal(instance.call(1), expected)
    assert equal(built(name, way, "manual_cast").call(1), expected)
    assert again == seen

    containers = trace.containers(instance.model)
    odd = instance.recipe.odd
    manners = {container.name: seen.manner(container) for container in containers}
    assert manners == {name: odd.get(name, "once in order") for name in manners}
    assert set(odd) <= set(manners)
    assert sum(container.share for container in containers) >= instance.recipe.share

    heard = set()
    for container in containers:
        weight = middle(seen, container) if manners[container.name] != "never" else None
        if weight is None:
            continue
        with torch.no_grad():
            before = weight.clone()
            weight.mul_(-3)
            shows = not equal(instance.call(1), expected)
            weight.copy_(before)
        assert shows == (container.name not in instance.recipe.mute), container
        heard |= {container.name} if shows else set()
    assert heard


def middle(seen, container):
    """A weight of one of a container's members that were called, if they have any."""
    members = seen.touched(container)
    weights = members[len(members) // 2].parameters()
    return next((weight for weight in weights if weight.ndim > 1), None)
