"""Every wait is needed: with any one of them removed, the simulator reports a race."""

import gc

import pytest
import torch

from block_swap import donor_link, packed_weights
from rig import simulator
from toy import COMPUTE, Model, swap_of

HOMES = ["acc:0", "cpu", "acc:1", "cpu", "acc:1", "acc:0", "acc:1", "cpu"]


def exercise():
    """Passes that complete, fail and skip blocks, slots allocated anew, homes that move."""
    model = Model()
    swap = swap_of(model, HOMES, slots=2)
    x = torch.randn(4, 32).to(COMPUTE)
    for fail_at in (None, *range(8)):
        model.skip = () if fail_at is None else (fail_at - 1,)
        model.fail_at = fail_at
        try:
            model(x)
        except InterruptedError:
            assert fail_at is not None
    model.skip, model.fail_at = (), None
    swap.drop_slots()
    model(x)
    swap.settle()
    swap._packs[4].place(torch.device("acc:2"))
    swap.update(2)
    model(x)
    model(x)
    del model, swap
    gc.collect()
    simulator.check()


def nothing(*_):
    pass


def without_wait_for(event_name):
    """Copy streams no longer wait for this event of a slot; the compute stream still does."""

    def mutate(monkeypatch):
        queue = donor_link.Link.queue

        def mutated(link, home, target, slot, *rest):
            event = getattr(slot, event_name)
            setattr(slot, event_name, _Unawaited(event))
            try:
                queue(link, home, target, slot, *rest)
            finally:
                setattr(slot, event_name, event)

        monkeypatch.setattr(donor_link.Link, "queue", mutated)
        wait_event = simulator.Stream.wait_event

        def mutated_wait(stream, event):
            if not isinstance(event, _Unawaited):
                wait_event(stream, event)

        monkeypatch.setattr(simulator.Stream, "wait_event", mutated_wait)

    return mutate


class _Unawaited:
    def __init__(self, event):
        self._event = event

    def record(self, stream):
        self._event.record(stream)


def without_a_record_of_allocation(monkeypatch):
    init = donor_link.Slot.__init__

    def mutated(slot, *args):
        record = donor_link.Slot.record_release
        donor_link.Slot.record_release = nothing
        try:
            init(slot, *args)
        finally:
            donor_link.Slot.record_release = record

    monkeypatch.setattr(donor_link.Slot, "__init__", mutated)


MUTATIONS = {
    "computation awaits the copy": lambda m: m.setattr(donor_link.Slot, "await_arrival", nothing),
    "a copy awaits the slot's last computation": without_wait_for("released"),
    "a copy awaits an earlier copy into the slot": without_wait_for("arrived"),
    "release is recorded": lambda m: m.setattr(donor_link.Slot, "record_release", nothing),
    "a first copy awaits the slot's allocation": without_a_record_of_allocation,
    "copies end before slots and homes go": lambda m: m.setattr(
        donor_link.Links, "synchronize", nothing
    ),
    "a move ends before other streams use it": lambda m: m.setattr(
        packed_weights, "synchronize", nothing
    ),
}


def test_with_all_waits_there_is_no_race():
    exercise()


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_with_one_wait_removed_there_is(monkeypatch, mutate):
    mutate(monkeypatch)
    with pytest.raises(simulator.RaceError):
        exercise()
    gc.collect()
    simulator.races.clear()


def test_homes_are_not_read_any_more_once_settled():
    model = Model()
    swap = swap_of(model, ["cpu"] * 8)
    model(torch.randn(4, 32).to(COMPUTE))
    flats = [pack.flat for pack in swap._packs]
    assert any(simulator.host_in_flight(flat) for flat in flats)
    swap.settle()
    assert not any(simulator.host_in_flight(flat) for flat in flats)


def test_a_dropped_model_is_not_freed_under_its_copies():
    model = Model()
    swap = swap_of(model, ["cpu"] * 8)
    model(torch.randn(4, 32).to(COMPUTE))
    flats = [pack.flat for pack in swap._packs]
    del model, swap
    gc.collect()
    assert not any(simulator.host_in_flight(flat) for flat in flats)
    simulator.check()
