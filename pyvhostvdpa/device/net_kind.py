# SPDX-License-Identifier: MIT
"""virtio-net as a procedure sees it: pairs of a receive and a transmit queue, and a control queue behind them."""

from __future__ import annotations

from ..chardev.door import VhostVdpa
from ..memory.guest import GuestMemory
from ..net.config import MAX_PAIRS_OFFSET, control_index
from ..net.control_queue import DEFAULT_DEADLINE, ControlOptions, ControlQueue, NetControlArea, NetGuestControl
from ..net.features import Feature, ring_bits
from ..trace.recorder import DeviceTrace
from ..virtqueue.layout import RingLayout
from .groups import Groups, ask_groups
from .kind import ControlPlace, DeviceKind


def offered_pairs(chardev: VhostVdpa, features: Feature) -> int:
    """Return how many queue pairs a device has with ``features``."""
    if not features & (Feature.MQ | Feature.RSS):
        return 1
    return int.from_bytes(chardev.get_config(MAX_PAIRS_OFFSET, 2), "little")


def probe_groups(chardev: VhostVdpa, features: Feature, vqs_count: int) -> Groups:
    """Ask for every queue's groups under ``features``; the device is reset afterwards."""
    max_pairs = offered_pairs(chardev, features)
    data = range(min(2 * max_pairs, vqs_count))
    return ask_groups(chardev, int(features), data, control_index(features, max_pairs), max_pairs)


def _ring_bits(features: int) -> int:
    return ring_bits(Feature(features))


def _control_size(layout: RingLayout) -> int:
    return NetControlArea(layout, 0, 0).size


def _control(guest: NetGuestControl, memory: GuestMemory, place: ControlPlace, trace: DeviceTrace) -> ControlQueue:
    area = NetControlArea(place.layout, place.hva, place.iova)
    options = ControlOptions(place.deadline, place.ring, place.config_call)
    return ControlQueue(guest, memory, area, options, trace)


def is_transmit(index: int) -> bool:
    """Whether a data queue sends (virtio 1.3, 5.1.2)."""
    return index % 2 == 1


NET = DeviceKind(
    ring_bits=_ring_bits,
    control_size=_control_size,
    control=_control,
    deadline=DEFAULT_DEADLINE,
    # receive and transmit queue of a pair: what is received before something is sent has its buffers in time
    together=2,
    # receive buffers may be left alone for as long as nothing comes
    completes=is_transmit,
    writes=lambda index: not is_transmit(index),
)
