"""What a card makes of the events of a profiler, and of calls that page-lock: no card is needed."""

import pytest
import torch

from rig.card import Copy, PageLocks, traffic_of

# As libkineto writes them for torch.profiler (CuptiActivity.cpp, cupti_strings.cpp).
UP = {
    "ph": "X",
    "cat": "gpu_memcpy",
    "name": "Memcpy HtoD (Pinned -> Device)",
    "pid": 0,
    "tid": 13,
    "args": {
        "External id": 41,
        "device": 0,
        "context": 1,
        "stream": 13,
        "correlation": 41,
        "bytes": 92_841_984,
        "memory bandwidth (GB/s)": 52.1,
    },
}
KERNEL = {"ph": "X", "cat": "kernel", "name": "gemm", "args": {"device": 0, "stream": 7}}


def memcpy(name, **arguments):
    return {**UP, "name": f"Memcpy {name}", "args": {**UP["args"], **arguments}}


def test_a_pinned_copy_on_a_stream_of_its_own_is_a_swapped_one():
    traffic = traffic_of([{"ph": "M", "name": "process_name"}, KERNEL, UP])
    assert traffic.swapped() == [Copy("cpu", "cuda:0", 92_841_984, True, (0, 13))]
    assert traffic.others() == []


@pytest.mark.parametrize(
    ("name", "ends", "pinned"),
    [
        ("HtoD (Pageable -> Device)", ("cpu", "cuda:0"), False),
        ("DtoH (Device -> Pageable)", ("cuda:0", "cpu"), False),
        ("DtoH (Device -> Pinned)", ("cuda:0", "cpu"), True),
    ],
)
def test_copies_in_the_stream_that_computes_are_others(name, ends, pinned):
    traffic = traffic_of([memcpy(name, stream=7, bytes=512), KERNEL])
    assert traffic.others() == [Copy(*ends, 512, pinned, (0, 7))]
    assert traffic.swapped() == []


def test_what_goes_down_is_never_a_swapped_copy():
    traffic = traffic_of([memcpy("DtoH (Device -> Pinned)"), KERNEL])
    assert [copy.destination for copy in traffic.others()] == ["cpu"]


def test_streams_of_two_cards_with_the_same_number_are_two():
    traffic = traffic_of([memcpy("HtoD (Pinned -> Device)", device=1, stream=7), KERNEL])
    (copy,) = traffic.swapped()
    assert copy.destination == "cuda:1"


def test_a_copy_between_cards_names_both():
    event = memcpy("PtoP (Device -> Device)", fromDevice=1, inDevice=1, toDevice=0)
    del event["args"]["device"]
    (copy,) = traffic_of([event, KERNEL]).swapped()
    assert (copy.source, copy.destination, copy.stream) == ("cuda:1", "cuda:0", (1, 13))


@pytest.mark.parametrize("name", ["DtoD (Device -> Device)", "HtoH (Pageable -> Pinned)"])
def test_copies_within_one_memory_are_none(name):
    assert traffic_of([memcpy(name)]).copies == []


@pytest.mark.parametrize("name", ["Memcpy HtoA (Pinned -> Array)", "Memset (Device)"])
def test_a_copy_of_an_unknown_kind_is_an_error(name):
    with pytest.raises(ValueError, match="not known"):
        traffic_of([{**UP, "name": name}])


class Runtime:
    def cudaHostRegister(self, start, nbytes, flags):
        return 0 if flags == 1 else 1

    def cudaHostUnregister(self, start):
        return 0


def test_what_is_locked_is_counted_until_it_is_unlocked():
    runtime = Runtime()
    locks = PageLocks(runtime)
    buffer = torch.empty(1000, dtype=torch.uint8)
    assert runtime.cudaHostRegister(buffer.data_ptr(), 1000, 1) == 0
    assert runtime.cudaHostRegister(1, 10, 0) != 0
    assert locks.held == {buffer.data_ptr(): 1000}
    assert locks.covers(buffer[100:200])
    assert not locks.covers(torch.empty(1000))
    runtime.cudaHostUnregister(buffer.data_ptr())
    assert locks.held == {}
    assert locks.errors == []


@pytest.mark.parametrize("start", [4096, 4000, 5095])
def test_memory_locked_twice_is_an_error(start):
    runtime = Runtime()
    locks = PageLocks(runtime)
    runtime.cudaHostRegister(4096, 1000, 1)
    assert locks.errors == []
    runtime.cudaHostRegister(start, 1000, 1)
    assert len(locks.errors) == 1


def test_unlocking_what_is_not_locked_is_an_error():
    runtime = Runtime()
    locks = PageLocks(runtime)
    runtime.cudaHostUnregister(4096)
    assert len(locks.errors) == 1


def test_a_size_is_refused_only_inside():
    runtime = Runtime()
    locks = PageLocks(runtime)
    with locks.refusing(1000):
        assert runtime.cudaHostRegister(4096, 1000, 1) != 0
        assert runtime.cudaHostRegister(8192, 1001, 1) == 0
    assert runtime.cudaHostRegister(4096, 1000, 1) == 0
    assert locks.held == {8192: 1001, 4096: 1000}
