"""Workflows saved with MultiGPU alone: their widget values keep their places."""

import json
from pathlib import Path
from urllib.request import urlopen

import pytest

WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}


def distorch2_nodes(server):
    """What the front end is told of each DisTorch2 node, by id."""
    with urlopen(f"{server.url}/object_info") as reply:
        nodes = json.load(reply)
    return {name: node for name, node in nodes.items() if "DisTorch" in name}


@pytest.fixture(scope="module")
def without(start):
    with start(plugin=False) as server:
        yield distorch2_nodes(server)


def test_inputs_are_multigpus_with_the_switch_behind_them(server, without):
    nodes = distorch2_nodes(server)
    assert set(nodes) == set(without) != set()
    for name, node in nodes.items():
        # ComfyUI 0.30.0 asks nodes of its V3 schema (triple and quadruple CLIP loaders) past
        # MultiGPU, whose own inputs the front end is not shown either.
        if "optional" not in without[name]["input_order"]:
            assert node == without[name]
            continue
        order = node["input_order"]
        assert order["optional"].pop() == "keep_loaded", name
        kind, options = node["input"]["optional"].pop("keep_loaded")
        assert (kind, options["default"]) == ("BOOLEAN", False)
        expected = without[name]["input_order"]
        assert order == {"optional": [], **expected}, name
        assert node["input"] == {"optional": {}, **without[name]["input"]}, name
        assert {part: list(inputs) for part, inputs in node["input"].items()} == order


def widgets(node):
    """The inputs that the front end shows as widgets, in their order: (name, kind)."""
    for part in ("required", "optional"):
        for name in node["input_order"].get(part, []):
            kind = node["input"][part][name][0]
            if isinstance(kind, list) or kind in (*WIDGETS, "COMBO"):
                yield name, kind


def test_multigpus_own_workflows_fit(server, pytestconfig):
    checkout = pytestconfig.getoption("multigpu")
    if checkout.startswith("double"):
        pytest.skip("MultiGPU's example workflows are in its checkout")
    nodes, fitted = distorch2_nodes(server), 0
    for path in Path(checkout, "example_workflows").glob("*.json"):
        for saved in json.loads(path.read_text())["nodes"]:
            if saved["type"] not in nodes or "DisTorch2" not in saved["type"]:
                continue
            values = saved["widgets_values"]
            *shown, last = widgets(nodes[saved["type"]])
            assert last == ("keep_loaded", "BOOLEAN")
            assert len(values) <= len(shown)  # one saved before the last inputs came has fewer
            for value, (name, kind) in zip(values, shown, strict=False):
                kinds = WIDGETS.get(kind, str) if isinstance(kind, str) else str
                assert isinstance(value, kinds), (path.name, saved["type"], name, value)
            fitted += 1
    assert fitted
