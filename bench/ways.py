"""All ways, by the names that the command line has for them."""

from __future__ import annotations

from host_ways import DynamicVram, HostLowvram, MultiGpu
from other_ways import GroupOffloading, Mmgp, MoveUpAndBack
from plugin_ways import OneSlotPluginWay, PageablePluginWay, PluginWay
from way import Resident, Way

WAYS: dict[str, type[Way]] = {
    "resident": Resident,
    "plugin": PluginWay,
    "lowvram": HostLowvram,
    "dynamic": DynamicVram,
    "multigpu": MultiGpu,
    "wrapper": MoveUpAndBack,
    "diffusers": GroupOffloading,
    "mmgp": Mmgp,
    "plugin-pageable": PageablePluginWay,
    "plugin-one-slot": OneSlotPluginWay,
}
DEFAULT_WAYS = tuple(WAYS)[:8]
