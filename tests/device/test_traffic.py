"""What crosses the card's links in a run: the swapped blocks, once per pass, and nothing else."""

from collections import Counter

import pytest

pytestmark = pytest.mark.usefixtures("static_split")


@pytest.fixture
def run(bench, card):
    """Runs `loader` in the steady state; returns its split and the traffic of a run."""

    def run(loader):
        bench.sample(loader)
        split = bench.state().split
        with card.traffic() as traffic:
            bench.sample(loader, seed=2)
        assert bench.state().split is split
        return split, traffic

    return run


def swapped_in_a_run(card, split):
    """The sizes of all that a run swaps: every swapped part in each pass, cond and uncond."""
    return Counter([split.sizes.parts[i].nbytes for i in split.swapped] * 2 * card.steps)


def check_others(split, traffic):
    """Beside the swap only latents, conditioning and the like cross the links: less than half a
    block each way, in a whole run."""
    for way in ("up", "down"):
        others = [c.nbytes for c in traffic.others() if (c.destination == "cpu") == (way == "down")]
        assert 0 < sum(others) < split.slot_bytes // 2, way


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_a_pass_moves_every_swapped_block_up_in_one_page_locked_copy(bench, card, run, share):
    split, traffic = run(bench.distorch(bench.text("wan", share)))
    swapped = traffic.swapped()
    assert len(split.swapped) > split.slots
    # Otherwise the copies would be those of a ring that pageable homes pass through.
    assert sum(card.locks.held.values()) >= split.bytes_per_pass
    assert Counter(copy.nbytes for copy in swapped) == swapped_in_a_run(card, split)
    assert all(copy.pinned for copy in swapped)
    assert {(copy.source, copy.destination) for copy in swapped} == {("cpu", card.compute)}
    assert len({copy.stream for copy in swapped}) == 1
    check_others(split, traffic)


def test_what_cannot_be_page_locked_goes_up_once_through_what_is(bench, card, run):
    block = bench.block_bytes("wan")
    with card.locks.refusing(block):
        split, traffic = run(bench.distorch(bench.text("wan", 0.6)))
    assert len(split.swapped) > split.slots
    assert split.slot_bytes == block not in card.locks.held.values()
    swapped = traffic.swapped()
    assert all(copy.pinned for copy in swapped)
    assert sum(copy.nbytes for copy in swapped) == 2 * card.steps * split.bytes_per_pass
    assert len({copy.stream for copy in swapped}) == 1
    check_others(split, traffic)


def test_everything_resident_moves_nothing(bench, run):
    split, traffic = run(bench.distorch(bench.text("wan", 2.0)))
    assert split.swapped == ()
    assert traffic.swapped() == []
