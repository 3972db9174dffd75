"""Allocation strings: every mode, unit, wildcard and error."""

from fractions import Fraction

import pytest

from block_swap.allocation_parser import AllocationError, Mode, parse_allocation

DEVICES = ("cpu", "cuda:0", "cuda:1", "mps")
GIB = 1 << 30


def parse(text, compute="cuda:0"):
    return parse_allocation(text, DEVICES, compute)


def entries(text, **kwargs):
    return [(e.device, e.amount, e.wildcard) for e in parse(text, **kwargs).entries]


@pytest.mark.parametrize(
    ("amount", "nbytes"),
    [
        ("3b", 3),
        ("2k", 2048),
        ("2kb", 2048),
        ("2KiB", 2048),
        ("1.5m", 3 << 19),
        ("512MB", 512 << 20),
        ("1mib", 1 << 20),
        ("2g", 2 * GIB),
        ("2.5gb", 5 * GIB // 2),
        ("2.5GiB", 5 * GIB // 2),
        (".5gb", GIB // 2),
        ("3.gb", 3 * GIB),
        (" 2 gb ", 2 * GIB),
    ],
)
def test_units_are_powers_of_1024_in_any_case(amount, nbytes):
    allocation = parse(f"cuda:0,{amount};cpu,*")
    assert allocation.mode is Mode.BYTES
    assert allocation.entries[0].amount == nbytes


def test_entries_keep_the_order_written_and_devices_are_normalised():
    assert entries(" CUDA:1 , 3.0g ; cuda,2.5gb ; cpu:0,* ") == [
        ("cuda:1", 3 * GIB, False),
        ("cuda:0", 5 * GIB // 2, False),
        ("cpu", None, True),
    ]


def test_mode_is_read_from_the_values_not_from_device_names():
    assert parse("mps,25%;cpu,75%", compute="mps").mode is Mode.RATIO
    assert parse("mps,0.25;cpu,0.5", compute="mps").mode is Mode.FRACTION


def test_a_number_before_the_wildcard_is_a_wildcard_too():
    assert entries("cuda:0,2gb;cpu,5gb*") == [("cuda:0", 2 * GIB, False), ("cpu", None, True)]


def test_the_cpu_is_the_wildcard_where_none_is_written():
    assert entries("cuda:0,2gb")[-1] == ("cpu", None, True)
    assert entries("cuda:0,2gb;cpu,4gb")[-1] == ("cpu", 4 * GIB, True)
    assert entries("cpu,4gb;cuda:1,*") == [("cpu", 4 * GIB, False), ("cuda:1", None, True)]


def test_ratios_are_normalised_unless_a_wildcard_takes_the_rest():
    assert [a for _, a, _ in entries("cuda:0,8%;cuda:1,8%;cpu,4%")] == [40, 40, 20]
    assert [a for _, a, _ in entries("cuda:0,50%;cpu,*")] == [50, None]


def test_a_wildcard_alone_and_a_zero_without_unit():
    assert entries("cpu,*") == [("cpu", None, True)]
    assert entries("cuda:0,0;cuda:1,2gb;cpu,*")[0] == ("cuda:0", 0, False)


def test_virtual_vram_with_one_and_several_donors():
    allocation = parse("#cuda:0;4.0;cpu")
    assert allocation.mode is Mode.VIRTUAL_VRAM
    assert allocation.virtual_vram == 4 * GIB
    assert entries("#cuda:0;4.0;cuda:1,cpu") == [("cuda:1", None, False), ("cpu", None, True)]
    assert entries("#cuda:0;0.1;cuda:1")[-1] == ("cpu", None, True)


def test_the_expert_part_wins_over_virtual_vram():
    allocation = parse("cuda:0,2gb;cpu,*#cuda:0;4.0;cpu")
    assert allocation.mode is Mode.BYTES
    assert allocation.source == "cuda:0,2gb;cpu,*#cuda:0;4.0;cpu"


def test_the_compute_device_comes_from_the_caller_else_from_the_string():
    assert parse("cpu,*#cuda:1", compute=None).compute_device == "cuda:1"
    assert parse("cpu,*#cuda:1", compute="cuda:0").compute_device == "cuda:0"


def test_bytes_quotas_are_the_amounts():
    quotas = parse("cuda:0,2.5gb;cuda:1,1g;cpu,*").quotas(10 * GIB, {})
    assert [(q.device, q.nbytes) for q in quotas] == [
        ("cuda:0", 5 * GIB // 2),
        ("cuda:1", GIB),
        ("cpu", None),
    ]


def test_fractions_are_of_each_devices_memory():
    memory = {"cuda:0": 8 * GIB, "cpu": 64 * GIB}
    quotas = parse("cuda:0,0.1;cpu,0.5").quotas(GIB, memory)
    assert [q.nbytes for q in quotas] == [int(Fraction("0.1") * 8 * GIB), 32 * GIB]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is empty"),
        ("   ", "it is empty"),
        ("#cuda:0", "it is empty"),
        (";", "entry 1 '': the entry is empty"),
        ("cuda:0,2gb;;cpu,*", "entry 2 '': the entry is empty"),
        ("cuda:0,2gb;cpu,*;", "entry 3 '': the entry is empty"),
        ("cuda:0", "no ',' between device and amount"),
        ("cuda:0,", "the amount is missing"),
        (",2gb", "no device"),
        ("cuda:0,-2gb", "'-2gb' is not an amount"),
        ("cuda:0,nan", "'nan' is not an amount"),
        ("cuda:0,inf", "'inf' is not an amount"),
        ("cuda:0,1e3mb", "not an amount"),
        ("cuda:0,0x10gb", "not an amount"),
        ("cuda:0,2,5gb", "'2,5gb' is not an amount"),
        ("cuda:0,2tb", "'tb' is not a unit"),
        ("cuda:0,gb", "'gb' is not an amount"),
        ("cuda:0,٣gb", "is not an amount"),
        ("cuda:0,２gb", "is not an amount"),
        ("cuda:0,8", "write 8gb or 8%"),
        ("cuda:7,2gb", "this machine has no device 'cuda:7'"),
        ("gpu,2gb", "this machine has no device 'gpu'"),
        ("cuda:0,1gb;cuda,2gb", "cuda:0 is given twice"),
        ("cuda:0,*;cpu,*", "more than one '*'"),
        ("cuda:0,1gb;cpu,50%", "mixed"),
        ("cuda:0,0.5;cpu,50%", "mixed"),
        ("cuda:0,0%;cpu,0%", "add up to nothing"),
        ("cuda:0,x*", "'x*' is not an amount"),
        ("cuda:0,**", "'**' is not an amount"),
        ("cuda:0," + "9" * 5000 + "gb", "is not an amount"),
        ("x" * 10_000, "no ',' between device and amount"),
        ("cpu,1gb;" * 1_250, "entry 2 'cpu,1gb': cpu is given twice"),
        ("#cuda:0;nan;cpu", "'nan' is not an amount of virtual VRAM"),
        ("#cuda:0;-1;cpu", "not an amount of virtual VRAM"),
        ("#cuda:0;4.0;cuda:0", "the donor is the compute device"),
        ("#cuda:0;4.0;cpu,cpu", "cpu is given twice"),
        ("#cuda:0;4.0;", "no device"),
        ("cuda:0,2gb#foo#cuda:0", "'2gb#foo' is not an amount"),
    ],
)
def test_nonsense_gets_an_error_that_a_person_can_act_on(text, says):
    with pytest.raises(AllocationError) as caught:
        parse(text)
    message = str(caught.value)
    assert says in message
    assert "Devices present: cpu, cuda:0, cuda:1, mps" in message
    assert "Example: cuda:0,2.5gb;cpu,*" in message
    assert len(message) < 1_000
    assert message.isascii()


@pytest.mark.parametrize("text", [None, 3, ["cpu,*"]])
def test_what_is_no_string_is_refused(text):
    with pytest.raises(AllocationError, match="is a string"):
        parse(text)


def test_an_unknown_compute_device_is_refused():
    with pytest.raises(AllocationError, match="compute device 'cuda:5'"):
        parse("cpu,*", compute="cuda:5")
