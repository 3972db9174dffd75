"""In which order the blocks of a model are taken: guessed at first, then learnt from its passes."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from itertools import chain


class BlockOrder:
    """The order of one kind of pass, as indices of blocks, and where the pass that runs has got to.

    ``guess`` serves until a pass was complete. A pass that leaves blocks out goes on behind them,
    but a first one that is not as guessed, or one that goes back, is not guessed at any further.
    """

    def __init__(self, guess: Sequence[int]):
        self._order = list(guess)
        self._last: list[int] | None = None  # what the last complete pass took
        self.begin()

    def begin(self) -> None:
        """A pass begins."""
        self._trace: list[int] = []
        self._cursor = 0
        self._lost = False

    def take(self, index: int) -> None:
        """Block ``index`` is taken now; once more in a row makes no difference."""
        if self._trace and self._trace[-1] == index:
            return
        self._trace.append(index)
        try:
            position = self._order.index(index, self._cursor)
        except ValueError:
            self._lost = True
            return
        self._lost = self._lost or (self._last is None and position > self._cursor)
        self._cursor = position + 1

    def end(self) -> None:
        """The pass is complete: learn from it.

        One that leaves blocks out is taken for an exception until it comes twice in a row.
        """
        usual = self._last is not None and _is_subsequence(self._trace, self._order)
        if not usual or self._trace == self._last:
            self._order = self._trace
        self._last = self._trace
        self.begin()

    def upcoming(self, number: int, wanted: Container[int], then: Iterable[int] = ()) -> list[int]:
        """The next ``number`` of the ``wanted`` blocks; ``then`` is what comes after this pass."""
        found: dict[int, None] = {}
        if number > 0 and not self._lost:
            for index in chain(self._order[self._cursor :], then):
                if index in wanted:
                    found[index] = None
                    if len(found) == number:
                        break
        return list(found)

    def __iter__(self):
        return iter(self._order)


def _is_subsequence(part: Sequence[int], whole: Sequence[int]) -> bool:
    rest = iter(whole)
    return all(item in rest for item in part)
