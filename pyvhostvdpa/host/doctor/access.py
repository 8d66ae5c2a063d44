# SPDX-License-Identifier: MIT
"""Checks of access to a device, and of its holders."""

from __future__ import annotations

from collections.abc import Iterator

from ..machine import Machine
from ..mgmt import VdpaDevice
from .finding import GuestSize, Level, Told, driver_of, named


def iommu(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """Devices behind the platform IOMMU need one that is on and cache coherent, or open() says 524."""
    concerned = [d.name for d, parent in named(machine) if (driver := driver_of(parent)) and driver.iommu]
    if not concerned:
        yield Told(Level.SKIP, "no device behind the platform's IOMMU")
    elif not machine.iommu_groups:
        yield Told(
            Level.FAIL,
            f"{', '.join(concerned)}: the IOMMU is off",
            "these devices are mapped by it",
            "boot with intel_iommu=on or amd_iommu=on, iommu=pt",
        )
    elif machine.incoherent_iommus:
        yield Told(
            Level.FAIL,
            f"{', '.join(machine.incoherent_iommus)} cannot enforce cache coherency",
            "open() fails with 524, ENOTSUPP (drivers/vhost/vdpa.c:vhost_vdpa_alloc_domain)",
            "put the NIC behind another IOMMU, or use another machine",
        )
    else:
        yield Told(Level.PASS, "the IOMMU is on and coherent")


def held(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """Each device is bound to vhost_vdpa and free: a chardev has one user at a time."""
    for device in machine.devices:
        if device.driver == "virtio_vdpa":
            path = f"/sys/bus/vdpa/devices/{device.name}"
            yield Told(
                Level.FAIL,
                f"{device.name} is bound to virtio_vdpa: it is a network card of this machine, not a chardev",
                "one bus driver has a device at a time",
                f"echo vhost_vdpa > {path}/driver_override; echo {device.name} > {path}/driver/unbind; "
                f"echo {device.name} > /sys/bus/vdpa/drivers/vhost_vdpa/bind",
            )
        elif device.driver is None:
            yield Told(
                Level.FAIL, f"{device.name} has no driver", "without vhost_vdpa no chardev", "modprobe vhost_vdpa"
            )
        elif device.holders:
            who = ", ".join(str(holder) for holder in device.holders)
            yield Told(
                Level.FAIL,
                f"{device.chardev} ({device.name}) is held by {who}",
                "opening it again is EBUSY, and deleting it hangs every vdpa command",
                f"close it there first: kill {device.holders[0].pid}",
            )
        else:
            yield Told(Level.PASS, f"{device.chardev} ({device.name}) is free" + _unseen(machine))
        yield from _served(machine, device)


def _served(machine: Machine, device: VdpaDevice) -> Iterator[Told]:
    """A VDUSE device is as alive as its daemon: every request waits for that one, and fails after its time limit."""
    if device.name not in machine.daemons:
        return
    daemon = machine.daemons[device.name]
    if daemon is None and machine.sees_all:
        yield Told(
            Level.FAIL,
            f"{device.name}: no process serves it: its VDUSE daemon is gone",
            "nothing answers the driver's requests",
            "start its daemon again, or delete the device: vdpa dev del " + device.name,
        )
    elif daemon is not None and daemon.stopped:
        yield Told(
            Level.FAIL,
            f"{device.name}: its VDUSE daemon {daemon} is stopped (state {daemon.state})",
            "each request to the device waits for it, 30 s by default, and then fails (drivers/vdpa/vdpa_user)",
            f"kill -CONT {daemon.pid}",
        )


def _unseen(machine: Machine) -> str:
    return "" if machine.sees_all else " (this user cannot see all processes)"


def node_names(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """Which chardev is which device."""
    for device, parent in named(machine):
        where = f"/sys/bus/vdpa/devices/{device.name}"
        by = device.mgmtdev or parent.module
        yield Told(
            Level.INFO, f"{device.chardev} is {device.name}, made by {by}, virtio id {device.virtio_id}, {where}"
        )


def permission(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """The nodes are there, and this user may open them."""
    for path, node in machine.nodes.items():
        if node is None:
            yield Told(
                Level.FAIL,
                f"{path} is not there though the kernel has the device",
                "this container or chroot has its own /dev",
                f"run the container with --device {path}, or mount devtmpfs",
            )
        elif node.usable:
            yield Told(Level.PASS, f"{path}: mode {node.mode:04o}, usable by uid {machine.uid}")
        else:
            yield Told(
                Level.FAIL,
                f"{path}: mode {node.mode:04o}, owner {node.uid}:{node.gid}; you are uid {machine.uid}",
                "the kernel makes nodes for root alone" + ("; SELinux is enforcing as well" if machine.selinux else ""),
                'udev rule: KERNEL=="vhost-vdpa-*", GROUP="kvm", MODE="0660"',
            )
