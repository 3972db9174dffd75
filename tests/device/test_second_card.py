"""A second card: as a donor, and as the one that computes."""

from collections import Counter

import pytest
import torch


@pytest.mark.usefixtures("static_split")
def test_a_second_card_as_donor(bench, card, expected, second):
    latents = [expected("wan", seed) for seed in (1, 2)]
    before = card.allocated(second)
    quota = int(0.25 * bench.size("wan"))
    loader = bench.distorch(bench.text("wan", 0.6, rest=f"{second},{quota}b;cpu,*"))
    assert torch.equal(bench.sample(loader), latents[0])
    split = bench.state().split
    assert set(split.homes) == {card.compute, second, "cpu"}
    assert split.bytes_on(second) <= quota
    blocks = split.homes.count(second)
    taken = card.allocated(second) - before
    assert 0 <= taken - split.bytes_on(second) <= card.slack(blocks)
    with card.traffic() as traffic:
        assert torch.equal(bench.sample(loader, 2), latents[1])
    for donor in (second, "cpu"):
        moved = [split.sizes.parts[i].nbytes for i in split.swapped if split.homes[i] == donor]
        found = [copy for copy in traffic.swapped() if copy.source == donor]
        assert Counter(copy.nbytes for copy in found) == Counter(moved * 2 * card.steps)
        assert {copy.destination for copy in found} == {card.compute}
        assert len({copy.stream for copy in found}) == 1


def test_a_second_card_computes(bench, card, second):
    def loader(share):
        quota = int(share * bench.size("wan"))
        return bench.distorch(f"{second},{quota}b;cpu,*", compute=second)

    unswapped = [bench.sample(loader(2.0), seed) for seed in (1, 2)]
    assert bench.state().split.swapped == ()
    bench.clear()
    before = {device: card.allocated(device) for device in (card.compute, second)}
    latents = [bench.sample(loader(0.4), seed) for seed in (1, 2)]
    split = bench.state().split
    assert len(split.swapped) > split.slots
    assert all(torch.equal(one, other) for one, other in zip(latents, unswapped, strict=True))
    assert card.allocated(second) - before[second] >= split.compute_bytes
    assert card.allocated(card.compute) == before[card.compute]
