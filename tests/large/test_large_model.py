"""A load of 2 GB takes no more memory than it must: the model's size, and one block."""

import pytest

from rig import host_memory, simulator

MIB = 1 << 20
SLACK = 300 * MIB
# What a process may keep of a model that was ejected: 95% of it at the least are given back.
REST = 100 * MIB


@pytest.fixture(autouse=True)
def empty(host):
    """Every test leaves the process without a model, and its memory where it was."""
    before = host_memory.read()["rss"]
    yield
    host.free(unload_models=True, free_memory=True)
    rest = host_memory.read()["rss"] - before
    print(f"{rest / MIB:.0f} MiB are left after free")
    assert set(simulator.ledger.allocated.values()) == {0}
    assert rest < REST


def check(load, quota):
    """The figures of a load against their bounds; `quota` in MiB. Shown by `pytest -s`.

    A simulated device's memory lies in the process: what is resident there, and has a home in RAM
    as well, counts twice. Slots take no pages before a copy is made to them.
    """
    bound = load.model + load.homes + load.backup + load.block + SLACK
    peaks = {"load": load.peak, "prompt": load.prompt_peak}
    above = {
        what: {name: value - load.before[name] for name, value in peak.items()}
        for what, peak in peaks.items()
    }
    for what, values in above.items():
        shown = ", ".join(f"{name} {value / MIB:.0f}" for name, value in values.items())
        print(f"{what}: {shown}; bound {bound / MIB:.0f} MiB")
    print(f"device: {load.device_peak / MIB:.0f} MiB; model {load.model / MIB:.0f}, ", end="")
    print(f"block {load.block / MIB:.0f}, homes {load.homes / MIB:.0f}, ", end="")
    print(f"backup {load.backup / MIB:.0f}")
    assert above["load"]["rss"] < bound
    # While ComfyUI's loader reads the file, its pages are mapped beside the weights read so far.
    assert above["prompt"]["anon"] < bound
    assert load.device_peak <= quota * MIB + load.block
    assert not load.mapped


# The second one finds a heap with the holes that the first one has left. So does the second expert
# of Wan 2.2.
@pytest.mark.parametrize("nth", ["first", "second"])
def test_loading_takes_the_models_size_and_one_block(load, nth):
    figures = load("large", "acc:0,700mb;cpu,*")
    assert figures.model > 1.9 * (1 << 30)
    assert figures.backup == 0
    check(figures, 700)


def test_with_a_lora_on_every_block_also_the_originals_that_it_patches(load):
    # The device's temporaries would leave holes in the heap here, which those of a real one do not.
    host_memory.return_freed_memory_at_once()
    figures = load("patched", "acc:0,300mb;cpu,*", lora="patched")
    assert 0.9 * figures.model < figures.backup < figures.model
    check(figures, 300)
