"""Splits: properties over random models and strings, and the cases that have one right answer."""

from fractions import Fraction
from itertools import chain, combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from block_swap.allocation_parser import AllocationError, Mode, parse_allocation
from block_swap.split import Block, ModelSizes
from block_swap.split_planner import plan_split, refit_split
from block_swap.swap_choice import spread

MIB = 1 << 20
DEVICES = ("cpu", "acc:0", "acc:1", "acc:2")
MEMORY = {"cpu": 4096 * MIB, "acc:0": 1024 * MIB, "acc:1": 1024 * MIB, "acc:2": 512 * MIB}


def uniform(count=8, nbytes=10 * MIB, non_block=5 * MIB, min_slots=1):
    blocks = tuple(Block(f"blocks.{i}", nbytes) for i in range(count))
    return ModelSizes(blocks, non_block, min_slots)


def plan(text, sizes=None, compute="acc:0"):
    return plan_split(parse_allocation(text, DEVICES, compute), sizes or uniform(), MEMORY)


model_sizes = st.builds(
    lambda sizes, non_block, min_slots, embeddings: ModelSizes(
        tuple(Block(f"blocks.{i}", nbytes) for i, nbytes in enumerate(sizes)),
        non_block,
        min_slots,
        tuple(Block(f"embedding_{i}", nbytes) for i, nbytes in enumerate(embeddings)),
    ),
    st.one_of(
        st.tuples(st.integers(1, 60), st.integers(1, 40 * MIB)).map(lambda p: [p[1]] * p[0]),
        st.lists(st.integers(20 * MIB, 24 * MIB), min_size=1, max_size=60),
        st.lists(st.sampled_from([10 * MIB, 14 * MIB]), min_size=1, max_size=60),
    ),
    st.integers(0, 50 * MIB),
    st.sampled_from([1, 1, 2]),
    st.lists(st.integers(1, 50 * MIB), max_size=3),
)


def floor_of(sizes):
    """The least that a model can run with: every block swapped, and the embeddings that pay."""
    choices = [combinations(sizes.embeddings, n) for n in range(len(sizes.embeddings) + 1)]
    resident = sizes.total_bytes - sum(block.nbytes for block in sizes.blocks)
    return min(
        resident
        - sum(part.nbytes for part in away)
        + min(sizes.min_slots, len(sizes.blocks) + len(away))
        * max(part.nbytes for part in (*sizes.blocks, *away))
        for away in chain.from_iterable(choices)
    )


@st.composite
def strings(draw):
    """Valid strings of every mode, devices in any order, with and without a wildcard."""
    kind = draw(st.sampled_from(["mb", "%", "fraction", "virtual"]))
    devices = draw(st.permutations(DEVICES))[: draw(st.integers(1, 4))]
    if kind == "virtual":
        donors = [d for d in devices if d != "acc:0"] or ["cpu"]
        return f"#acc:0;{draw(st.integers(0, 30)) / 10};{','.join(donors)}"
    amounts = {
        "mb": lambda: f"{draw(st.integers(0, 600))}mb",
        "%": lambda: f"{draw(st.integers(1, 100))}%",
        "fraction": lambda: f"{draw(st.integers(0, 1000)) / 1000}",
    }
    parts = [f"{device},{amounts[kind]()}" for device in devices]
    if draw(st.booleans()):
        position = draw(st.integers(0, len(parts) - 1))
        parts[position] = f"{devices[position]},*"
    return ";".join(parts)


@settings(max_examples=500, deadline=None)
@given(model_sizes, strings())
def test_every_split_keeps_its_promises(sizes, text):
    allocation = parse_allocation(text, DEVICES, "acc:0")
    split = plan_split(allocation, sizes, MEMORY)
    quotas = {quota.device: quota for quota in split.quotas}
    sized = {i: part.nbytes for i, part in enumerate(sizes.parts)}
    largest = max(sized.values())

    # Every part has one home, among the devices of the string.
    assert len(split.homes) == len(sizes.parts)
    assert set(split.homes) <= {"acc:0", *quotas}

    # Bytes add up: everything is placed once, slots come on top.
    placed = sum(split.bytes_on(device) for device in split.devices())
    assert placed == sizes.total_bytes + split.slots * split.slot_bytes

    # No quota but the wildcard's is exceeded, except below the floor, which is then said.
    floor = floor_of(sizes)
    for device, quota in quotas.items():
        if quota.nbytes is None or quota.wildcard:
            continue
        below_floor = device == "acc:0" and quota.nbytes < floor
        assert split.bytes_on(device) <= quota.nbytes or below_floor
        said = any("below the floor" in note for note in split.notes)
        assert said == (split.bytes_on(device) > quota.nbytes) or device != "acc:0"

    # A quota is filled to less than a block, unless nothing was left for it.
    later_than_compute = list(quotas)
    for position, (device, quota) in enumerate(quotas.items()):
        if quota.nbytes is None or quota.wildcard:
            continue
        behind = set(later_than_compute[position + 1 :])
        for other in quotas.values():
            # A wildcard that comes first keeps what was written for it.
            spare = split.bytes_on(other.device) - (other.nbytes or 0)
            if other.wildcard and other.device not in behind and spare >= largest:
                behind.add(other.device)
        left = any(home in behind for home in split.homes[: len(sizes.blocks)])
        if left and device != "acc:0":
            assert quota.nbytes - split.bytes_on(device) < largest
        if device == "acc:0" and split.swapped and not _owed(split):
            assert quota.nbytes - split.bytes_on(device) < largest

    # Slots exist exactly where something is swapped, and suffice.
    assert (split.slots == 0) == (not split.swapped)
    if split.swapped:
        assert split.slots >= min(sizes.min_slots, len(split.swapped))
        assert split.slot_bytes == max(sized[i] for i in split.swapped)

    # The same input gives the same split, which knows the string it came from.
    assert plan_split(parse_allocation(text, DEVICES, "acc:0"), sizes, MEMORY) == split
    assert split.allocation.source == text
    for device in split.devices():
        assert device in split.table()


def _owed(split):
    """Whether donors are filled before the compute device, so that they bound what it holds."""
    for quota in split.quotas:
        if quota.device == split.compute_device:
            return False
        if quota.nbytes is None or quota.nbytes:
            return True
    return False


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 80), st.data())
def test_swapped_blocks_are_evenly_spread(count, data):
    number = data.draw(st.integers(1, count))
    positions = spread([7] * count, [True] * count, Fraction(number, count), 14)
    assert positions == [-(-(j + 1) * count // number) - 1 for j in range(number)]
    assert len(set(positions)) == number
    assert positions[-1] == count - 1
    around = [b - a for a, b in zip(positions, [*positions[1:], positions[0] + count], strict=True)]
    assert max(around) - min(around) <= 1


@settings(max_examples=200, deadline=None)
@given(st.integers(4, 60), st.integers(0, 700), st.integers(0, 700))
def test_donors_interleave(count, first, second):
    sizes = uniform(count)
    split = plan(f"acc:0,60mb;acc:1,{first}mb;acc:2,{second}mb;cpu,*", sizes)
    order = [split.homes[i] for i in split.swapped]
    assume(len(order) > 1)
    for device in set(order):
        share = order.count(device) / len(order)
        for end in range(1, len(order) + 1):
            # Nowhere does a donor run ahead of or behind its share by two blocks.
            assert abs(order[:end].count(device) - share * end) < 2


def test_everything_fits_and_needs_no_slots():
    split = plan("acc:0,85mb;cpu,*")
    assert split.homes == ("acc:0",) * 8
    assert split.slots == 0
    assert split.bytes_per_pass == 0


def test_one_byte_less_needs_slots_in_the_quota():
    split = plan(f"acc:0,{85 * MIB - 1}b;cpu,*")
    assert split.swapped == (2, 5, 7)
    assert split.slots == 2
    assert split.compute_bytes == 75 * MIB


@pytest.mark.parametrize(
    ("quota", "slots", "swapped"),
    [(15, 1, 8), (24, 1, 8), (25, 2, 8), (35, 3, 8), (45, 3, 7), (55, 3, 6), (65, 2, 4)],
)
def test_slots_follow_the_room(quota, slots, swapped):
    split = plan(f"acc:0,{quota}mb;cpu,*")
    assert (split.slots, len(split.swapped)) == (slots, swapped)
    assert split.notes == ()


def test_below_the_floor_both_numbers_are_said():
    split = plan("acc:0,6mb;cpu,*")
    assert split.slots == 1
    assert split.compute_bytes == 15 * MIB
    assert "quota of 6.00 MiB" in split.notes[0]
    assert "15.00 MiB" in split.notes[0]


def test_a_compute_device_outside_the_string_gets_a_comfortable_floor():
    split = plan("cpu,*")
    assert split.homes == ("cpu",) * 8
    assert (split.slots, split.notes) == (2, ())


def test_nothing_is_swapped_where_the_cpu_computes():
    split = plan("acc:0,20mb;cpu,*", compute="cpu")
    assert split.homes == ("cpu",) * 8
    assert (split.slots, split.bytes_per_pass) == (0, 0)


def test_virtual_vram_leaves_the_compute_device():
    split = plan("#acc:0;0.0390625;cpu")  # 40 MiB
    assert split.compute_bytes <= uniform().total_bytes - 40 * MIB
    assert split.compute_bytes > uniform().total_bytes - 50 * MIB


def test_more_virtual_vram_than_the_model_has_keeps_two_slots():
    assert plan("#acc:0;4.0;cpu").slots == 2


def test_virtual_vram_donors_are_filled_in_order():
    sizes = uniform(nbytes=100 * MIB)
    split = plan("#acc:0;2.0;acc:2,cpu", sizes)
    assert split.homes.count("acc:2") == 5
    assert split.homes.count("cpu") == 3


def test_donors_written_before_the_compute_device_are_filled_first():
    split = plan("cpu,30mb;acc:0,500mb")
    assert split.homes.count("cpu") == 3
    assert split.homes.count("acc:0") == 5


def test_a_wildcard_compute_device_takes_what_the_donors_leave():
    split = plan("acc:1,25mb;acc:0,*")
    assert split.homes.count("acc:1") == 2
    assert split.homes.count("acc:0") == 6


def test_ratio_parts_of_the_model():
    split = plan("acc:0,8%;acc:1,8%;cpu,4%", uniform(count=30))
    total = uniform(count=30).total_bytes
    assert split.allocation.mode is Mode.RATIO
    for device in ("acc:0", "acc:1"):
        assert 0 <= 0.4 * total - split.bytes_on(device) < 10 * MIB


def test_what_fits_no_fraction_goes_to_the_cpu_with_a_warning():
    split = plan("acc:0,0.03;cpu,0.01")
    assert split.homes.count("cpu") == 8
    assert any("did not fit" in note for note in split.notes)


def test_a_model_that_holds_two_blocks_at_once_gets_one_slot_more():
    assert plan("acc:0,15mb;cpu,*", uniform(min_slots=2)).slots == 2
    assert plan("acc:0,75mb;cpu,*", uniform(min_slots=2)).slots == 3
    assert plan("acc:0,55mb;cpu,*", uniform(min_slots=2)).slots == 4


def test_three_slots_that_do_not_fit_leave_two():
    sizes = ModelSizes(
        tuple(
            Block(f"blocks.{i}", nbytes)
            for i, nbytes in enumerate([20971520] * 3 + [21250104] + [22090519] * 4)
        ),
        0,
    )
    split = plan("#acc:0;0.1;cpu", sizes)
    assert split.slots == 2
    assert split.compute_bytes <= split.quotas[0].nbytes
    assert split.notes == ()


def test_a_donor_is_filled_though_an_earlier_one_cannot_hold_the_block():
    sizes = ModelSizes(
        tuple(Block(f"blocks.{i}", nbytes) for i, nbytes in enumerate([20971520] * 3 + [20971521])),
        0,
    )
    split = plan("acc:0,*;cpu,60mb;acc:1,21mb", sizes)
    assert split.homes.count("acc:1") == 1


def test_a_ratio_alone_is_a_part_and_the_rest_goes_to_the_cpu():
    split = plan("acc:0,50%", uniform(count=40))
    assert 0 <= 0.5 * split.sizes.total_bytes - split.bytes_on("acc:0") < 10 * MIB
    assert split.homes.count("cpu") > 20


def test_more_than_a_device_has_is_warned_of():
    split = plan("acc:0,2gb;cpu,*", uniform(count=120))
    assert any("acc:0 has 1.00 GiB of memory" in note for note in split.notes)


def test_a_backend_that_does_not_tell_its_memory_asks_for_bytes():
    allocation = parse_allocation("acc:0,0.5;cpu,*", DEVICES, "acc:0")
    with pytest.raises(AllocationError, match="how much memory acc:0 has is not known"):
        plan_split(allocation, uniform(), {"acc:0": 0, "cpu": 1})


def test_a_wildcard_that_was_written_gets_no_warning():
    assert plan("acc:0,0.03;cpu,*").notes == ()


def test_embeddings_leave_where_the_quota_has_no_room_for_them():
    blocks = tuple(Block(f"blocks.{i}", 10 * MIB) for i in range(8))
    leading = (Block("time_projection", 6 * MIB), Block("text_embedding", 2 * MIB))
    sizes = ModelSizes(blocks, 1 * MIB, embeddings=leading)

    def swapped(text):
        split = plan(text, sizes)
        names = [sizes.parts[i].name for i in split.swapped]
        assert names[:8] == [block.name for block in blocks]
        return names[8:], split.slots

    assert swapped("acc:0,29mb;cpu,*") == ([], 2)
    # Two slots are worth more than an embedding that stays, an embedding more than its copies.
    assert swapped("acc:0,28mb;cpu,*") == (["text_embedding"], 2)
    assert swapped("acc:0,26mb;cpu,*") == (["time_projection"], 2)
    assert swapped("acc:0,22mb;cpu,*") == (["time_projection", "text_embedding"], 2)
    assert swapped("acc:0,20mb;cpu,*") == ([], 1)
    assert swapped("acc:0,18mb;cpu,*") == (["text_embedding"], 1)
    assert swapped("acc:0,11mb;cpu,*") == (["time_projection", "text_embedding"], 1)
    # Below the floor everything leaves; without a quota there is none that is too small.
    assert "below the floor" in plan("acc:0,10mb;cpu,*", sizes).table()
    assert swapped("acc:0,1mb;cpu,*") == (["time_projection", "text_embedding"], 1)
    assert swapped("cpu,*") == ([], 2)


def test_an_embedding_larger_than_a_block_leaves_only_where_that_pays():
    blocks = tuple(Block(f"blocks.{i}", 10 * MIB) for i in range(8))
    large = ModelSizes(blocks, 0, embeddings=(Block("text_embedding", 12 * MIB),))
    assert plan("acc:0,1mb;cpu,*", large).compute_bytes == 12 * MIB
    assert plan("#acc:0;1;cpu", large).compute_bytes == 24 * MIB
    larger = ModelSizes(blocks, 0, embeddings=(Block("text_embedding", 24 * MIB),))
    assert plan("#acc:0;1;cpu", larger).compute_bytes == 44 * MIB


def test_the_table_names_embeddings_that_are_swapped():
    blocks = tuple(Block(f"blocks.{i}", 10 * MIB) for i in range(8))
    sizes = ModelSizes(blocks, 1 * MIB, embeddings=(Block("text_embedding", 2 * MIB),))
    table = plan("acc:0,21mb;cpu,*", sizes).table()
    assert "text_embedding: 2.00 MiB, swapped from cpu" in table
    assert "1.00 MiB of non-block weights, 0 resident blocks and 2 slots" in table
    assert "3.00 MiB of non-block weights" in plan("acc:0,23mb;cpu,*", sizes).table()


def plan_auto(text, room, sizes=None, donor=0):
    spare = {"acc:0": room, "acc:1": donor, "cpu": donor}
    return plan_split(parse_allocation(text, DEVICES, "acc:0"), sizes or uniform(), MEMORY, spare)


@pytest.mark.parametrize(
    ("text", "room", "donor", "homes"),
    [
        ("acc:0,auto;cpu,*", 45, 0, {"acc:0": 1, "cpu": 7}),
        ("acc:0,auto", 45, 0, {"acc:0": 1, "cpu": 7}),  # the CPU takes the rest
        ("acc:0,auto;cpu,*", 1000, 0, {"acc:0": 8}),
        ("acc:0,auto;acc:1,auto;cpu,*", 45, 35, {"acc:0": 1, "acc:1": 3, "cpu": 4}),
        ("acc:0,auto;acc:1,20mb;cpu,*", 45, 0, {"acc:0": 1, "acc:1": 2, "cpu": 5}),
        ("acc:0,AUTO;acc:1,25%;cpu,*", 45, 0, {"acc:0": 1, "acc:1": 2, "cpu": 5}),
        ("acc:0,auto;acc:1,0.02;cpu,*", 45, 0, {"acc:0": 1, "acc:1": 2, "cpu": 5}),
        ("acc:0,45mb;acc:1,auto;cpu,*", 0, 35, {"acc:0": 1, "acc:1": 3, "cpu": 4}),
    ],
)
def test_auto_is_what_is_free(text, room, donor, homes):
    split = plan_auto(text, room * MIB, donor=donor * MIB)
    assert {device: split.homes.count(device) for device in set(split.homes)} == homes
    assert split.compute_bytes <= max(room, 45) * MIB or room == 1000


def test_the_table_tells_auto_from_a_quota():
    assert "auto 45.00 MiB" in plan_auto("acc:0,auto;cpu,*", 45 * MIB).table()


@pytest.mark.parametrize(
    "text", ["acc:0,auto*", "acc:0,auto gb", "acc:0,5auto", "auto", "auto,5gb"]
)
def test_auto_that_is_none_is_refused(text):
    with pytest.raises(AllocationError):
        parse_allocation(text, DEVICES, "acc:0")


@given(st.integers(15, 120), st.integers(15, 120), st.sampled_from([8, 30, 40]))
@settings(max_examples=200)
def test_refitting_moves_no_more_than_it_must(before, after, count):
    """Blocks only leave, or only come, and no more than the bytes ask for."""
    sizes = uniform(count)
    split, wanted = (
        plan_auto("acc:0,auto;acc:1,auto;cpu,*", room * MIB, sizes, donor=50 * MIB)
        for room in (before, after)
    )
    new = refit_split(split, wanted)
    assert new.compute_bytes <= wanted.compute_bytes
    assert new.quotas == wanted.quotas
    if new is wanted:
        return
    block = sizes.blocks[0].nbytes
    assert wanted.compute_bytes - new.compute_bytes < block
    moved = [(a, b) for a, b in zip(split.homes, new.homes, strict=True) if a != b]
    assert len(moved) == abs(split.homes.count("acc:0") - new.homes.count("acc:0"))
    assert new.bytes_on("acc:1") <= 50 * MIB


def test_refitted_blocks_stay_spread():
    sizes = uniform(40)
    split = plan_auto("acc:0,auto;cpu,*", 330 * MIB, sizes)
    for room in (300, 270, 250, 290, 330, 300):
        split = refit_split(split, plan_auto("acc:0,auto;cpu,*", room * MIB, sizes))
        swapped = split.swapped
        gaps = [(b - a) % 40 for a, b in zip(swapped, swapped[1:] + swapped[:1], strict=True)]
        assert max(gaps) <= 2 * (40 / len(swapped)) + 1


def test_a_heavy_first_block_is_no_trap_for_refitting():
    """A slot is as large as the largest swapped block: swapping one more can take more memory."""
    blocks = tuple(Block(f"blocks.{i}", (2 if i == 0 else 1) * MIB) for i in range(40))
    sizes = ModelSizes(blocks, 0)
    splits = [plan_auto("acc:0,auto;cpu,*", room * MIB, sizes) for room in range(2, 42)]
    for split in splits:
        for wanted in splits:
            assert refit_split(split, wanted).compute_bytes <= wanted.compute_bytes
