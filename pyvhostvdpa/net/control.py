# SPDX-License-Identifier: MIT
"""The control queue's commands, and a model of the state they set (virtio 1.3, 5.1.6.5).

Whatever resets a device resets that state, so it is kept here and replayed
after each start. Numbers are little-endian on the wire.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .features import Feature

OK, ERR = 0, 1
MAC_TABLE_ENTRIES = 64
"""Addresses that a replayed MAC_TABLE_SET holds; a guest with more gets promiscuous mode instead."""
LARGEST_COMMAND = 2 + 2 * 4 + MAC_TABLE_ENTRIES * 6
MAX_VLAN = 4096
RSS_KEY_MAX = 40
_RSS_HEAD = struct.Struct("<IHH")
_HASH_TYPES, _HASH_RESERVED = 4, 8


class Class(enum.IntEnum):
    """``VIRTIO_NET_CTRL_*``: the class of a command."""

    RX = 0
    MAC = 1
    VLAN = 2
    ANNOUNCE = 3
    MQ = 4
    GUEST_OFFLOADS = 5


class Rx(enum.IntEnum):
    """``VIRTIO_NET_CTRL_RX_*``: receive modes, each one byte on or off."""

    PROMISC = 0
    ALLMULTI = 1
    ALLUNI = 2
    NOMULTI = 3
    NOUNI = 4
    NOBCAST = 5


MAC_TABLE_SET, MAC_ADDR_SET = 0, 1
VLAN_ADD, VLAN_DEL = 0, 1
ANNOUNCE_ACK = 0
VQ_PAIRS_SET, RSS_CONFIG, HASH_CONFIG = 0, 1, 2
GUEST_OFFLOADS_SET = 0

GUEST_OFFLOADS = Feature.GUEST_CSUM | Feature.GUEST_TSO4 | Feature.GUEST_TSO6 | Feature.GUEST_ECN | Feature.GUEST_UFO
"""What GUEST_OFFLOADS_SET may switch, where it was negotiated (virtio 1.3, 5.1.6.5.6)."""


class BadCommand(ValueError):
    """A command that no correct driver sends; it is answered with ERR."""


def command(kind: Class, number: int, payload: bytes = b"") -> bytes:
    """Return a command as it goes to the device."""
    return bytes([kind, number]) + payload


def mac_table(unicast: Sequence[bytes], multicast: Sequence[bytes]) -> bytes:
    """Return the payload of MAC_TABLE_SET."""
    return b"".join(struct.pack("<I", len(table)) + b"".join(table) for table in (unicast, multicast))


def parse_mac_table(payload: bytes) -> tuple[list[bytes], list[bytes]]:
    """Return unicast and multicast addresses; BadCommand if the lengths do not add up."""
    tables: list[list[bytes]] = []
    for _ in range(2):
        if len(payload) < 4:
            raise BadCommand("MAC table without its length")
        count, payload = int.from_bytes(payload[:4], "little"), payload[4:]
        if count * 6 > len(payload):
            raise BadCommand(f"MAC table of {count} entries in {len(payload)} bytes")
        tables.append([payload[i * 6 : i * 6 + 6] for i in range(count)])
        payload = payload[count * 6 :]
    if payload:
        raise BadCommand(f"{len(payload)} bytes behind the MAC tables")
    return tables[0], tables[1]


def _rss_key_at(payload: bytes) -> int:
    if len(payload) < _RSS_HEAD.size:
        raise BadCommand(f"RSS configuration of {len(payload)} bytes")
    mask: int = _RSS_HEAD.unpack_from(payload)[1]
    if mask & (mask + 1):
        raise BadCommand(f"RSS table mask {mask:#x}")
    return _RSS_HEAD.size + 2 * (mask + 1) + 2


def _check_key(payload: bytes, at: int) -> None:
    if len(payload) <= at or payload[at] > RSS_KEY_MAX or len(payload) != at + 1 + payload[at]:
        raise BadCommand(f"hash configuration of {len(payload)} bytes, its key's length at {at}")


def check_hash_config(payload: bytes) -> None:
    """Raise :class:`BadCommand` if the lengths in a HASH_CONFIG's payload do not add up (virtio 1.3, 5.1.6.5.6.4)."""
    _check_key(payload, _HASH_TYPES + _HASH_RESERVED)


def rss_pairs(payload: bytes) -> int:
    """Return how many TX queues RSS_CONFIG takes into use; BadCommand if its lengths do not add up."""
    at = _rss_key_at(payload)
    _check_key(payload, at)
    return int.from_bytes(payload[at - 2 : at], "little")


@dataclass
class ControlModel:
    """What the guest set through its control queue, since the device knows it only until the next reset.

    ``features`` are those negotiated; the defaults are a device's after reset,
    which receives everything until a command limits that (virtio 1.3, 5.1.6.5.1).
    """

    features: Feature
    mac: bytes | None = None
    unicast: list[bytes] = field(default_factory=list)
    multicast: list[bytes] = field(default_factory=list)
    unicast_overflow: bool = False
    multicast_overflow: bool = False
    rx: dict[Rx, bool] = field(default_factory=lambda: {mode: mode is Rx.PROMISC for mode in Rx})
    vlans: set[int] = field(default_factory=set)
    pairs: int = 1
    offloads: int | None = None
    rss: bytes | None = None
    hash_config: bytes | None = None
    announce: bool = False

    def copy(self) -> ControlModel:
        """Return what was set so far, in an object of its own."""
        return replace(
            self,
            unicast=list(self.unicast),
            multicast=list(self.multicast),
            rx=dict(self.rx),
            vlans=set(self.vlans),
        )

    def apply(self, data: bytes) -> None:
        """Apply a command that the device accepted; BadCommand for a malformed one."""
        if len(data) < 2:
            raise BadCommand("command without class and number")
        kind, number, payload = data[0], data[1], data[2:]
        handlers = {
            Class.RX: self._rx,
            Class.MAC: self._mac,
            Class.VLAN: self._vlan,
            Class.ANNOUNCE: self._announce,
            Class.MQ: self._mq,
            Class.GUEST_OFFLOADS: self._offloads,
        }
        if kind not in handlers:
            raise BadCommand(f"class {kind}")
        handlers[Class(kind)](number, payload)

    def _rx(self, number: int, payload: bytes) -> None:
        if number not in list(Rx) or len(payload) != 1:
            raise BadCommand(f"RX command {number} with {len(payload)} bytes")
        self.rx[Rx(number)] = bool(payload[0])

    def _mac(self, number: int, payload: bytes) -> None:
        if number == MAC_ADDR_SET and len(payload) == 6:
            self.mac = payload
        elif number == MAC_TABLE_SET:
            unicast, multicast = parse_mac_table(payload)
            self.set_mac_table(unicast, multicast)
        else:
            raise BadCommand(f"MAC command {number} with {len(payload)} bytes")

    def set_mac_table(self, unicast: Sequence[bytes], multicast: Sequence[bytes]) -> None:
        """Keep both tables, or that they were more than a command to the device holds."""
        overflow = len(unicast) + len(multicast) > MAC_TABLE_ENTRIES
        self.unicast_overflow = self.multicast_overflow = overflow
        self.unicast = [] if overflow else list(unicast)
        self.multicast = [] if overflow else list(multicast)

    def receives(self, mode: Rx) -> bool:
        """Whether the device is in a receive mode: the guest wants it, or its table is too large to do without."""
        overflow = {Rx.PROMISC: self.unicast_overflow, Rx.ALLMULTI: self.multicast_overflow}
        return self.rx[mode] or overflow.get(mode, False)

    def _vlan(self, number: int, payload: bytes) -> None:
        if number not in (VLAN_ADD, VLAN_DEL) or len(payload) != 2:
            raise BadCommand(f"VLAN command {number} with {len(payload)} bytes")
        vlan = int.from_bytes(payload, "little")
        if vlan >= MAX_VLAN:
            raise BadCommand(f"VLAN {vlan}")
        (self.vlans.add if number == VLAN_ADD else self.vlans.discard)(vlan)

    def _announce(self, number: int, payload: bytes) -> None:
        if number != ANNOUNCE_ACK:
            raise BadCommand(f"ANNOUNCE command {number}")
        self.announce = False

    def _mq(self, number: int, payload: bytes) -> None:
        if number == VQ_PAIRS_SET and len(payload) == 2:
            self.pairs = int.from_bytes(payload, "little")
            if self.rss is not None:
                self._end_rss(self.rss)
        elif number == RSS_CONFIG:
            self.pairs = rss_pairs(payload)
            self.rss, self.hash_config = payload, None
        elif number == HASH_CONFIG:
            check_hash_config(payload)
            self.rss, self.hash_config = None, payload
        else:
            raise BadCommand(f"MQ command {number} with {len(payload)} bytes")

    def _end_rss(self, rss: bytes) -> None:
        """VQ_PAIRS_SET ends the spreading; hashes are still reported if HASH_REPORT was negotiated."""
        if Feature.HASH_REPORT in self.features:
            key = rss[_rss_key_at(rss) :]
            self.hash_config = rss[:_HASH_TYPES] + bytes(_HASH_RESERVED) + key
        self.rss = None

    def _offloads(self, number: int, payload: bytes) -> None:
        if number != GUEST_OFFLOADS_SET or len(payload) != 8:
            raise BadCommand(f"GUEST_OFFLOADS command {number} with {len(payload)} bytes")
        self.offloads = int.from_bytes(payload, "little")

    def for_device(self, data: bytes, wanted: ControlModel) -> list[bytes]:
        """Return what the device is sent for a guest's command that leads to ``wanted``.

        That is the command, unless a MAC table is, or was, too large for the
        device: then promiscuous mode stands in for it, whatever the guest
        says of the mode itself. What widens comes before what narrows.
        """
        if not (self.unicast_overflow or wanted.unicast_overflow) or data[0] not in (Class.RX, Class.MAC):
            return [data]
        if data[:2] == bytes([Class.MAC, MAC_ADDR_SET]) or (data[0] == Class.RX and data[1] > Rx.ALLMULTI):
            return [data]
        changed = [mode for mode in (Rx.PROMISC, Rx.ALLMULTI) if self.receives(mode) != wanted.receives(mode)]
        commands = [command(Class.RX, mode, b"\1") for mode in changed if wanted.receives(mode)]
        if (self.unicast, self.multicast) != (wanted.unicast, wanted.multicast):
            commands.append(command(Class.MAC, MAC_TABLE_SET, mac_table(wanted.unicast, wanted.multicast)))
        return commands + [command(Class.RX, mode, b"\0") for mode in changed if not wanted.receives(mode)]

    def replay(self) -> list[bytes]:
        """Return the commands that bring a device after reset to this state, in the order of QEMU's restore."""
        return [*self._replay_macs(), *self._replay_queues(), *self._replay_modes(), *self._replay_vlans()]

    def _replay_macs(self) -> list[bytes]:
        commands = []
        if Feature.CTRL_MAC_ADDR in self.features and self.mac is not None:
            commands.append(command(Class.MAC, MAC_ADDR_SET, self.mac))
        if Feature.CTRL_RX in self.features and (self.unicast or self.multicast):
            commands.append(command(Class.MAC, MAC_TABLE_SET, mac_table(self.unicast, self.multicast)))
        return commands

    def _replay_queues(self) -> list[bytes]:
        commands = []
        if Feature.MQ in self.features:
            commands.append(command(Class.MQ, VQ_PAIRS_SET, self.pairs.to_bytes(2, "little")))
        if self.rss is not None:
            commands.append(command(Class.MQ, RSS_CONFIG, self.rss))
        elif self.hash_config is not None:
            commands.append(command(Class.MQ, HASH_CONFIG, self.hash_config))
        if self.offloads is not None and self.offloads != int(self.features & GUEST_OFFLOADS):
            commands.append(command(Class.GUEST_OFFLOADS, GUEST_OFFLOADS_SET, self.offloads.to_bytes(8, "little")))
        return commands

    def _replay_modes(self) -> list[bytes]:
        if Feature.CTRL_RX not in self.features:
            return []
        commands = []
        if not self.receives(Rx.PROMISC):
            commands.append(command(Class.RX, Rx.PROMISC, b"\0"))
        if self.receives(Rx.ALLMULTI):
            commands.append(command(Class.RX, Rx.ALLMULTI, b"\1"))
        if Feature.CTRL_RX_EXTRA in self.features:
            extra = (Rx.ALLUNI, Rx.NOMULTI, Rx.NOUNI, Rx.NOBCAST)
            commands += [command(Class.RX, mode, b"\1") for mode in extra if self.rx[mode]]
        return commands

    def _replay_vlans(self) -> list[bytes]:
        if Feature.CTRL_VLAN not in self.features:
            return []
        return [command(Class.VLAN, VLAN_ADD, vlan.to_bytes(2, "little")) for vlan in sorted(self.vlans)]
