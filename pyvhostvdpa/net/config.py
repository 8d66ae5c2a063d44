# SPDX-License-Identifier: MIT
"""The configuration space of a virtio-net device (virtio 1.3, 5.1.4)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from .features import Feature

_HEAD = struct.Struct("<6sHHH")
_TAIL = struct.Struct("<IBBHI")
"""speed, duplex, rss_max_key_size, rss_max_indirection_table_length, supported_hash_types."""
MAX_PAIRS_OFFSET = 8
"""Of ``max_virtqueue_pairs`` in struct virtio_net_config."""
MAX_CONFIG = 256
"""Bytes of a configuration space that are looked at; the structure of virtio 1.3 has 28."""
LINK_UP, ANNOUNCE = 1, 2
_UNKNOWN_SPEED = 0xFFFFFFFF
_DUPLEX = {0: "half", 1: "full"}


@dataclass(frozen=True, slots=True)
class NetConfig:
    """The fields that mean something with the features at hand; None for one that does not, or is not there.

    ``mtu`` in bytes, ``speed`` in Mbit/s, ``duplex`` "half" or "full", ``rss_key`` in bytes, ``rss_table`` in entries,
    ``hash_types`` a mask of ``VIRTIO_NET_HASH_TYPE_*``, ``raw`` the space as it was read.
    """

    mac: str | None
    link_up: bool | None
    max_pairs: int | None
    mtu: int | None
    speed: int | None
    raw: bytes
    duplex: str | None = None
    rss_key: int | None = None
    rss_table: int | None = None
    hash_types: int | None = None

    @classmethod
    def parse(cls, raw: bytes, features: Feature) -> NetConfig:
        """Read the space of a device with ``features``; fields behind the end of a short one are ``None``."""
        mac, status, pairs, mtu = _HEAD.unpack(raw[: _HEAD.size].ljust(_HEAD.size, b"\0"))
        speed, duplex, key, entries, types = _TAIL.unpack(
            raw[_HEAD.size :][: _TAIL.size].ljust(_TAIL.size, b"\xff"),
        )

        def known(end: int, needs: Feature) -> bool:
            return len(raw) >= end and bool(features & needs)

        return cls(
            mac=mac.hex(":") if known(6, Feature.MAC) else None,
            link_up=bool(status & LINK_UP) if known(8, Feature.STATUS) else None,
            max_pairs=pairs if known(10, Feature.MQ | Feature.RSS) else None,
            mtu=mtu if known(12, Feature.MTU) else None,
            speed=speed if known(16, Feature.SPEED_DUPLEX) and speed != _UNKNOWN_SPEED else None,
            raw=raw,
            duplex=_DUPLEX.get(duplex) if known(17, Feature.SPEED_DUPLEX) else None,
            rss_key=key if known(18, Feature.RSS | Feature.HASH_REPORT) else None,
            rss_table=entries if known(20, Feature.RSS) else None,
            hash_types=types if known(24, Feature.RSS | Feature.HASH_REPORT) else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, ``raw`` in hex."""
        known = {name: getattr(self, name) for name in self.__slots__ if name != "raw"}
        return {**known, "raw": self.raw.hex()}


def control_index(features: Feature, max_pairs: int | None) -> int | None:
    """Return the control queue's index for a driver that takes ``features``, None without one (virtio 1.3, 5.1.2).

    ``max_pairs`` is the configuration space's field, None if it is absent.
    """
    return 2 * (max_pairs or 1) if Feature.CTRL_VQ in features else None
