# SPDX-License-Identifier: MIT
"""Whether a device can take a guest, and guest memory mapped in it: what is done before a guest is accepted."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..base.errors import MigrationRefused
from ..base.uapi import names
from ..device.net import VdpaNetDevice
from ..device.target import GUEST_ASID
from ..guest.shape import DeviceShape
from ..memory.guest import PAGE_SIZE, GuestMemory
from ..memory.iova import IovaAllocator
from ..memory.mapped import SharedMemory
from ..net.features import Feature
from ..net.fit import misfits, unknown_fields
from ..trace.phases import DEST_PREMAP

log = logging.getLogger(__name__)


def check_fit(device: VdpaNetDevice, shape: DeviceShape) -> None:
    """Raise :class:`~pyvhostvdpa.MigrationRefused` unless a guest of this shape can run on the device."""
    missing = Feature(shape.features) & ~device.features
    if missing:
        raise MigrationRefused(
            f"{device.path} lacks features that the guest uses on the source: {names(missing)}",
            hint="create it with the same device_features: vdpa dev add",
        )
    largest = device.largest_ring(range(2 * shape.pairs))
    if shape.pairs > device.groups.max_pairs or shape.ring_size > largest:
        raise MigrationRefused(
            f"{device.path} has {device.groups.max_pairs} queue pairs of at most {largest}, "
            f"the guest uses {shape.pairs} of {shape.ring_size}",
            hint="vdpa dev add … max_vqp N makes one with more, where the driver can",
        )
    if shape.control_index != device.groups.control_index:
        raise MigrationRefused(
            f"{device.path} has its control queue at {device.groups.control_index}, "
            f"the source at {shape.control_index}",
            hint="create both with the same max_vqp: vdpa dev add",
        )
    check_config(device, shape, device.groups.config)


def check_config(device: VdpaNetDevice, shape: DeviceShape, config: bytes) -> None:
    """Raise if the guest has read something in configuration space that this device does not honour."""
    if shape.config is None:
        log.warning(
            "%s: the source did not send the guest's configuration space (an older version): MAC, MTU and link are "
            "not compared",
            device.path,
        )
        return
    features = Feature(shape.features)
    found = list(misfits(features, shape.config, config))
    if found:
        raise MigrationRefused(
            f"{device.path} does not fit the guest: {'; '.join(map(str, found))}",
            hint=" ".join(dict.fromkeys(each.hint for each in found)),
        )
    if unknown := unknown_fields(features, shape.config, config):
        log.warning("%s: not compared with the source, unknown on one side: %s", device.path, ", ".join(unknown))


def check_changed(devices: Sequence[VdpaNetDevice], shapes: Sequence[DeviceShape]) -> None:
    """Do what :func:`check_config` does for each device whose configuration space has changed since it was opened."""
    for device, shape in zip(devices, shapes, strict=True):
        # a link may have gone down since
        config = device.config()
        if config != device.groups.config:
            check_config(device, shape, config)


def map_memory(device: VdpaNetDevice, memory: GuestMemory) -> None:
    """Map guest memory; raise if the device did not take its maps.

    The kernel says nothing of a batch that failed
    (drivers/vhost/vdpa.c:vhost_vdpa_process_iotlb_msg), but a map outside one
    has an answer, and a set_map parent installs the whole table with it.
    """
    with device.trace.in_phase(DEST_PREMAP), SharedMemory("proof", PAGE_SIZE) as page:
        device.attach(memory)
        limits, space = device.iotlb.limits, device.iotlb.space(GUEST_ASID)
        holes = IovaAllocator(limits.first, limits.last, [(m.iova, m.size) for m in space.mappings])
        iova = holes.allocate(PAGE_SIZE)
        space.map(iova, page.hva, PAGE_SIZE)
        space.unmap(iova, PAGE_SIZE)
