"""Every transformer class of the host, small, swapped: the unswapped output, bit for bit."""

import pytest
import torch

from conftest import CACHE, COMPUTE
from rig import comfy_host, simulator
from rig.zoo import catalog
from rig.zoo.hosted import Inner, built, equal, load

ledger = simulator.ledger
SEEDS = (1, 2, 1)
pytestmark = pytest.mark.usefixtures("static_split")

# What an allocation asks for, given the bytes of the largest block.
SPLITS = {
    "half": lambda largest: "acc:0,50%;cpu,50%",
    "all": lambda largest: "cpu,*",
    "one": lambda largest: f"cpu,{largest}b;acc:0,*",
    "two donors": lambda largest: "acc:0,20%;acc:1,30%;cpu,*",
}


def pytest_generate_tests(metafunc):
    """One test per class that this host has, or per way to build and call it."""
    if "name" not in metafunc.fixturenames:
        return
    source = comfy_host.fetch(metafunc.config.getoption("comfyui"), CACHE)
    names = catalog.present(source)
    ways = [(name, way) for name in names for way in catalog.RECIPES[name]]
    ids = [f"{name.rpartition('.')[2]}-{way}" for name, way in ways]
    metafunc.parametrize(("name", "way"), ways, ids=ids)


class Swapped:
    """An instance that the plugin has loaded, and what its calls take and move."""

    def __init__(self, bench, name, way, allocation, operations="disable_weight_init"):
        import comfy.model_patcher

        self.instance = built(name, way, operations)
        self.patcher = comfy.model_patcher.ModelPatcher(
            Inner(self.instance.model), torch.device(COMPUTE), torch.device("cpu")
        )
        self.patcher.model._distorch_v2_meta = {"full_allocation": f"{allocation}#{COMPUTE}"}
        with torch.inference_mode():
            bench.mm.load_models_gpu([self.patcher])
        self.state = bench.state(self.patcher)
        self.swap = self.state.swap
        self.taken, self.moved = [], []
        enter, fill = self.swap.enter_block, self.swap._fill

        def enter_block(index):
            if self.taken[-1:] != [index]:
                self.taken.append(index)
            enter(index)

        def filled(slot, index):
            self.moved.append(index)
            return fill(slot, index)

        self.swap.enter_block, self.swap._fill = enter_block, filled

    def call(self, seed):
        self.taken.clear()
        self.moved.clear()
        return self.instance.call(seed, COMPUTE)

    def assert_at_home(self):
        split, model = self.state.split, self.instance.model
        for part, pack, home in zip(split.sizes.parts, self.state.packs, split.homes, strict=True):
            assert str(pack.device) == home, part.name
            for weight in pack._weights:
                assert str(weight.table[weight.name].device) == home, part.name
        assert {str(w.device) for w in model.parameters()} <= {*split.homes, COMPUTE}


@pytest.fixture(scope="module")
def unswapped(bench):
    """Outputs of models that ComfyUI alone loads to the simulated device."""
    outputs = {}

    def of(name, way):
        if (name, way) not in outputs:
            instance = built(name, way)
            load(bench, instance, COMPUTE)
            outputs[name, way] = [instance.call(seed, COMPUTE) for seed in SEEDS]
            bench.clear()
        return outputs[name, way]

    return of


@pytest.fixture(scope="module", autouse=True)
def armed(bench):
    """The plugin patches ComfyUI when the first DisTorch2 loader runs."""
    bench.load(bench.distorch("acc:0,8mb;cpu,*"))
    bench.clear()


def largest_block(bench, model):
    blocks = bench.module("model_blocks").parts_of(model).blocks
    sizes = [
        sum(-(-t.nbytes // 256) * 256 for t in (*part.module.parameters(), *part.module.buffers()))
        for part in blocks
    ]
    return max(sizes, default=0)


@pytest.mark.parametrize("split", SPLITS)
def test_swapped_is_unswapped(bench, unswapped, name, way, split):
    expected = unswapped(name, way)
    largest = largest_block(bench, built(name, way).model)
    assert largest, "no blocks were found"
    subject = Swapped(bench, name, way, SPLITS[split](largest))
    plan = subject.state.split
    assert any(home != COMPUTE for home in plan.homes)
    if split == "one":
        assert len(plan.swapped) < len(plan.sizes.parts)
    for call, (seed, out) in enumerate(zip(SEEDS, expected, strict=True)):
        assert equal(subject.call(seed), out)
        subject.assert_at_home()
        simulator.check()
        if call == 0:
            continue
        swapped = set(plan.swapped)
        taken = [index for index in subject.taken if index in swapped]
        if call == 2:
            assert len(subject.moved) <= len(taken)
            assert set(subject.moved) <= set(taken)
        if len(set(taken)) == len(taken) > len(subject.swap._slots) and call == 2:
            assert sorted(subject.moved) == sorted(taken)
    assert swapped & subject.swap.idle == swapped - set(subject.taken) or len(expected) != 3
    bench.clear()


# What a model reads of a block that it does not call, in bytes: the codes of a quantizer.
READS = {("comfy.ldm.ace.ace_step15.AceStepConditionGenerationModel", "with codes"): [1536000]}


def test_casting_is_casting_on_the_compute_device(bench, unswapped, name, way):
    """With manual_cast a wrong device is silently right, and slow: weights travel one by one."""

    def copies_of(call):
        start = len(ledger.copies)
        out = call()
        copies = (c for c in ledger.copies[start:] if c.destination == COMPUTE)
        return out, sorted(copy.nbytes for copy in copies if copy.source == "cpu")

    outputs = unswapped(name, way)
    plain = built(name, way, "manual_cast")
    load(bench, plain, COMPUTE)
    given = [copies_of(lambda seed=seed: plain.call(seed, COMPUTE))[1] for seed in SEEDS]
    bench.clear()
    subject = Swapped(bench, name, way, "cpu,*", operations="manual_cast")
    rows = []
    for table in subject.state.split.sizes.tables:
        module = subject.instance.model.get_submodule(table.name)
        module.register_forward_hook(lambda _, __, out: rows.append(out.nbytes))
    for seed, expected, inputs in zip(SEEDS, outputs, given, strict=True):
        rows.clear()
        out, up = copies_of(lambda seed=seed: subject.call(seed))
        assert equal(out, expected)
        packs = [subject.state.packs[index].nbytes for index in subject.moved]
        if way == "tokens":  # scores are products with the whole table, for every token
            rows += [t.nbytes for t in subject.state.split.sizes.tables for _ in range(3)]
        assert up == sorted([*inputs, *packs, *rows, *READS.get((name, way), [])])
    bench.clear()


@pytest.fixture
def in_parts(bench, monkeypatch):
    """Blocks move in parts wherever they can."""
    layout = bench.module("model_layout")
    monkeypatch.setattr(bench.module("model_blocks"), "PART_BYTES", 1 << 10)
    monkeypatch.setattr(bench.module("split_chooser"), "is_better", lambda parts, whole: True)
    return layout


def test_in_parts_is_unswapped(bench, unswapped, in_parts, name, way):
    expected = unswapped(name, way)
    subject = Swapped(bench, name, way, "cpu,*")
    if not subject.state.layout.wholes:
        bench.clear()
        pytest.skip("no block of it has parts")
    for call, (seed, out) in enumerate(zip(SEEDS, expected, strict=True)):
        assert equal(subject.call(seed), out)
        subject.assert_at_home()
        simulator.check()
        # A part whose child others call would travel twice.
        if call == 2 and len(set(subject.taken)) == len(subject.taken):
            assert sorted(subject.moved) == sorted(subject.taken)
    bench.clear()
