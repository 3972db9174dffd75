"""Declared patches: applied once, reverted to the same objects, named where they do not fit."""

import types

import pytest

from block_swap.patch_table import Patch, PatchTable


class Base:
    def inherited(self, value):
        return value


class Host(Base):
    def method(self, value):
        return value


def plus_one(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs) + 1


@pytest.fixture
def module():
    module = types.ModuleType("host")
    module.Host, module.function = Host, lambda value: value
    return module


@pytest.mark.parametrize("attribute", ["function", "Host.method", "Host.inherited"])
def test_a_patch_wraps_and_is_taken_back(module, attribute):
    def call():
        return {
            "function": lambda: module.function(1),
            "Host.method": lambda: Host().method(1),
            "Host.inherited": lambda: Host().inherited(1),
        }[attribute]()

    before = dict(vars(module)), dict(vars(Host)), dict(vars(Base))
    table = PatchTable()
    table.apply([Patch(module, attribute, plus_one)])
    table.apply([Patch(module, attribute, plus_one)])
    assert call() == 2
    assert Base().inherited(1) == 1
    table.remove()
    table.remove()
    assert call() == 1
    assert (dict(vars(module)), dict(vars(Host)), dict(vars(Base))) == before


def test_a_missing_target_is_named_and_skipped(module, caplog):
    table = PatchTable()
    table.apply(
        [
            Patch("no_such_module", "function", plus_one),
            Patch(module, "Host.gone", plus_one),
            Patch(module, "function", plus_one),
        ]
    )
    assert module.function(1) == 2
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "no_such_module.function" in messages[0]
    assert "host.Host.gone" in messages[1]
    table.remove()


def test_what_others_patched_since_stays(module, caplog):
    table = PatchTable()
    table.apply([Patch(module, "function", plus_one)])
    ours = module.function

    def theirs(value):
        return 10 * ours(value)

    module.function = theirs
    table.remove()
    assert module.function is theirs
    assert module.function(1) == 10
    assert "patched again" in caplog.text
