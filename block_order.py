"""In which order the blocks of a model are taken: guessed at first, then learnt from its passes."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from itertools import chain


class BlockOrders:
    """What comes next, in a pass and after it; blocks are indices, kinds of passes are names.

    ``guess`` gives the blocks of a kind of pass that has not been seen yet.
    """

    def __init__(self, guess: Callable[[str], Sequence[int]]):
        self._guess = guess
        self._orders: dict[str, _Order] = {}
        self._kind = ""
        self._inside = False
        self._last: int | None = None  # the block that the pass before took last
        self._follows: dict[int, tuple[str, int]] = {}  # the kind and first block of the next pass

    def begin(self, kind: str) -> None:
        """A pass begins."""
        self._kind, self._inside = kind, True
        self._of(kind).begin()

    def restart(self) -> None:
        """The pass that runs begins again."""
        self._of(self._kind).begin()

    def take(self, index: int) -> None:
        """Block ``index`` is taken now; once more in a row makes no difference."""
        order = self._of(self._kind)
        if self._last is not None and not order.trace:
            self._follows[self._last] = (self._kind, index)
        order.take(index)

    def end(self, completed: bool) -> None:
        """The pass is over; one that was completed is learnt from."""
        order, self._inside = self._of(self._kind), False
        if completed:
            self._last = order.trace[-1] if order.trace else self._last
            order.learn()

    def upcoming(self, number: int, wanted: Container[int]) -> list[int]:
        """The next ``number`` of the ``wanted`` blocks, across the end of the pass."""
        order = self._of(self._kind)
        if number <= 0 or (self._inside and order.lost):
            return []
        rest = order.rest() if self._inside else []
        last = rest[-1] if rest else order.trace[-1] if self._inside and order.trace else self._last
        found: dict[int, None] = {}
        for index in chain(rest, self._after(last)):
            if index in wanted:
                found[index] = None
                if len(found) == number:
                    break
        return list(found)

    def _of(self, kind: str) -> _Order:
        if kind not in self._orders:
            self._orders[kind] = _Order(self._guess(kind))
        return self._orders[kind]

    def _after(self, last: int | None) -> Iterator[int]:
        """The blocks of the passes that follow one whose last block was ``last``."""
        if last not in self._follows:
            yield from self._of(self._kind).order
            return
        seen = set()
        while last in self._follows and last not in seen:
            seen.add(last)
            kind, first = self._follows[last]
            order = self._of(kind).order
            blocks = order if first in order else [first]  # it may have left out the first
            yield from blocks
            last = blocks[-1]


class _Order:
    """The blocks of one kind of pass, and how far the pass that runs has come.

    The guess serves until a pass was completed. A later one that leaves blocks out goes on behind
    them; a first one that is not as guessed, or one that goes back, is ``lost``.
    """

    def __init__(self, guess: Sequence[int]):
        self.order = list(guess)
        self._before: list[int] | None = None  # what the last complete pass took
        self.begin()

    def begin(self) -> None:
        self.trace: list[int] = []
        self.lost = False
        self._cursor = 0

    def take(self, index: int) -> None:
        if self.trace[-1:] == [index]:
            return
        self.trace.append(index)
        try:
            position = self.order.index(index, self._cursor)
        except ValueError:
            self.lost = True
            return
        self.lost = self.lost or (self._before is None and position > self._cursor)
        self._cursor = position + 1

    def rest(self) -> list[int]:
        return self.order[self._cursor :]

    def learn(self) -> None:
        """What leaves blocks out is an exception, until it comes twice in a row.

        A method that only looks at blocks runs none, and is no pass to learn from.
        """
        if not self.trace:
            return
        usual = self._before is not None and _is_subsequence(self.trace, self.order)
        if not usual or self.trace == self._before:
            self.order = self.trace
        self._before = self.trace


def _is_subsequence(part: Sequence[int], whole: Sequence[int]) -> bool:
    rest = iter(whole)
    return all(item in rest for item in part)
