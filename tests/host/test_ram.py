"""A load that RAM has no room for: others are let go first, and the user is told in time."""

import logging

import pytest
import torch

from conftest import COMPUTE
from rig.formats import loader

HERE = f"{COMPUTE},5mb;acc:1,*"
IN_RAM = f"{COMPUTE},5mb;cpu,*"
SHORT = "of homes are to come to RAM"


@pytest.fixture
def told(monkeypatch, caplog):
    """What was said of RAM, and what was let go, so far."""
    monkeypatch.setattr(logging.getLogger("MultiGPU"), "propagate", True)
    caplog.set_level(logging.INFO, logger="MultiGPU")
    return lambda words=SHORT: [m for m in caplog.messages if words in m]


@pytest.fixture
def retention(bench):
    if bench.multigpu <= (2, 5, 0):
        pytest.skip("this MultiGPU frees everything after a load that is not kept")
    return bench.plugin._memory.retention


@pytest.fixture
def ram(bench, monkeypatch):
    """Sets how much RAM is left, and is in all, in bytes."""

    def ram(available, total=1 << 30):
        monkeypatch.setattr(bench.module("device_utils"), "ram", lambda: (available, total))

    return ram


def test_homes_that_ram_has_no_room_for_are_told_once_before_they_are_made(
    bench, ram, told, retention, reference
):
    """From an accelerator to RAM: nothing of it is there yet, and no file is read."""
    kept = {"2": bench.distorch(IN_RAM, unet_name="other.safetensors", keep_loaded=True)}
    bench.sample(kept)
    bench.sample(bench.distorch(HERE, keep_loaded=True))
    assert told() == [] and len(retention) == 2
    ram(2 << 20, total=8 << 20)
    assert bench.sample(bench.distorch(IN_RAM, keep_loaded=True)).equal(reference[1])
    assert len(retention) == 1  # what runs is not let go for itself
    assert len(told("no longer kept, RAM is short")) == 1
    (line,) = told()
    for help_ in (f"a larger quota for {COMPUTE}", "another donor", "a smaller format"):
        assert help_ in line
    assert bench.sample(bench.distorch(IN_RAM, keep_loaded=True), seed=2).equal(reference[2])
    assert len(told()) == 1


def test_with_room_nothing_is_said_and_all_stays(bench, told, ram, retention):
    ram(1 << 29)
    kept = {"2": bench.distorch(IN_RAM, unet_name="other.safetensors", keep_loaded=True)}
    bench.sample(kept)
    bench.sample(bench.distorch(HERE, keep_loaded=True))
    bench.sample(bench.distorch(IN_RAM, keep_loaded=True))
    assert told() == [] and len(retention) == 2


def test_weights_that_are_in_ram_already_take_no_more(bench, told, ram):
    """ComfyUI has copied them out of the file."""
    patcher = bench.load(bench.distorch(IN_RAM))
    ram(0)
    with torch.inference_mode():
        bench.mm.load_models_gpu([patcher])
    assert told() == []


def test_weights_that_are_pages_of_a_file_do(bench, told, ram):
    """A GGUF is mapped: its homes are what takes RAM, when it is loaded."""
    patcher = bench.load(loader(bench, "Q8_0", f"{COMPUTE},9mb;cpu,*"))
    ram(0)
    with torch.inference_mode():
        bench.mm.load_models_gpu([patcher])
    assert len(told()) == 1
    coming, swapped = float(told()[0].split()[3]), bench.state(patcher).split.bytes_on("cpu")
    assert 0.98 * swapped < coming * (1 << 20) <= swapped
