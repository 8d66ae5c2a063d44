# SPDX-License-Identifier: MIT
"""The rules, one file per group of them."""

from __future__ import annotations

from importlib import import_module

from ..rule import Group, Rule

_FILES = (
    "identity",
    "config",
    "status",
    "queues",
    "groups",
    "iotlb",
    "maps",
    "suspend",
    "resume",
    "reset",
    "desc_groups",
    "control",
    "multiqueue",
    "interrupts",
    "rings",
    "config_irq",
    "data",
    "robust",
    "left",
    "block",
)


def all_groups() -> list[Group]:
    """Return all groups of rules, in the order in which they are tried."""
    found = []
    for name in _FILES:
        group = import_module(f".{name}", __name__).GROUP
        assert isinstance(group, Group)
        found.append(group)
    return found


def catalogue(device_id: int | None = None) -> list[Rule]:
    """Return every rule, or those for a kind of device (a virtio id)."""
    rules = [rule for group in all_groups() for rule in group.rules]
    return [rule for rule in rules if device_id is None or rule.device in (None, device_id)]
