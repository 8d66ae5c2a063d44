# SPDX-License-Identifier: MIT
"""Whether another device's configuration space fits a guest that has read its own.

A driver reads the space when it starts and believes it from then on. Nothing renegotiates it across a migration, so
the space that the guest knows and the one of the device that it would move to are compared before it leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .config import NetConfig
from .features import Feature


@dataclass(frozen=True, slots=True)
class Misfit:
    """A field of the configuration space that the guest relies on and the device does not have.

    ``guest`` and ``device`` are both values in words, ``why`` what would go wrong, ``hint`` the next command.
    """

    field: str
    guest: str
    device: str
    why: str
    hint: str

    def __str__(self) -> str:
        return f"its {self.field} is {self.device}, the guest relies on {self.guest} ({self.why})"


_CREATE = "create the device like the guest's: vdpa dev add name NAME mgmtdev MGMTDEV"


def misfits(features: Feature, guest: bytes, device: bytes) -> Iterator[Misfit]:
    """Yield what of the configuration space ``guest``, as its driver knows it, the space ``device`` does not honour.

    ``features`` are those that the guest negotiated: a field without its feature means nothing, and a MAC that
    CTRL_MAC_ADDR can set is replayed. A field that one side does not have is unknown and not compared
    (:func:`unknown_fields`).
    """
    ours, theirs = NetConfig.parse(guest, features), NetConfig.parse(device, features)
    yield from _address(features, ours, theirs)
    yield from _link(ours, theirs)
    yield from _queues(ours, theirs)


def _address(features: Feature, guest: NetConfig, device: NetConfig) -> Iterator[Misfit]:
    can_set = Feature.CTRL_VQ | Feature.CTRL_MAC_ADDR
    if guest.mac and device.mac and guest.mac != device.mac and can_set not in features:
        yield Misfit(
            "MAC address",
            guest.mac,
            device.mac,
            "without CTRL_MAC_ADDR it cannot be set, and frames for the guest would not arrive",
            f"{_CREATE} mac {guest.mac}",
        )
    if guest.mtu and device.mtu is not None and device.mtu < guest.mtu:
        yield Misfit(
            "MTU",
            f"{guest.mtu}",
            f"{device.mtu}",
            "longer frames of the guest would be dropped",
            f"{_CREATE} mtu {guest.mtu}",
        )


def _link(guest: NetConfig, device: NetConfig) -> Iterator[Misfit]:
    if guest.link_up and device.link_up is False:
        yield Misfit(
            "link",
            "a link that is up",
            "down",
            "the guest would have no network",
            "bring the link of the device's port up: ip link set PORT up; vhost-vdpa list shows it",
        )
    for field, ours, theirs in (
        ("speed in Mbit/s", guest.speed, device.speed),
        ("duplex", guest.duplex, device.duplex),
    ):
        if ours is not None and theirs is not None and ours != theirs:
            yield Misfit(
                field,
                str(ours),
                str(theirs),
                "the guest has read it and is not notified of a change",
                "use a port like the source's, or a guest that does not negotiate SPEED_DUPLEX",
            )


def _queues(guest: NetConfig, device: NetConfig) -> Iterator[Misfit]:
    if guest.max_pairs is not None and device.max_pairs is not None and guest.max_pairs != device.max_pairs:
        yield Misfit(
            "max_virtqueue_pairs",
            str(guest.max_pairs),
            str(device.max_pairs),
            "the control queue comes behind that many pairs",
            f"{_CREATE} max_vqp {guest.max_pairs}",
        )
    for field, ours, theirs in (
        ("largest RSS key in bytes", guest.rss_key, device.rss_key),
        ("longest RSS indirection table", guest.rss_table, device.rss_table),
    ):
        if ours is not None and theirs is not None and theirs < ours:
            yield Misfit(field, str(ours), str(theirs), "the guest may set more than the device takes", _SAME_NIC)
    if guest.hash_types is not None and device.hash_types is not None and guest.hash_types & ~device.hash_types:
        yield Misfit(
            "set of RSS hash types",
            f"{guest.hash_types:#x}",
            f"{device.hash_types:#x}",
            f"types {guest.hash_types & ~device.hash_types:#x} are missing",
            _SAME_NIC,
        )


_SAME_NIC = "use a device of the source's kind; vhost-vdpa probe --json shows both configuration spaces"


def unknown_fields(features: Feature, guest: bytes, device: bytes) -> list[str]:
    """Return the fields that mean something to the guest and that one of both sides did not report."""
    ours, theirs = NetConfig.parse(guest, features), NetConfig.parse(device, features)
    needs = {
        "mac": Feature.MAC,
        "link_up": Feature.STATUS,
        "mtu": Feature.MTU,
        "max_pairs": Feature.MQ | Feature.RSS,
        "speed": Feature.SPEED_DUPLEX,
        "duplex": Feature.SPEED_DUPLEX,
        "rss_key": Feature.RSS | Feature.HASH_REPORT,
        "rss_table": Feature.RSS,
        "hash_types": Feature.RSS | Feature.HASH_REPORT,
    }
    return [
        name
        for name, feature in needs.items()
        if features & feature and (getattr(ours, name) is None or getattr(theirs, name) is None)
    ]
