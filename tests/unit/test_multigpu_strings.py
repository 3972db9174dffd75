"""Which strings MultiGPU reads as they are meant, on machines that the rig has none of."""

import pytest

from block_swap.allocation_parser import in_bytes, parse_allocation
from block_swap.multigpu_strings import is_readable

DEVICES = ("cpu", "cuda:0", "cuda:1", "mlu:0", "mps")
MEMORY = dict.fromkeys(DEVICES, 8 << 30)


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        ("cuda:0,25%;cpu,75%#cuda:0", True),
        ("mps,25%;cpu,75%#mps", False),  # the m makes it bytes
        ("mlu:0,0.5;cpu,0.5#mlu:0", False),
        ("mps,*#mps", True),
        ("cpu,*#cuda:0", False),
        ("cuda:0,2gb;cpu,*", True),  # it computes on cuda:0 where nothing is stored
        ("cuda:1,2gb;cpu,*", True),
        ("cuda:0,2gb;cpu,*#", True),
        ("#cuda:0;4.0;cpu", True),
        ("#cuda:0;4.0;cuda:1,cpu", True),
        ("#cuda:0;4.0; cuda:1 ,cpu", False),
        (" #cuda:0;4.0;cpu", False),
    ],
)
def test_what_multigpu_reads(text, readable):
    compute = None if "cuda:0;" in text or text.partition("#")[2] else "cuda:0"
    allocation = parse_allocation(text, DEVICES, compute)
    assert is_readable(allocation, DEVICES) is readable
    quotas = allocation.quotas(1 << 30, MEMORY)
    translated = parse_allocation(in_bytes(allocation, quotas), DEVICES)
    assert is_readable(translated, DEVICES)
    assert translated.compute_device == allocation.compute_device
    limits = {q.device: q.nbytes for q in quotas if not q.wildcard}
    assert {
        q.device: q.nbytes for q in translated.quotas(1 << 30, MEMORY) if not q.wildcard
    } == limits


def test_where_there_is_no_first_card_nothing_stored_is_not_readable():
    allocation = parse_allocation("mps,2gb;cpu,*", ("cpu", "mps"), "mps")
    assert not is_readable(allocation, ("cpu", "mps"))
    assert in_bytes(allocation, allocation.quotas(1 << 30, {})).endswith("#mps")
