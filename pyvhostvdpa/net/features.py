# SPDX-License-Identifier: MIT
"""virtio and virtio-net feature bits (virtio 1.3, 5.1.3 and 6)."""

from __future__ import annotations

import enum

from .._cdefs import lib
from ..base.errors import MissingFeature
from ..base.uapi import names


class Feature(enum.IntFlag):
    """Feature bits by the specification's names, without ``VIRTIO_F_`` and ``VIRTIO_NET_F_``."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    CTRL_GUEST_OFFLOADS = 1 << 2
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    GUEST_UFO = 1 << 10
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    HOST_UFO = 1 << 14
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    CTRL_VQ = 1 << 17
    CTRL_RX = 1 << 18
    CTRL_VLAN = 1 << 19
    CTRL_RX_EXTRA = 1 << 20
    GUEST_ANNOUNCE = 1 << 21
    MQ = 1 << 22
    CTRL_MAC_ADDR = 1 << 23
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40
    HASH_TUNNEL = 1 << 51
    VQ_NOTF_COAL = 1 << 52
    NOTF_COAL = 1 << 53
    GUEST_USO4 = 1 << 54
    GUEST_USO6 = 1 << 55
    HOST_USO = 1 << 56
    HASH_REPORT = 1 << 57
    RSS = 1 << 60
    RSC_EXT = 1 << 61
    STANDBY = 1 << 62
    SPEED_DUPLEX = 1 << 63


REQUIRED = Feature.VERSION_1 | Feature.ACCESS_PLATFORM
"""Without these no virtqueue can be shadowed; several parents refuse a driver without the second."""

SUPPORTED = REQUIRED | Feature.MAC | Feature.MTU | Feature.STATUS
"""What the guest of this package negotiates when the device offers it."""


CONTROL = (
    Feature.CTRL_VQ
    | Feature.CTRL_RX
    | Feature.CTRL_RX_EXTRA
    | Feature.CTRL_VLAN
    | Feature.CTRL_MAC_ADDR
    | Feature.CTRL_GUEST_OFFLOADS
    | Feature.MQ
    | Feature.RSS
    | Feature.HASH_REPORT
)
"""What brings or needs a control queue."""

RING = Feature.EVENT_IDX | Feature.INDIRECT_DESC
"""What changes how a ring is used; both the guest's driver and the shadow virtqueue can do it."""

OFFLOADS = (
    Feature.CSUM
    | Feature.GUEST_CSUM
    | Feature.GUEST_TSO4
    | Feature.GUEST_TSO6
    | Feature.GUEST_ECN
    | Feature.GUEST_UFO
    | Feature.HOST_TSO4
    | Feature.HOST_TSO6
    | Feature.HOST_ECN
    | Feature.HOST_UFO
    | Feature.MRG_RXBUF
)
"""What changes only the header and the payload of a frame, which pass through unread."""

IMPLEMENTED = SUPPORTED | CONTROL | RING | OFFLOADS | Feature.ANY_LAYOUT | Feature.SPEED_DUPLEX | Feature.GUEST_ANNOUNCE
"""Everything that may be negotiated. Nothing else is, whatever a driver asks for or a device offers.

A guest that is offered a bit relies on it. RING_PACKED, IN_ORDER, NOTIFICATION_DATA and RING_RESET each change the
rings or how they are driven, which neither shadow virtqueues nor procedures follow.
"""


def check_implemented(wanted: Feature) -> None:
    """Raise :class:`MissingFeature` naming the bits of ``wanted`` that this package does not implement."""
    beyond = Feature(wanted) & ~IMPLEMENTED
    if beyond:
        raise MissingFeature(
            f"features that are not implemented here were asked for: {names(beyond)}",
            hint="ask for a subset of pyvhostvdpa.net.features.IMPLEMENTED",
        )


def negotiate(offered: int, wanted: Feature = SUPPORTED) -> Feature:
    """Return what the guest takes of a device's features.

    This is the one place that decides what is negotiated, for a device opened here and for one that a peer's SHAPE
    describes. Raises :class:`MissingFeature` if too little is offered, or if ``wanted`` has a bit outside
    :data:`IMPLEMENTED`.
    """
    check_implemented(wanted)
    missing = REQUIRED & ~Feature(offered)
    if missing:
        raise MissingFeature(
            f"the device lacks {names(missing)}", hint="create it with these features: vdpa dev add … device_features"
        )
    taken = Feature(offered) & (wanted | REQUIRED)
    return taken if Feature.CTRL_VQ in taken else taken & ~CONTROL


def offered_to_guest(features: Feature) -> Feature:
    """Return what a guest is offered on a device with ``features``: announcing itself needs nothing of the device."""
    if Feature.CTRL_VQ in features and Feature.STATUS in features:
        return features | Feature.GUEST_ANNOUNCE
    return features


def ring_bits(features: Feature) -> int:
    """Return the C loops' ``SVQ_F_*`` for the ring features among ``features``."""
    bits = 0
    if Feature.EVENT_IDX in features:
        bits |= lib.SVQ_F_EVENT_IDX
    if Feature.INDIRECT_DESC in features:
        bits |= lib.SVQ_F_INDIRECT
    if Feature.RING_PACKED in features:
        bits |= lib.SVQ_F_PACKED
    return bits
