"""Every Wan class of the host, small, swapped: the output of the unswapped model, bit for bit."""

import contextlib
import importlib
import inspect
import logging
import pkgutil
import types
from unittest import mock

import pytest
import torch

from conftest import CACHE, COMPUTE
from rig import comfy_host, simulator, wan_classes
from rig.wan_classes import DIM, Case, inputs

ledger = simulator.ledger
SEEDS = (1, 2, 3)
pytestmark = pytest.mark.usefixtures("static_split")

LARGE = 1 << 20  # a block has 3 MB, all inputs of a small Wan together have less than this


def pytest_generate_tests(metafunc):
    """One test per class, or per way to call it; a class without any is a test that fails."""
    if "name" not in metafunc.fixturenames:
        return
    source = comfy_host.fetch(metafunc.config.getoption("comfyui"), CACHE)
    first = 1 if metafunc.function is test_every_block_shows_in_the_output else None
    pairs = [
        (name, case)
        for name in wan_classes.find(source)
        for case in list(wan_classes.CASES.get(name.rpartition(".")[2], ["none"]))[:first]
    ]
    ids = [f"{name.rpartition('.')[2]}-{case}" for name, case in pairs]
    metafunc.parametrize(("name", "case"), pairs, ids=ids)


# What an allocation asks for, given a model: bytes of everything but blocks, of a block, blocks.
SPLITS = {
    "half": lambda rest, block, count: f"acc:0,{rest + (count - count // 2 + 1) * block}b;cpu,*",
    "everything": lambda rest, block, count: "cpu,*",
    "two donors": lambda rest, block, count: f"acc:0,1b;acc:1,{count // 2 * block}b;cpu,*",
}


class Inner(torch.nn.Module):
    """What ComfyUI has around a diffusion model, as far as patchers and this plugin need it."""

    def __init__(self, diffusion_model):
        super().__init__()
        self.diffusion_model = diffusion_model


class Subject:
    """A small Wan, loaded, swapped or not."""

    def __init__(self, bench, model, case, allocation=None):
        import comfy.model_patcher

        self.bench, self.model, self.case = bench, model, case
        self.inner = Inner(model)
        if allocation is not None:
            self.inner._distorch_v2_meta = {"full_allocation": allocation + "#" + COMPUTE}
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.inner, torch.device(COMPUTE), torch.device("cpu")
        )

    def load(self):
        with torch.inference_mode():
            self.bench.mm.load_models_gpu([self.patcher])
        return self

    def run(self, seed=1, **options):
        """The output of one call with the inputs of a seed, on the CPU."""
        arguments = self.case.inputs(torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            arguments = wan_classes.at(arguments, COMPUTE)
            arguments["transformer_options"].update(options)
            return self.case.call(self.model, arguments).cpu()

    @property
    def state(self):
        return self.bench.state(self.patcher)

    def moved(self, seed=1, **options):
        """The output of a call and the sizes of the blocks that travelled during it."""
        start = len(ledger.copies)
        out = self.run(seed, **options)
        copies = [copy for copy in ledger.copies[start:] if copy.nbytes >= LARGE]
        assert all(copy.destination == COMPUTE for copy in copies)
        return out, sorted(copy.nbytes for copy in copies)

    def due(self, uses=1):
        """The sizes of the swapped parts that ever run: embeddings once, blocks once per use."""
        split = self.state.split
        blocks, parts = len(split.sizes.blocks), split.sizes.parts
        travelling = [
            parts[i].nbytes
            for i in split.swapped
            if i not in self.state.swap.idle
            for _ in range(uses if i < blocks else 1)
        ]
        return sorted(nbytes for nbytes in travelling if nbytes >= LARGE)

    def assert_at_home(self):
        """Nothing of the pass is left, and every block lies where the split says."""
        for part, home in zip(self.state.split.sizes.parts, self.homes, strict=True):
            block = self.model.get_submodule(part.name)
            devices = {str(t.device) for t in (*block.parameters(), *block.buffers())}
            assert devices == {home}

    @property
    def homes(self):
        return self.state.split.homes


def allocation(split, model):
    """An allocation for `model`, of the kind that `SPLITS` names."""
    sizes = {
        id(block): sum(-(-t.nbytes // 256) * 256 for t in block.parameters())
        for name, child in model.named_children()
        if name == "blocks" or name == "vace_blocks"
        for block in child
    }
    whole = sum(-(-t.nbytes // 256) * 256 for t in (*model.parameters(), *model.buffers()))
    return SPLITS[split](whole - sum(sizes.values()), max(sizes.values()), len(sizes))


@pytest.fixture(scope="module", autouse=True)
def armed(bench):
    """The plugin patches ComfyUI when the first DisTorch2 loader runs."""
    bench.load(bench.distorch("acc:0,8mb;cpu,*"))


@pytest.fixture(scope="module")
def unswapped(bench):
    """Outputs of models that ComfyUI alone loads to the compute device, by key."""
    outputs = {}

    def of(key, model, case, **options):
        if key not in outputs:
            subject = Subject(bench, model(), case).load()
            outputs[key] = [subject.run(seed, **options) for seed in SEEDS]
            assert all(torch.isfinite(out).all() for out in outputs[key])
            bench.clear()
            ledger.clear_copies()
        return outputs[key]

    return of


def case_of(name, case):
    if case not in wan_classes.CASES.get(name.rpartition(".")[2], {}):
        pytest.fail(f"ComfyUI has a Wan class that the tests have no inputs for: {name}")
    return wan_classes.load(name), wan_classes.CASES[name.rpartition(".")[2]][case]


def check(subject, expected, **options):
    """Run a swapped model: bit-equal, at home, and one copy per use from the second call on."""
    uses = subject.case.uses
    split = subject.state.split
    assert len(split.swapped) > split.slots > 0
    weights = {k: v.cpu().clone() for k, v in subject.model.state_dict().items()}
    for call, (seed, unswapped) in enumerate(zip(SEEDS, expected, strict=False)):
        out, moved = subject.moved(seed, **options)
        assert torch.equal(out, unswapped)
        subject.assert_at_home()
        if call:
            assert moved == subject.due(uses)
        else:
            assert moved
    for key, value in subject.model.state_dict().items():
        assert torch.equal(value.cpu(), weights[key])
    simulator.check()


# ------------------------------------------------------------------------------ every class


def test_every_class_is_found(bench, pytestconfig):
    """What the sources say is what the host has, and holds whatever ComfyUI builds a model of."""
    source = comfy_host.fetch(pytestconfig.getoption("comfyui"), CACHE)
    found = {wan_classes.load(name) for name in wan_classes.find(source)}
    package = importlib.import_module(wan_classes.PACKAGE)
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(package.__path__, wan_classes.PACKAGE + ".")
    ]
    classes = {
        cls
        for module in modules
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__.startswith(wan_classes.PACKAGE)
    }
    assert {cls for cls in classes if issubclass(cls, tuple(found))} == found
    # A diffusion model of ComfyUI takes operations and has a forward of a timestep and a context.
    wanted = {"x", "timestep", "context"}
    models = {
        cls
        for cls in classes
        if issubclass(cls, torch.nn.Module)
        and wanted <= set(inspect.signature(cls.forward).parameters)
    }
    assert models == found


def test_every_block_shows_in_the_output(name, case):
    cls, case = case_of(name, case)
    model = wan_classes.build(cls, case)

    def run():
        with torch.inference_mode():
            return case.call(model, case.inputs(torch.Generator().manual_seed(1)))

    expected = run()
    for blocks in (model.blocks, getattr(model, "vace_blocks", ())):
        for block in blocks:
            with torch.no_grad():
                before = block.modulation.clone()
                block.modulation.add_(0.5)
                assert not torch.equal(run(), expected)
                block.modulation.copy_(before)
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("split", ["half", "everything"])
def test_swapped_is_unswapped(bench, unswapped, name, case, split):
    cls, way = case_of(name, case)
    expected = unswapped((name, case), lambda: wan_classes.build(cls, way), way)
    model = wan_classes.build(cls, way)
    subject = Subject(bench, model, way, allocation(split, model)).load()
    names = [block.name for block in subject.state.split.sizes.blocks]
    lists = {"blocks": model.blocks, "vace_blocks": getattr(model, "vace_blocks", ())}
    wanted = [f"{key}.{i}" for key, blocks in lists.items() for i in range(len(blocks))]
    assert set(wanted) <= set(names)
    swapped = [names[i] for i in subject.state.split.swapped]
    if split != "half":
        assert len(swapped) == len(names)
    for key, blocks in lists.items():
        share = sum(other.startswith(key + ".") for other in swapped)
        # Of blocks of different sizes, half of the bytes may be one list.
        assert (0 if key == "vace_blocks" else 1) <= share <= len(blocks)
    check(subject, expected[:2] if split == "half" else expected)


# ------------------------------------------------------------------------- what loops may do


def looping(loop):
    """A Wan class whose forward does `loop(model, run, x)` with its blocks; `run` runs one."""
    from comfy.ldm.wan import model as wan

    class Block(wan.WanAttentionBlock):
        def forward_pose(self, x, **arguments):
            return self(x, **arguments) * 0.5 + self.norm2(x)

    class Looping(wan.WanModel):
        def __init__(self, **arguments):
            super().__init__(wan_attn_block_class=Block, **arguments)

        def forward_orig(self, x, t, context, freqs=None, **_):
            x = self.patch_embedding(x)
            grid = x.shape[2:]
            x = x.flatten(2).transpose(1, 2)
            e = self.time_embedding(wan.sinusoidal_embedding_1d(self.freq_dim, t).to(x.dtype))
            e0 = self.time_projection(e).unflatten(1, (6, self.dim))
            given = {"e": e0, "freqs": freqs, "context": self.text_embedding(context)}
            x = self.loop(lambda block, x: block(x, **given), x, given)
            return self.unpatchify(self.head(x, e), grid)

    Looping.loop = loop
    return Looping


def _plain(self, run, x, _):
    for block in self.blocks:
        x = run(block, x)
    return x


def _skips(self, run, x, _):
    for i, block in enumerate(self.blocks):
        if i in (1, 4):
            continue
        x = run(block, x)
    return x


def _stops(self, run, x, _):
    for i, block in enumerate(self.blocks):
        if i == 4:
            break
        x = run(block, x)
    return x


def _twice(self, run, x, _):
    for _ in range(2):
        for block in self.blocks:
            x = run(block, x)
    return x


def _each_twice(self, run, x, _):
    for block in self.blocks:
        x = run(block, run(block, x))
    return x


def _each_taken_twice(self, run, x, _):
    for i in range(len(self.blocks)):
        for _ in range(2):
            x = run(self.blocks[i], x)
    return x


def _other_methods(self, run, x, given):
    for block in self.blocks:
        x = block.forward_pose(x, **given)
        x = x + block.ffn(block.norm2(x))
    return x


def _pose_then_all(self, run, x, given):
    pose = x
    for block in self.blocks[:4]:
        pose = block.forward_pose(pose, **given)
    for block in self.blocks:
        x = run(block, x + 0.1 * pose)
    return x


def _by_index(self, run, x, _):
    for i in range(len(self.blocks)):
        x = run(self.blocks[i], x)
    return x


def _backwards(self, run, x, _):
    for block in reversed(self.blocks):
        x = run(block, x)
    return run(self.blocks[-1], x)


def _by_slices(self, run, x, _):
    for part in (self.blocks[::2], self.blocks[1::2]):
        for block in part:
            x = run(block, x)
    return x


def _looks_ahead(self, run, x, _):
    dtype, width = self.blocks[0].modulation.dtype, self.blocks[-1].ffn[0].weight.shape[1]
    for block in self.blocks:
        x = run(block, x.to(dtype)[..., :width])
    return x


def _in_pairs(self, run, x, _):
    for one, other in zip(self.blocks[::2], self.blocks[1::2], strict=True):
        x = run(one, x) + run(other, x)
    return x


def _queued_first(self, run, x, _):
    queue = list(self.blocks)  # what `comfy.model_prefetch` is given before the loop
    for block in self.blocks:
        x = run(block, x)
    return x if len(queue) == len(self.blocks) else None


# The loop, and how many blocks travel in a call when all six are swapped through two slots.
LOOPS = {
    "plain": (_plain, 6),
    "by index": (_by_index, 6),
    "by slices": (_by_slices, 6),
    "skips": (_skips, 4),
    "stops": (_stops, 4),
    "twice": (_twice, 12),
    "each twice": (_each_twice, 6),
    "each taken twice": (_each_taken_twice, 6),
    "other methods": (_other_methods, 6),
    # 0, 1, 2, 3, then all: what is taken again at once does not travel again.
    "pose, then all": (_pose_then_all, 10),
    # The last one of a call is the first one of the next.
    "backwards": (_backwards, 6),
    "looks ahead": (_looks_ahead, 6),
    "in pairs": (_in_pairs, 6),
    "queued first": (_queued_first, 6),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_of_any_kind(bench, unswapped, loop):
    function, travels = LOOPS[loop]
    case = Case(inputs())
    expected = unswapped(loop, lambda: wan_classes.build(looping(function), case), case)
    model = wan_classes.build(looping(function), case)
    subject = Subject(bench, model, case, allocation("everything", model)).load()
    moves = []
    for seed, out in zip(SEEDS, expected, strict=True):
        got, moved = subject.moved(seed)
        assert torch.equal(got, out)
        subject.assert_at_home()
        moves.append(len(moved))
    simulator.check()
    assert moves[1:] == [travels] * 2


# -------------------------------------------------------------------- what nodes do to a Wan


def small(seed=0, cls="WanModel", **arguments):
    """A text-to-video Wan, and how it is called."""
    case = Case(inputs(), arguments)
    return wan_classes.build(wan_classes.load(f"model.{cls}"), case, seed), case


def pair(bench, unswapped, **options):
    """A swapped text-to-video Wan and what it would give unswapped, with transformer options."""
    model, case = small()
    plain = unswapped("small", lambda: small()[0], case)
    expected = unswapped(("small", *options), lambda: small()[0], case, **options)
    assert not options or not torch.equal(plain[0], expected[0])
    return Subject(bench, model, case, allocation("everything", model)).load(), expected


def _calls_it(arguments, original):
    return {"img": original["original_block"](arguments)["img"] * 0.9}


def _calls_it_twice(arguments, original):
    once = original["original_block"](arguments)["img"]
    return original["original_block"]({**arguments, "img": once})


def _leaves_it_out(arguments, original):
    return {"img": arguments["img"]}


def test_a_replaced_block_call(bench, unswapped):
    replaced = {
        ("double_block", 0): _calls_it,
        ("double_block", 2): _calls_it_twice,
        ("double_block", 3): _leaves_it_out,
        ("double_block", 5): _calls_it,
    }
    options = {"patches_replace": {"dit": replaced}}
    subject, expected = pair(bench, unswapped, **options)
    check(subject, expected, **options)


def test_attention_patches(bench, unswapped):
    def patch(arguments):
        return arguments["x"] * 1.1

    options = {"patches": {"attn1_patch": [patch], "attn2_patch": [patch]}}
    subject, expected = pair(bench, unswapped, **options)
    check(subject, expected, **options)


def test_multitalk_runs_blocks_of_its_own_beside_the_swapped_ones(bench):
    """InfiniteTalk and MultiTalk: a second model with a list `blocks`, read by a patch."""
    import comfy.ops
    from comfy.ldm.wan import model_multitalk

    width = 640  # the audio attention has 40 heads
    arguments = {"dim": width, "num_heads": 5, "num_layers": 4}
    audio = torch.nn.Module()
    audio.blocks = torch.nn.ModuleList(
        model_multitalk.WanMultiTalkAttentionBlock(
            width, 32, operations=comfy.ops.disable_weight_init
        )
        for _ in range(4)
    )
    wan_classes.randomise(audio, seed=5)
    outputs = []
    for text in (None, "cpu,*", "acc:0,50mb;cpu,*"):
        model, case = small(**arguments)
        subject = Subject(bench, model, case, text)
        other = type(subject.patcher)(audio, torch.device(COMPUTE), torch.device("cpu"))
        with torch.inference_mode():
            bench.mm.load_models_gpu([other, subject.patcher])
        patches = {"attn2_patch": [model_multitalk.MultiTalkCrossAttnPatch(other)]}
        embeds = torch.randn((1, 2, 6, 32), generator=torch.Generator().manual_seed(3))
        options = {"patches": patches, "audio_embeds": embeds.to(COMPUTE)}
        outputs.append([subject.run(seed, **options) for seed in SEEDS])
        assert not torch.equal(outputs[-1][0], subject.run())
        assert {t.device for t in audio.parameters()} == {torch.device(COMPUTE)}
        if text:
            assert len(subject.state.split.swapped) > 2
            subject.assert_at_home()
            assert subject.moved(1, **options)[1] == subject.due()
        bench.clear()
    for swapped in outputs[1:]:
        for one, expected in zip(swapped, outputs[0], strict=True):
            assert torch.equal(one, expected)


def _teacache(model):
    """A forward_orig that skips the blocks on every other call, as TeaCache does."""
    calls = []

    def forward_orig(self, x, t, context, freqs=None, **_):
        from comfy.ldm.wan import model as wan

        x = self.patch_embedding(x)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        e = self.time_embedding(wan.sinusoidal_embedding_1d(self.freq_dim, t).to(x.dtype))
        e0 = self.time_projection(e).unflatten(1, (6, self.dim))
        context = self.text_embedding(context)
        calls.append(len(calls))
        if len(calls) % 2 == 0:
            x = x + self.residual
        else:
            before = x
            for block in self.blocks:
                x = block(x, e=e0, freqs=freqs, context=context)
            self.residual = x - before
        return self.unpatchify(self.head(x, e), grid)

    return types.MethodType(forward_orig, model), calls


@pytest.mark.parametrize("when", ["before the load", "after the load"])
def test_forward_orig_set_on_the_instance(bench, when):
    outputs = []
    for text in (None, "cpu,*"):
        model, case = small()
        subject = Subject(bench, model, case, text)
        if when == "after the load":
            subject.load()
        model.forward_orig, calls = _teacache(model)
        subject.load()
        outputs.append([subject.run(seed) for seed in (1, 2, 3, 4)])
        assert len(calls) == 4
        if text:
            subject.assert_at_home()
            assert subject.moved(5)[1] == subject.due()  # with its blocks
            assert subject.moved(6)[1] == []  # without
        bench.clear()
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)


def test_forward_orig_replaced_for_one_call_and_put_back(bench, unswapped):
    """TeaCache for Wan does so with `mock.patch.multiple` around every call."""
    subject, expected = pair(bench, unswapped)
    for seed, out in zip(SEEDS, expected, strict=True):
        replacement, calls = _teacache(subject.model)
        with mock.patch.multiple(subject.model, forward_orig=replacement):
            subject.run(seed)
        assert calls == [0]
        assert torch.equal(subject.run(seed), out)
        subject.assert_at_home()


def test_forward_orig_set_while_loaded_outlives_the_unloading(bench):
    model, case = small()
    subject = Subject(bench, model, case, "cpu,*").load()
    model.forward_orig, calls = _teacache(model)
    expected = subject.run()
    for _ in range(2):
        bench.clear()
        assert "forward_orig" in vars(model)
        subject.load()
        calls.clear()
        assert torch.equal(subject.run(), expected)
        assert calls == [0]


def test_what_a_node_puts_back_after_an_unloading_is_harmless(bench, unswapped):
    subject, expected = pair(bench, unswapped)
    model = subject.model
    subject.run()
    kept = model.forward_orig
    model.forward_orig = None
    bench.clear()
    model.forward_orig = kept
    moved = len(ledger.copies)
    arguments = subject.case.inputs(torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(subject.case.call(model, arguments), expected[0])
    assert len(ledger.copies) == moved
    assert ledger.allocated[COMPUTE] < LARGE
    for _ in range(2):
        subject.load()
        assert torch.equal(subject.run(), expected[0])
        assert subject.moved()[1] == subject.due()
        bench.clear()


def test_what_was_set_before_the_load_is_there_after_the_unloading(bench):
    model, case = small()
    model.forward_orig, _ = _teacache(model)
    before = dict(vars(model))
    subject = Subject(bench, model, case, "cpu,*").load()
    subject.run()
    bench.clear()
    assert vars(model).keys() - before.keys() <= {"residual"}
    assert vars(model)["forward_orig"] is before["forward_orig"]


def _halves(model):
    """An object patch for a model: its class's forward_orig, halved."""

    def forward_orig(*args, **kwargs):
        return type(model).forward_orig(model, *args, **kwargs) * 0.5

    return forward_orig


@pytest.mark.parametrize("first", ["patched", "plain"])
def test_object_patches_of_forward_orig_come_and_go_with_their_clone(bench, unswapped, first):
    """Clones share the model; one has `add_object_patch("diffusion_model.forward_orig", ...)`."""
    subject, (expected, *_) = pair(bench, unswapped)
    bench.clear()
    model, plain = subject.model, subject.patcher
    patched = plain.clone()
    patched.add_object_patch("diffusion_model.forward_orig", _halves(model))
    order = [(patched, 0.5), (plain, 1)]
    if first == "plain":
        order.reverse()
    for _ in range(2):
        for patcher, factor in order:
            subject.patcher = patcher
            subject.load()
            assert torch.equal(subject.run(), expected * factor)
            assert subject.moved()[1] == subject.due()
        bench.clear()
        left = [key for key in ("forward", "forward_orig") if key in vars(model)]
        # ComfyUI puts the class's method back by setting it on the instance.
        assert all(getattr(vars(model)[key], "__self__", None) is model for key in left)


def test_two_experts_in_turn(bench, unswapped):
    """Wan 2.2: two models, loaded together or in turn, each with a split of its own."""
    (high, case), (low, _) = small(1), small(2)
    expected = [unswapped(seed, lambda seed=seed: small(seed)[0], case) for seed in (1, 2)]
    subjects = [
        Subject(bench, high, case, allocation("half", high)),
        Subject(bench, low, case, allocation("two donors", low)),
    ]
    for together in (True, False):
        for call, seed in enumerate(SEEDS):
            for subject, outputs in zip(subjects, expected, strict=True):
                with torch.inference_mode():
                    wanted = subjects if together else [subject]
                    bench.mm.load_models_gpu([one.patcher for one in wanted])
                out, moved = subject.moved(seed)
                assert torch.equal(out, outputs[call])
                if together and call:
                    assert moved == subject.due()
                subject.assert_at_home()
    simulator.check()


# --------------------------------------------------------------------- no blocks to be found


def blockless(bench, make_list):
    """A class of a Wan module that keeps its layers elsewhere, loaded with an allocation."""
    import comfy.ops

    class Novel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layers = [comfy.ops.manual_cast.Linear(DIM, DIM) for _ in range(6)]
            make_list(self, layers)
            self.order = [layer for layer in self.modules() if hasattr(layer, "in_features")]

        def forward(self, x, transformer_options):
            for layer in self.order:
                x = torch.relu(layer(x))
            return x

    Novel.__module__ = wan_classes.PACKAGE + ".novel"

    def make(text=None):
        model = Novel()
        wan_classes.randomise(model, 4)
        noise = lambda g: {"x": torch.randn((4, DIM), generator=g), "transformer_options": {}}  # noqa: E731
        subject = Subject(bench, model.requires_grad_(False), Case(noise), text)
        if text is not None:
            bench.allocate(subject.patcher, f"{text}#{COMPUTE}")
        return subject

    return make


def _no_list(model, layers):
    model.first, model.second = torch.nn.Sequential(*layers[:3]), torch.nn.Sequential(*layers[3:])


def _empty_list(model, layers):
    _no_list(model, layers)
    model.blocks = torch.nn.ModuleList()


def _sequential(model, layers):
    model.blocks = torch.nn.Sequential(*layers)


blockless_kinds = pytest.mark.parametrize("make_list", [_no_list, _empty_list, _sequential])


@blockless_kinds
def test_without_blocks_multigpus_own_path_is_taken(bench, make_list):
    bench.needs_multigpu(2, 5, 11)  # ComfyUI's load list has had further fields since 0.6
    make = blockless(bench, make_list)
    expected = [make().load().run(seed) for seed in SEEDS]
    bench.clear()
    # Not bytes on the CPU: MultiGPU rounds them to parts of all RAM, which is nothing here.
    subject = make("acc:0,40%;acc:1,60%").load()
    plugin = bench.module("model_lookup")
    assert not plugin.is_swapped_here(subject.patcher)
    assert not hasattr(subject.inner, plugin.STATE)
    # MultiGPU has placed single layers.
    assert {str(t.device) for t in subject.model.parameters()} == {COMPUTE, "acc:1"}
    for seed, out in zip(SEEDS, expected, strict=True):
        assert torch.equal(subject.run(seed), out)


@blockless_kinds
def test_without_blocks_one_line_says_so(bench, caplog, make_list):
    bench.needs_multigpu(2, 5, 11)
    subject = blockless(bench, make_list)("acc:0,1mb;cpu,*")
    logger = logging.getLogger("MultiGPU")
    with caplog.at_level(logging.INFO, logger="MultiGPU"), _heard(logger, caplog.handler):
        subject.load()
        subject.run()
        subject.load()
    # A logger that propagates brings the same record twice.
    records = {id(record): record.getMessage() for record in caplog.records}
    lines = [message for message in records.values() if "block" in message.lower()]
    assert len(lines) == 1
    assert "Novel" in lines[0]
    assert "\n" not in lines[0]


@contextlib.contextmanager
def _heard(logger, handler):
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
