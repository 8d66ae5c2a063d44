# SPDX-License-Identifier: MIT
"""The configuration space of a virtio-net device (virtio 1.3, 5.1.4)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from .features import Feature

_HEAD = struct.Struct("<6sHHH")
MAX_PAIRS_OFFSET = 8
"""Of ``max_virtqueue_pairs`` in struct virtio_net_config."""
_SPEED = struct.Struct("<IB")
LINK_UP, ANNOUNCE = 1, 2
_UNKNOWN_SPEED = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class NetConfig:
    """The fields that mean something with the features at hand; None for one that does not.

    ``mtu`` in bytes, ``speed`` in Mbit/s, ``raw`` the space as it was read.
    """

    mac: str | None
    link_up: bool | None
    max_pairs: int | None
    mtu: int | None
    speed: int | None
    raw: bytes

    @classmethod
    def parse(cls, raw: bytes, features: Feature) -> NetConfig:
        """Read the space of a device with ``features``; a short one is taken as far as it goes."""
        mac, status, pairs, mtu = _HEAD.unpack(raw[: _HEAD.size].ljust(_HEAD.size, b"\0"))
        speed, _ = _SPEED.unpack(raw[_HEAD.size :][: _SPEED.size].ljust(_SPEED.size, b"\xff"))
        known = Feature.SPEED_DUPLEX in features and speed != _UNKNOWN_SPEED
        return cls(
            mac=mac.hex(":") if Feature.MAC in features else None,
            link_up=bool(status & LINK_UP) if Feature.STATUS in features else None,
            max_pairs=pairs if features & (Feature.MQ | Feature.RSS) else None,
            mtu=mtu if Feature.MTU in features else None,
            speed=speed if known else None,
            raw=raw,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, ``raw`` in hex."""
        return {
            "mac": self.mac,
            "link_up": self.link_up,
            "max_pairs": self.max_pairs,
            "mtu": self.mtu,
            "speed": self.speed,
            "raw": self.raw.hex(),
        }


def control_index(features: Feature, max_pairs: int | None) -> int | None:
    """Return the control queue's index for a driver that takes ``features``, None if there is none (virtio 1.3, 5.1.2).

    ``max_pairs`` is what the configuration space says, None where it does not.
    """
    return 2 * (max_pairs or 1) if Feature.CTRL_VQ in features else None
