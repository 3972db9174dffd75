"""What is taken next, in a pass and after it."""

import pytest

from block_swap.block_order import BlockOrders

ALL = frozenset(range(8))


def orders(guess=range(8)):
    return BlockOrders(lambda kind: list(guess))


def run(order, blocks, kind="", wanted=ALL, ahead=2):
    """Take ``blocks`` in a pass; what was foreseen after each, and after the pass."""
    order.begin(kind)
    seen = []
    for index in blocks:
        order.take(index)
        seen.append(order.upcoming(ahead, wanted))
    order.end(completed=True)
    return [*seen, order.upcoming(ahead, wanted)]


def foreseen(order, blocks, **kwargs):
    """How many of the blocks of a pass were the first that was expected."""
    before = order.upcoming(1, ALL)
    seen = [before, *(ahead[:1] for ahead in run(order, blocks, **kwargs))]
    return sum(ahead == [index] for ahead, index in zip(seen, blocks, strict=False))


def test_a_guess_that_is_right_is_right_from_the_first_pass():
    seen = run(orders(), range(8))
    assert seen == [[1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [6, 7], [7, 0], [0, 1], [0, 1]]


def test_only_what_is_wanted_is_foreseen():
    assert run(orders(), range(8), wanted={2, 7})[:3] == [[2, 7], [2, 7], [7, 2]]


@pytest.mark.parametrize("blocks", [[7, 6, 5, 4], [0, 2, 4, 6], [3, 1, 3, 1, 0]])
def test_after_a_wrong_guess_nothing_is_guessed_and_the_next_pass_is_right(blocks):
    order = orders()
    seen = run(order, blocks)
    wrong = next(i for i, index in enumerate(blocks) if index != i)
    assert seen[wrong:-1] == [[]] * (len(blocks) - wrong)
    assert foreseen(order, blocks) == len(blocks)
    assert foreseen(order, blocks) == len(blocks)


def test_what_never_runs_is_not_foreseen():
    order = orders()
    run(order, [0, 1, 4, 5])
    assert {index for ahead in run(order, [0, 1, 4, 5]) for index in ahead} == {0, 1, 4, 5}


def test_a_pass_that_leaves_blocks_out_is_an_exception():
    """Layer guidance: every other pass skips some blocks, and the order stays the full one."""
    order = orders()
    run(order, range(8))
    for _ in range(3):
        assert run(order, [0, 1, 5, 6, 7])[1:3] == [[2, 3], [6, 7]]
        assert foreseen(order, range(8)) == 8


def test_a_pass_that_leaves_the_same_out_again_is_the_rule():
    order = orders()
    run(order, range(8))
    for _ in range(2):
        run(order, [1, 2, 3])
    assert foreseen(order, [1, 2, 3]) == 3
    run(order, range(8))
    assert foreseen(order, range(8)) == 8


def test_a_block_that_comes_twice_comes_twice():
    order = orders()
    blocks = [0, 1, 2, 0, 1, 2, 3]
    run(order, blocks)
    assert foreseen(order, blocks) == len(blocks)


def test_once_more_in_a_row_is_once():
    order = orders()
    assert run(order, [0, 0, 0, 1])[:3] == [[1, 2]] * 3


def test_kinds_of_passes_follow_each_other():
    order = BlockOrders(lambda kind: {"": [2, 3, 4], "side": [0, 1]}[kind])
    for _ in range(2):
        run(order, [0, 1], "side")
        for _ in range(2):
            run(order, [2, 3, 4])
    assert run(order, [0, 1], "side")[-1] == [2, 3]
    assert run(order, [2, 3, 4])[-1] in ([2, 3], [0, 1])  # either has followed it


def test_blocks_that_are_called_one_by_one_are_foreseen():
    """Every call is a pass of its own, and what follows it is learnt."""
    order = orders()
    for _ in range(2):
        for index in range(5):
            run(order, [index])
    assert [run(order, [index])[-1] for index in range(5)] == [
        [1, 2],
        [2, 3],
        [3, 4],
        [4, 0],
        [0, 1],
    ]


def test_a_pass_that_fails_teaches_nothing():
    order = orders()
    run(order, range(8))
    order.begin("")
    order.take(5)
    order.end(completed=False)
    assert foreseen(order, range(8)) == 8


def test_a_pass_that_begins_again_is_one_pass():
    order = orders()
    run(order, range(8))
    order.begin("")
    for index in range(5):
        order.take(index)
    order.restart()
    for index in range(8):
        order.take(index)
    order.end(completed=True)
    assert foreseen(order, range(8)) == 8
