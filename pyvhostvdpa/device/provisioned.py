# SPDX-License-Identifier: MIT
"""Giving a device the MAC address back that it was made with.

A guest sets the address of its device by its control queue, and a reset does not undo that: the parents keep it in
the configuration space until the device is deleted. When the guest has left, two devices would have one address, and
the next user of this one would get the frames of a guest that has left.
"""

from __future__ import annotations

from ..base.errors import KernelError, MissingFeature
from ..base.uapi import Status
from ..net.control import MAC_ADDR_SET, Class, command
from ..net.control_queue import ControlOptions, DeviceControl, NetControlArea
from ..net.features import Feature, ring_bits
from ..virtqueue.layout import ring_layout
from .procedure.attached import Memories
from .target import FEATURES_SET, OWN_ASID, READY, RUNNING, Target

_RING = 16
SETTABLE = Feature.MAC | Feature.CTRL_VQ | Feature.CTRL_MAC_ADDR
"""With these a guest can set the address, and so can we."""


def restore_address(target: Target, memories: Memories, mac: bytes, deadline: float) -> bool:
    """Set a device's MAC address to ``mac``; whether it was another one. The device must be reset, and is afterwards.

    Only its control queue runs for that. To be called before the device is closed: what is mapped for it goes with
    that. ``deadline`` in seconds as in :class:`~pyvhostvdpa.net.control_queue.ControlOptions`. Raises
    :class:`~pyvhostvdpa.net.control_queue.ControlFailed` if the device refuses or does not answer, and whatever the
    kernel refuses.
    """
    c, groups = target.chardev, target.groups
    if SETTABLE not in target.features or groups.control_index is None or groups.control is None:
        return False
    if c.get_config(0, 6) == mac:
        return False
    layout = ring_layout(target.fitting(groups.control_index, _RING), ring_bits(target.features))
    size = NetControlArea(layout, 0, 0).size
    own = memories.own
    area = NetControlArea(layout, own.hva + own.size - size, memories.holes.allocate(size))
    control = DeviceControl(area, ControlOptions(deadline, ring_bits(target.features)), c.trace)
    try:
        _start(target, groups.control_index, groups.control, control)
        control.load([command(Class.MAC, MAC_ADDR_SET, mac)])
    finally:
        c.set_status(Status(0))
        control.close()
    return True


def _start(target: Target, index: int, group: int, control: DeviceControl) -> None:
    c, area = target.chardev, control.area
    c.set_status(READY)
    c.set_features(int(target.features))
    c.set_status(FEATURES_SET)
    if not c.get_status() & Status.FEATURES_OK:
        raise MissingFeature(f"{target.path} refused the features that it had accepted before")
    c.set_group_asid(group, OWN_ASID)
    target.iotlb.space(OWN_ASID).map(area.iova, area.hva, area.size)
    c.set_vring_num(index, area.layout.num)
    c.set_vring_base(index, 0)
    c.set_vring_addr(index, area.iova, area.iova + area.layout.avail_offset, area.iova + area.device_area)
    c.set_vring_kick(index, control.kick)
    c.set_vring_call(index, control.call)
    c.set_vring_enable(index, True)
    c.set_status(RUNNING)
    if not c.get_status() & Status.DRIVER_OK:
        raise KernelError(5, "VHOST_VDPA_SET_STATUS", "DRIVER_OK", cause=f"{target.path} did not accept it")
