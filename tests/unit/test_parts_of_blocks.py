"""Blocks of a 14B in parts, by arithmetic: what smaller slots are worth at every quota."""

import pytest

from block_swap import step_time
from block_swap.allocation_parser import parse_allocation
from block_swap.pass_schedule import ASSUMED_BANDWIDTH, Timing, predict
from block_swap.split import Block, ModelSizes
from block_swap.split_chooser import is_better
from block_swap.split_planner import plan_split

MIB, GIB = 1 << 20, 1 << 30
LAYERS = 40
PARTS = (("self_attn", 200), ("cross_attn", 200), ("ffn", 270))
EMBEDDINGS = (Block("time_projection", 315 * MIB), Block("text_embedding", 94 * MIB))
WHOLE = ModelSizes(
    tuple(Block(f"blocks.{i}", 670 * MIB) for i in range(LAYERS)), 35 * MIB, embeddings=EMBEDDINGS
)
IN_PARTS = ModelSizes(
    tuple(Block(f"blocks.{i}.{n}", size * MIB) for i in range(LAYERS) for n, size in PARTS),
    35 * MIB,
    embeddings=EMBEDDINGS,
)
BY_BYTES, LONG_VIDEO = None, (0.55, 0.1, 0.35)


def plan(sizes, quota):
    text = f"acc:0,{quota}gb;cpu,*#acc:0"
    return plan_split(parse_allocation(text, ("cpu", "acc:0"), "acc:0"), sizes, {})


def timed(sizes, quota, ratio, shares=None):
    """The split that a timed pass leads to, its time, and the bound for it.

    All of the blocks compute for ``ratio`` of the time that it takes to copy them.
    """
    compute = ratio * LAYERS * 670 * MIB / ASSUMED_BANDWIDTH
    timing = Timing(compute, {"cpu": ASSUMED_BANDWIDTH}, shares=shares and shares * LAYERS)
    split = step_time.improve(plan(sizes, quota), timing)
    return predict(split, timing), max(compute, split.bytes_per_pass / ASSUMED_BANDWIDTH)


@pytest.mark.parametrize("shares", [BY_BYTES, LONG_VIDEO])
@pytest.mark.parametrize("quota", [2, 3.5, 5, 8, 12, 16, 20, 24])
def test_never_slower_than_whole_blocks_and_near_the_bound(quota, shares):
    for ratio in (0.1, 0.25, 0.5, 0.7, 0.85, 1.0, 1.25, 2.0):
        whole, _ = timed(WHOLE, quota, ratio)
        parts, bound = timed(IN_PARTS, quota, ratio, shares)
        assert parts <= 1.005 * whole
        assert parts <= 1.02 * bound


@pytest.mark.parametrize(("quota", "most"), [(2, 0.975), (5, 0.96), (12, 0.94), (20, 0.83)])
def test_a_slow_link_has_less_to_do(quota, most):
    assert timed(IN_PARTS, quota, 0.25)[0] <= most * timed(WHOLE, quota, 0.25)[0]
    assert is_better(plan(IN_PARTS, quota), plan(WHOLE, quota))


def test_where_one_whole_block_fits_parts_overlap():
    for ratio in (0.25, 0.5, 1.0, 2.0):
        assert timed(IN_PARTS, 1, ratio)[0] < 0.8 * timed(WHOLE, 1, ratio)[0]


def test_the_floor_is_less_than_half():
    assert plan(WHOLE, 0.1).compute_bytes > 0.68 * GIB
    assert plan(IN_PARTS, 0.1).compute_bytes < 0.35 * GIB


def test_where_everything_fits_nothing_is_gained():
    assert not is_better(plan(IN_PARTS, 30), plan(WHOLE, 30))
