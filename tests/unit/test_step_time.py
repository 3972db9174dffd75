"""Predicted steps: the cases that have one right answer, and what is made of them."""

import math
from dataclasses import replace

import pytest

from block_swap.allocation_parser import parse_allocation
from block_swap.split import Block, ModelSizes
from block_swap.split_planner import plan_split
from block_swap.step_time import Timing, as_amount, cheapest_quota, improve, predict, report

NBYTES = 1000
DEVICES = ("cpu", "acc:0", "acc:1")


def plan(text, layers=8):
    blocks = tuple(Block(f"blocks.{i}", NBYTES) for i in range(layers))
    return plan_split(parse_allocation(text, DEVICES, "acc:0"), ModelSizes(blocks, 0), {})


def timing(compute, transfer=1.0):
    """A block computes for ``compute`` seconds of 8, and is under way for ``transfer``."""
    return Timing(8 * compute, {"cpu": NBYTES / transfer, "acc:1": NBYTES / transfer})


def test_with_everything_resident_a_pass_is_its_computation():
    assert predict(plan("acc:0,*"), timing(3.0)) == 24


@pytest.mark.parametrize(("compute", "seconds"), [(0.1, 8), (1.0, 8), (3.0, 24)])
def test_with_two_slots_it_is_the_longer_of_both(compute, seconds):
    assert predict(plan("acc:0,2000b;cpu,*"), timing(compute)) == pytest.approx(seconds)


def test_with_one_slot_nothing_overlaps():
    assert predict(plan("acc:0,1000b;cpu,*"), timing(3.0)) == pytest.approx(8 * 3 + 8 * 1)


def test_links_of_several_donors_work_at_the_same_time():
    split = plan("acc:0,2000b;acc:1,4000b;cpu,*")
    assert split.homes.count("acc:1") == split.homes.count("cpu") == 4
    assert predict(split, timing(0.01)) == pytest.approx(4, rel=0.05)


def test_where_copies_take_longest_a_slot_becomes_a_resident_block():
    split = plan("acc:0,5000b;cpu,*")
    assert (split.slots, len(split.swapped)) == (3, 6)
    better = improve(split, timing(0.5))
    assert (better.slots, len(better.swapped)) == (2, 5)
    assert predict(better, timing(0.5)) == pytest.approx(5)
    assert better.compute_bytes == split.compute_bytes
    assert better.quotas == split.quotas


def test_with_hardly_any_computation_one_slot_is_best():
    better = improve(plan("acc:0,6000b;cpu,*"), timing(0.001))
    assert better.slots == 1


def test_where_nothing_is_saved_the_split_stays_the_same():
    split = plan("acc:0,5000b;cpu,*")
    assert improve(split, timing(3.0)) is split
    everything = plan("acc:0,*")
    assert improve(everything, timing(3.0)) is everything


def test_one_slot_is_exchanged_for_two_where_computing_hides_the_copies():
    one = improve(plan("acc:0,3000b;cpu,*"), timing(0.001))
    assert one.slots == 1
    two = improve(one, timing(3.0))
    assert two.slots == 2
    assert two.compute_bytes <= one.compute_bytes
    assert predict(two, timing(3.0)) == 24


def test_no_donor_exceeds_its_quota():
    split = plan("acc:0,*;acc:1,1000b")
    one = improve(split, timing(0.001))
    assert one.bytes_on("acc:1") <= 1000


def test_the_cheapest_quota_is_the_least_that_costs_no_time():
    cheapest = cheapest_quota(plan("acc:0,*;cpu,1000b"), timing(3.0))
    assert cheapest.compute_bytes == 2000
    cheapest = cheapest_quota(plan("acc:0,2000b;cpu,*"), timing(0.5))
    assert len(cheapest.swapped) == 4
    assert predict(cheapest, timing(0.5)) <= 1.02 * 4


def test_the_report_names_the_cost_and_what_is_free():
    line = report(
        plan("acc:0,2000b;cpu,*"),
        timing(0.5),
        cheapest_quota(plan("acc:0,2000b;cpu,*"), timing(0.5)),
    )
    assert "8 s, 2.00 times" in line
    assert "a quota of acc:0,1mb would cost no time" in line


@pytest.mark.parametrize(
    ("nbytes", "amount"),
    [(1, "1mb"), (700 << 20, "700mb"), ((1 << 30) + 1, "1.01gb"), (7 << 28, "1.75gb")],
)
def test_an_amount_to_type_holds_what_it_stands_for(nbytes, amount):
    assert as_amount(nbytes) == amount
    (entry, _) = parse_allocation(f"acc:0,{amount};cpu,*", DEVICES, "acc:0").entries
    assert entry.amount >= nbytes


def test_what_the_forward_holds_beside_its_loop_is_no_slot_to_copy_into():
    """A VACE holds two blocks: with two slots nothing overlaps, with three everything does."""
    blocks = tuple(Block(f"blocks.{i}", NBYTES) for i in range(8))

    def vace(slots):
        allocation = parse_allocation("acc:0,1b;cpu,*", DEVICES, "acc:0")
        sizes = ModelSizes(blocks, 0, min_slots=2)
        return replace(plan_split(allocation, sizes, {}), slots=slots)

    assert predict(vace(2), timing(1.0)) == pytest.approx(16)
    assert predict(vace(3), timing(1.0)) == pytest.approx(8)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("bandwidth", [math.nan, math.inf, 1.0])
def test_times_that_are_no_numbers_improve_nothing_and_end(seconds, bandwidth):
    split = plan("acc:0,5000b;cpu,*")
    assert improve(split, Timing(seconds, {"cpu": bandwidth})) is split or seconds == 0.0


def test_what_comes_before_and_behind_the_blocks_hides_copies_too():
    """Eight copies of a second each; two slots hold the first two blocks before the blocks begin.

    The third is copied once the first has computed for half a second: six copies in a row from
    there on, and the last block's computation.
    """
    split = plan("acc:0,2000b;cpu,*")
    blocks = replace(timing(0.5), before=2.0, after=1.0, between=1.0)
    assert blocks.resident == 4 + 2 + 1
    assert predict(split, blocks) == pytest.approx(2 + 0.5 + 6 + 0.5 + 1)
    assert predict(plan("acc:0,*"), blocks) == 7


def test_the_report_counts_what_is_around_the_blocks():
    split = plan("acc:0,*")
    line = report(split, replace(timing(0.5), before=3.0), None)
    assert "a pass takes 7 s, 1.00 times" in line


def test_what_is_around_the_blocks_makes_an_exchange_worth_less():
    """Half of such a pass is not blocks: as a share of the blocks, it looked good and lost."""
    split = plan("acc:0,5000b;cpu,*")
    blocks, heavy = timing(0.5), replace(timing(0.5), before=8.0, between=8.0)
    better = improve(split, blocks)
    assert better is not split

    def gain(timing):
        return 1 - predict(better, timing) / predict(split, timing)

    assert gain(blocks) > 2 * gain(heavy)
