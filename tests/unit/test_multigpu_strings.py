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
        ("cuda:1,2gb;cpu,*#cuda:1", True),
        ("#cuda:0;4.0;cpu", True),
        ("#cuda:0;4.0;cuda:1,cpu", True),
        ("#cuda:0;4.0; cuda:1 ,cpu", False),
        (" #cuda:0;4.0;cpu", False),
    ],
)
def test_what_multigpu_reads(text, readable):
    allocation = parse_allocation(text, DEVICES)
    assert is_readable(allocation, DEVICES) is readable
    quotas = allocation.quotas(1 << 30, MEMORY)
    translated = parse_allocation(in_bytes(allocation, quotas), DEVICES)
    assert is_readable(translated, DEVICES)
    assert translated.compute_device == allocation.compute_device
    limits = {q.device: q.nbytes for q in quotas if not q.wildcard}
    assert {
        q.device: q.nbytes for q in translated.quotas(1 << 30, MEMORY) if not q.wildcard
    } == limits


@pytest.mark.parametrize("stored", ["", "#"])
def test_where_nothing_is_stored_it_computes_on_the_first_card(stored):
    for compute in ("cuda:0", "cuda:1", "mps"):
        allocation = parse_allocation(f"{compute},2gb;cpu,*{stored}", DEVICES, compute)
        assert is_readable(allocation, DEVICES) is (compute == "cuda:0")
        assert in_bytes(allocation, allocation.quotas(1 << 30, {})).endswith(f"#{compute}")
