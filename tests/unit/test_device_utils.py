"""Every device family of the host, each against a stand-in for its torch module."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from block_swap import device_utils

GIB = 1 << 30
INDEXED = ["cuda", "xpu", "npu", "mlu", "corex"]
STREAMS = ("Stream", "Event", "stream", "current_stream")


class Backend:
    """A stand-in for ``torch.<family>`` with two devices."""

    def __init__(self, *missing):
        self.calls = []
        self.missing = missing
        for name in STREAMS:
            setattr(self, name, object())

    def __getattribute__(self, name):
        if name not in ("missing", "calls", "__dict__") and name in self.missing:
            raise AttributeError(name)
        return super().__getattribute__(name)

    def is_available(self):
        return True

    def device_count(self):
        return 2

    def mem_get_info(self, device):
        return 3 * GIB, 8 * GIB

    def memory_reserved(self, device):
        return 2 * GIB

    def get_device_properties(self, device):
        return SimpleNamespace(total_memory=6 * GIB)

    @contextmanager
    def device(self, device):
        self.calls.append(("enter", device.index))
        yield
        self.calls.append(("leave", device.index))

    def synchronize(self, device):
        self.calls.append(("synchronize", device.index))

    def empty_cache(self):
        self.calls.append("empty_cache")

    def ipc_collect(self):
        self.calls.append("ipc_collect")


@pytest.fixture
def family(monkeypatch):
    """Puts a stand-in in the place of one family; the others have no devices."""

    def put(name, backend):
        for other in INDEXED:
            monkeypatch.setattr(torch, other, None, raising=False)
        monkeypatch.setattr(torch, name, backend, raising=False)

        def torch_device(device):
            kind, _, index = device.partition(":")
            return SimpleNamespace(type=kind, index=int(index) if index else None)

        monkeypatch.setattr(device_utils, "torch_device", torch_device)
        return backend

    return put


@pytest.mark.parametrize("name", INDEXED)
def test_indexed_families(family, name):
    backend = family(name, Backend())
    assert device_utils.device_names() == ("cpu", f"{name}:0", f"{name}:1")
    assert device_utils.total_memory(f"{name}:1") == 8 * GIB
    assert device_utils.used_memory(f"{name}:1") == 5 * GIB
    device = SimpleNamespace(type=name, index=1)
    assert device_utils.stream_module(device) is backend
    device_utils.synchronize(device)
    assert backend.calls == [("synchronize", 1)]


@pytest.mark.parametrize("name", INDEXED)
def test_caches_of_all_devices_are_emptied_each_on_its_device(family, name):
    backend = family(name, Backend())
    device_utils.empty_caches()
    assert backend.calls == [
        call
        for index in (0, 1)
        for call in (
            ("enter", index),
            ("synchronize", index),
            "empty_cache",
            "ipc_collect",
            ("leave", index),
        )
    ]


@pytest.mark.parametrize("name", INDEXED)
def test_a_device_that_holds_nothing_is_left_alone(family, monkeypatch, name):
    backend = family(name, Backend())
    monkeypatch.setattr(backend, "memory_reserved", lambda device: device.index * GIB)
    device_utils.empty_caches()
    assert {call[1] for call in backend.calls if call[0] == "synchronize"} == {1}


def test_a_device_without_a_context_is_not_even_asked(family, monkeypatch):
    """cudaMallocAsync would make one to answer what it holds."""
    backend, asked = family("cuda", Backend()), []
    monkeypatch.setattr(
        torch._C, "_cuda_hasPrimaryContext", lambda index: index == 0, raising=False
    )
    monkeypatch.setattr(
        backend, "memory_reserved", lambda device: asked.append(device.index) or GIB
    )
    device_utils.empty_caches()
    assert asked == [0]
    assert {call[1] for call in backend.calls if call[0] == "synchronize"} == {0}


@pytest.mark.parametrize("lacks", [True, False])
def test_events_sleep_where_the_backend_can(family, lacks):
    """A worker that spins while it waits for the bus takes a core."""
    made = []

    class Event:
        def __init__(self, **options):
            if lacks and options:
                raise TypeError("no such option")
            made.append(options)

    family("cuda", Backend()).Event = Event
    device_utils.blocking_event(SimpleNamespace(type="cuda", index=0))
    assert made == [{} if lacks else {"blocking": True}]


@pytest.mark.parametrize("name", INDEXED)
def test_what_a_family_lacks_is_done_without(family, name):
    family(name, Backend("mem_get_info", "ipc_collect", "device", "Event"))
    assert device_utils.total_memory(f"{name}:0") == 6 * GIB
    assert device_utils.used_memory(f"{name}:0") == 2 * GIB
    assert device_utils.stream_module(SimpleNamespace(type=name, index=0)) is None
    device_utils.empty_caches()
    family(name, Backend("mem_get_info", "get_device_properties", "memory_reserved", "empty_cache"))
    assert device_utils.total_memory(f"{name}:0") == 0
    assert device_utils.used_memory(f"{name}:0") == 0
    device_utils.empty_caches()


@pytest.mark.parametrize("name", INDEXED)
def test_a_family_that_is_not_available_has_no_devices(family, monkeypatch, name):
    backend = family(name, Backend())
    monkeypatch.setattr(backend, "is_available", lambda: False)
    assert device_utils.device_names() == ("cpu",)


@pytest.mark.parametrize(("name", "plugin"), [("npu", "torch_npu"), ("mlu", "torch_mlu")])
def test_a_vendors_plugin_is_imported_before_torch_is_asked(monkeypatch, name, plugin):
    monkeypatch.delattr(torch, name, raising=False)

    class Finder:
        @staticmethod
        def find_spec(fullname, path=None, target=None):
            if fullname == plugin:
                monkeypatch.setattr(torch, name, Backend(), raising=False)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    assert f"{name}:1" in device_utils.device_names()


def test_mps_has_one_device_without_index(family, monkeypatch):
    calls = []
    backend = SimpleNamespace(
        recommended_max_memory=lambda: 16 * GIB,
        driver_allocated_memory=lambda: 4 * GIB,
        synchronize=lambda: calls.append("synchronize"),
        empty_cache=lambda: calls.append("empty_cache"),
    )
    family("mps", backend)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_utils.device_names() == ("cpu", "mps")
    assert device_utils.total_memory("mps") == 16 * GIB
    assert device_utils.used_memory("mps") == 4 * GIB
    assert device_utils.stream_module(SimpleNamespace(type="mps", index=None)) is None
    device_utils.empty_caches()
    assert calls == ["synchronize", "empty_cache"]


def test_directml_devices_have_names_that_torch_does_not_know(monkeypatch):
    directml = SimpleNamespace(
        device_count=lambda: 2, device=lambda index: torch.device("privateuseone", index)
    )
    monkeypatch.setitem(sys.modules, "torch_directml", directml)
    assert device_utils.device_names()[-2:] == ("directml:0", "directml:1")
    assert device_utils.torch_device("directml:1") == torch.device("privateuseone", 1)
    assert device_utils.name_of(torch.device("privateuseone", 1)) == "directml:1"
    assert device_utils.total_memory("directml:0") == 0
    assert device_utils.stream_module(torch.device("privateuseone", 0)) is None
    device_utils.synchronize(torch.device("privateuseone", 0))
    device_utils.empty_caches()


def test_the_cpu():
    assert device_utils.device_names()[0] == "cpu"
    assert device_utils.total_memory("cpu") == device_utils.ram()[1]
    assert 0 < device_utils.used_memory("cpu") < device_utils.total_memory("cpu")
    assert device_utils.stream_module(torch.device("cpu")) is None
    device_utils.synchronize(torch.device("cpu"))
    device_utils.trim_host_heap()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """64 GiB of RAM, half of it available, and no container."""
    memory = SimpleNamespace(available=32 << 30, total=64 << 30)
    monkeypatch.setattr(device_utils.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(device_utils, "CGROUP", tmp_path)
    return tmp_path


def write_cgroup(folder, version, limit):
    names = device_utils.CGROUP_FILES[version]
    texts = (f"{limit}\n", f"{10 << 30}\n", f"anon 5\ninactive_file {2 << 30}\n")
    for name, text in zip(names, texts, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="ascii")


def test_ram_is_the_machines_outside_of_a_container(machine):
    assert device_utils.ram() == (32 << 30, 64 << 30)
    write_cgroup(machine, 0, "max")
    assert device_utils.ram() == (32 << 30, 64 << 30)
    write_cgroup(machine, 1, (1 << 63) - 4096)  # what version 1 has for none
    assert device_utils.ram() == (32 << 30, 64 << 30)


@pytest.mark.parametrize("version", [0, 1])
def test_ram_is_what_its_limit_leaves_inside(machine, version):
    write_cgroup(machine, version, 16 << 30)
    assert device_utils.ram() == (8 << 30, 16 << 30)
    assert device_utils.total_memory("cpu") == 16 << 30  # one truth, also for fractions of it
    assert device_utils.used_memory("cpu") == 8 << 30
    write_cgroup(machine, version, 8 << 30)
    assert device_utils.ram() == (0, 8 << 30)
