# SPDX-License-Identifier: MIT
"""What a front-end is offered, and why; what the device is asked for in turn.

A guest relies on what it is offered. In passthrough nothing can be emulated here, so a bit is offered if the device
has it, the front-end asks the back-end for it, and this package can stop, switch and move a guest that uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..net.features import CONTROL, IMPLEMENTED, OFFLOADS, REQUIRED, Feature
from .device import Device
from .messages import ProtocolFeature
from .options import BackendOptions

LOG_ALL = 1 << 26
"""VHOST_F_LOG_ALL: dirty pages go into the log."""
PROTOCOL_FEATURES = 1 << 30
"""VHOST_USER_F_PROTOCOL_FEATURES: there are protocol features, and rings start disabled."""
OF_THE_PROTOCOL = LOG_ALL | PROTOCOL_FEATURES

PASSED_ON = OFFLOADS | Feature.EVENT_IDX | Feature.INDIRECT_DESC | Feature.ANY_LAYOUT | Feature.VERSION_1 | Feature.MTU
"""Offered if the device offers them."""

_FRONT_END = "the front-end offers it by itself, whatever is offered here"
_NOT_MOVED = "a guest that uses it could not be switched to shadow virtqueues, which migration needs"
_WHY_NOT: dict[Feature, str] = {
    Feature.MAC: _FRONT_END,
    Feature.STATUS: _FRONT_END,
    Feature.CTRL_VQ: f"{_FRONT_END}; the device's control queue is driven from here",
    Feature.CTRL_RX: _FRONT_END,
    Feature.CTRL_VLAN: _FRONT_END,
    Feature.CTRL_RX_EXTRA: _FRONT_END,
    Feature.CTRL_MAC_ADDR: _FRONT_END,
    Feature.CTRL_GUEST_OFFLOADS: f"{_FRONT_END}; a guest that changes its offloads does not reach the device "
    "(virtio-net-pci,ctrl_guest_offloads=off)",
    Feature.ACCESS_PLATFORM: "the guest's addresses are the device's; it is negotiated with the device from here",
    Feature.RING_RESET: "QEMU resets a single queue without a message, and the device's ring would continue",
    Feature.NOTIFICATION_DATA: "the data cannot travel through an eventfd",
    Feature.RING_PACKED: _NOT_MOVED,
    Feature.IN_ORDER: _NOT_MOVED,
    Feature.RSS: "QEMU clears it for vhost-user, and its state could not be followed",
    Feature.HASH_REPORT: "QEMU clears it for vhost-user",
    Feature.SPEED_DUPLEX: "the configuration space is the front-end's",
}


_CONTROL_HANDED_OVER = "it takes a control queue, which the front-end would hand over"
_WITHOUT_CONFIG: dict[Feature, str] = {
    **dict.fromkeys(_WHY_NOT.keys() & CONTROL, _CONTROL_HANDED_OVER),
    Feature.CTRL_VQ: "the front-end would hand it over",
    Feature.MQ: _CONTROL_HANDED_OVER,
    Feature.GUEST_ANNOUNCE: _CONTROL_HANDED_OVER,
    Feature.STATUS: "the front-end is not told when the link changes",
}
"""Why a front-end without a configuration space of its own is not offered what another one is, or has by itself."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a bit is offered to the front-end, and why."""

    name: str
    bit: int
    offered: bool
    why: str


@dataclass(frozen=True, slots=True)
class Offer:
    """The virtio features that a front-end is offered, with the reason for each bit."""

    decisions: tuple[Decision, ...]

    @property
    def features(self) -> int:
        """What GET_FEATURES answers."""
        return sum(1 << each.bit for each in self.decisions if each.offered)


def offer(
    device: Feature, indirect_costs: str = "", has_control: bool = True, mask: int = ~0, has_config: bool = True
) -> Offer:
    """Decide what is offered on a device with the features ``device``.

    ``indirect_costs`` is what offering INDIRECT_DESC would cost, "" for nothing: it is left out then unless a ``mask``
    names it. ``has_control`` is whether the device has a control queue that can be kept apart from the data queues.
    ``mask`` takes bits away. ``has_config`` is whether the front-end has a configuration space of its own.
    """
    decisions = [
        Decision("LOG_ALL", 26, True, "of vhost-user: dirty pages for migration"),
        Decision("PROTOCOL_FEATURES", 30, True, "of vhost-user"),
        *(_decide(bit, device, indirect_costs, has_control, has_config) for bit in Feature),
        *_unknown(device),
    ]
    masked = [
        Decision(each.name, each.bit, False, "taken away by the feature mask")
        if each.offered and not mask >> each.bit & 1 and not 1 << each.bit & OF_THE_PROTOCOL
        else each
        for each in decisions
    ]
    return Offer(tuple(sorted(masked, key=lambda each: each.bit)))


def _decide(bit: Feature, device: Feature, indirect_costs: str, has_control: bool, has_config: bool) -> Decision:
    def decision(offered: bool, why: str) -> Decision:
        return Decision(bit.name or hex(bit), bit.bit_length() - 1, offered, why)

    if not has_config and bit in _WITHOUT_CONFIG:
        return decision(False, _WITHOUT_CONFIG[bit])
    if not has_config and bit is Feature.MAC:
        has = bit in device
        return decision(has, "the device has it, and its address" if has else "the device does not have it")
    if bit is Feature.GUEST_ANNOUNCE:
        return decision(True, "the front-end implements it; the guest announces itself after a move")
    why_not = _WHY_NOT.get(bit, "")
    if not why_not and bit not in device:
        why_not = "the device does not have it"
    elif bit is Feature.MQ and not has_control:
        why_not = "the device's control queue cannot be kept apart from its data queues"
    elif bit is Feature.INDIRECT_DESC and indirect_costs:
        why_not = f"{indirect_costs}; --indirect offers it"
    elif not why_not and bit not in PASSED_ON | Feature.MQ:
        why_not = _NOT_MOVED if bit not in IMPLEMENTED else "the front-end does not ask the back-end for it"
    return decision(not why_not, why_not or "the device has it")


def _unknown(device: Feature) -> Iterator[Decision]:
    known = sum(int(bit) for bit in Feature) | OF_THE_PROTOCOL
    for bit in range(64):
        if int(device) >> bit & 1 and not known >> bit & 1:
            yield Decision(f"bit {bit}", bit, False, "the device has it, this package does not know it")


def negotiated_offer(device: Device, options: BackendOptions) -> tuple[Offer, Feature]:
    """Find out by negotiating what the device can do without indirect descriptors, and what they would cost.

    Returns what is offered, and what was negotiated.
    """
    without = for_device(int(device.offered & ~Feature.INDIRECT_DESC), device.offered, options.control)
    has_control = Feature.CTRL_VQ in device.negotiate(without)
    costs = ""
    if device.procedure.name == "in-place" and Feature.INDIRECT_DESC in device.offered and not options.indirect:
        costs = "with it a switch to shadow virtqueues takes a reset of the device instead of a suspend"
    return offer(device.offered, costs, has_control, options.features, options.has_config), without


def for_device(acknowledged: int, device: Feature, control: bool) -> Feature:
    """Return what the device is asked for when the front-end has acknowledged ``acknowledged``.

    Its control queue is taken if there are queue pairs to choose, or if ``control`` asks for it: without one a device
    receives what its own address says, and what is broadcast.
    """
    guest = Feature(acknowledged & ~OF_THE_PROTOCOL) & (PASSED_ON | Feature.MQ) & device
    wanted = guest | REQUIRED | (device & (Feature.MAC | Feature.STATUS))
    if Feature.MQ in guest or control:
        # not CTRL_VLAN: a device with it drops every VLAN that was not added
        wanted |= device & CONTROL & (Feature.CTRL_VQ | Feature.CTRL_RX | Feature.CTRL_RX_EXTRA | Feature.CTRL_MAC_ADDR)
    return wanted


def not_taken(acknowledged: int, taken: Feature) -> Feature:
    """Return the bits that the front-end acknowledged and the device did not take."""
    return Feature(acknowledged & ~OF_THE_PROTOCOL) & ~taken & ~Feature.GUEST_ANNOUNCE


_P = ProtocolFeature
_PROTOCOL: tuple[tuple[ProtocolFeature, bool, str], ...] = (
    (_P.MQ, True, "the number of queue pairs"),
    (_P.LOG_SHMFD, True, "QEMU refuses migration without it"),
    (_P.RARP, False, "sending a packet takes a ring of the back-end; the guest announces itself"),
    (_P.REPLY_ACK, True, "errors reach the front-end"),
    (_P.MTU, True, "compared with the device's"),
    (_P.BACKEND_REQ, False, "nothing is asked of the front-end"),
    (_P.CROSS_ENDIAN, False, "virtio 1 has one byte order"),
    (_P.CRYPTO_SESSION, False, "not a crypto device"),
    (_P.PAGEFAULT, False, "a device cannot take page faults, so postcopy is refused by the front-end"),
    (_P.CONFIG, False, "the configuration space is the front-end's"),
    (_P.BACKEND_SEND_FD, False, "nothing is asked of the front-end"),
    (_P.HOST_NOTIFIER, False, "QEMU maps doorbells for reading, which vhost-vdpa refuses"),
    (_P.INFLIGHT_SHMFD, False, "what is in flight is known from the rings"),
    (_P.RESET_DEVICE, True, "a guest's reset resets the device"),
    (_P.INBAND_NOTIFICATIONS, False, "the device needs eventfds"),
    (_P.CONFIGURE_MEM_SLOTS, True, "only changes of guest memory are sent, not the table at each start"),
    (_P.STATUS, True, "the exact marks of start and stop"),
    (_P.XEN_MMAP, False, "not for Xen"),
    (_P.SHARED_OBJECT, False, "not for net"),
    (_P.DEVICE_STATE, True, "what the device was set to travels with a migration"),
    (_P.GET_VRING_BASE_INFLIGHT, False, "what is in flight is known from the rings"),
    (_P.GPA_ADDRESSES, True, "rings are given as guest addresses, which are the device's"),
    (_P.SHMEM, False, "not for net"),
)


_PROTOCOL_WITHOUT_CONFIG = {
    _P.BACKEND_REQ: "nothing is asked of the front-end, but User Mode Linux takes its interrupt from it",
    _P.CONFIG: "the configuration space is the device's",
}
"""What a front-end without a configuration space of its own is offered beside the others."""


def protocol_decisions(has_config: bool = True) -> tuple[Decision, ...]:
    """Return every protocol feature, whether it is offered, and why."""
    more = {} if has_config else _PROTOCOL_WITHOUT_CONFIG
    return tuple(
        Decision(each.name or "", each.bit_length() - 1, offered or each in more, more.get(each, why))
        for each, offered, why in _PROTOCOL
    )


PROTOCOL_OFFER = ProtocolFeature(sum(int(each) for each, offered, _ in _PROTOCOL if offered))
"""What GET_PROTOCOL_FEATURES answers."""


def protocol_offer(has_config: bool) -> ProtocolFeature:
    """Return what GET_PROTOCOL_FEATURES answers a front-end with a configuration space of its own, or without."""
    return PROTOCOL_OFFER if has_config else PROTOCOL_OFFER | ProtocolFeature(sum(map(int, _PROTOCOL_WITHOUT_CONFIG)))
