"""Tables that are looked up where they are: what of a text encoder stays in RAM first."""

import pytest

from block_swap.allocation_parser import parse_allocation
from block_swap.split import Block, ModelSizes
from block_swap.split_planner import plan_split

MIB = 1 << 20
DEVICES = ("cpu", "acc:0", "acc:1")
BLOCKS = tuple(Block(f"block.{i}", 10 * MIB) for i in range(8))
TABLE = Block("shared", 50 * MIB)


def plan(text, tables=(TABLE,)):
    sizes = ModelSizes(BLOCKS, 5 * MIB, tables=tables)
    return plan_split(parse_allocation(f"{text}#acc:0", DEVICES, "acc:0"), sizes, {})


def test_with_room_for_everything_it_stays():
    split = plan("acc:0,135mb;cpu,*")
    assert set(split.homes) == {"acc:0"}
    assert split.compute_bytes == 135 * MIB


@pytest.mark.parametrize("quota", [85, 134])
def test_it_leaves_first(quota):
    split = plan(f"acc:0,{quota}mb;cpu,*")
    assert split.homes == ("acc:0",) * 8 + ("cpu",)
    assert (split.swapped, split.bytes_per_pass) == ((), 0)
    assert (split.compute_bytes, split.bytes_on("cpu")) == (85 * MIB, 50 * MIB)
    assert "shared: 50.00 MiB, looked up on cpu" in split.table()


def test_then_blocks_leave_and_slots_are_of_their_size():
    split = plan("acc:0,50mb;cpu,*")
    assert split.homes[-1] == "cpu"
    assert split.swapped and split.slot_bytes == 10 * MIB
    assert 40 * MIB < split.compute_bytes <= 50 * MIB


def test_the_floor_is_without_it():
    split = plan("acc:0,1mb;cpu,*")
    assert split.compute_bytes == 15 * MIB
    assert "below the floor" in split.table()


def test_it_counts_in_the_quota_of_its_donor():
    split = plan("acc:0,40mb;acc:1,*;cpu,70mb")
    assert split.homes[-1] == "cpu"
    assert split.bytes_on("cpu") == 70 * MIB
    split = plan("acc:0,40mb;acc:1,*;cpu,40mb")
    assert split.homes[-1] == "acc:1"
    assert split.bytes_on("cpu") == 40 * MIB


def test_without_a_donor_that_has_room_it_stays():
    split = plan("acc:0,*;cpu,30mb")
    assert split.homes[-1] == "acc:0"
    assert split.bytes_on("cpu") == 30 * MIB


def test_what_donors_are_owed_is_paid_with_it():
    split = plan("acc:0,*;cpu,60mb")
    assert split.bytes_on("cpu") == 60 * MIB
    assert split.homes[-1] == "cpu" and len(split.swapped) == 1
