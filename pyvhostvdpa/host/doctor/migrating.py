# SPDX-License-Identifier: MIT
"""Checks of what a migration meets."""

from __future__ import annotations

from collections.abc import Iterator

from ..machine import Machine
from .finding import PROBE, GuestSize, Level, Told, driver_of, named


def migration(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """What blocks a migration, judged by the driver."""
    for device, parent in named(machine):
        driver = driver_of(parent)
        probe = PROBE.format(device.name)
        if driver is None:
            what = f"nothing is known of driver {parent.module}" if parent.module else f"unknown driver ({parent.why})"
            yield Told(Level.INFO, f"{device.name}: {what}", next=probe)
        elif driver.suspend != "yes":
            yield Told(
                Level.WARN,
                f"{device.name}: {parent.module} cannot suspend, so its guest cannot be migrated",
                "its queues cannot be stopped without loss",
                f"{probe} lists all that is missing",
            )
        elif driver.asids == 1:
            yield Told(
                Level.WARN,
                f"{device.name}: {parent.module} has one address space: no shadowed control queue",
                "a guest that uses its control queue cannot be migrated",
                f"{probe} lists all that is missing",
            )
        else:
            cost = "" if driver.desc_asid == "yes" else f"; descriptor ASID: {driver.desc_asid}"
            yield Told(
                Level.PASS, f"{device.name}: {parent.module} can suspend and has address spaces{cost}", next=probe
            )


def vring_base(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """What GET_VRING_BASE means on each device."""
    for device, parent in named(machine):
        if driver := driver_of(parent):
            level = Level.WARN if "used" in driver.base else Level.INFO
            yield Told(
                level,
                f"{device.name}: {parent.module} reports {driver.base} as a suspended queue's base",
                "descriptors between used and avail index are processed again by the next owner, or lost if it "
                "does not count them",
                f"vhost-vdpa probe {device.name} --verify   (prints base, used and avail index)",
            )


def resume(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """Whether a suspended device can continue without a reset."""
    for device, parent in named(machine):
        driver = driver_of(parent)
        if driver is None or driver.suspend != "yes":
            continue
        if driver.resume == "yes":
            yield Told(Level.PASS, f"{device.name}: {parent.module} resumes")
        else:
            yield Told(
                Level.WARN,
                f"{device.name}: {parent.module} resumes {driver.resume}",
                "without it a cancelled migration must reset the device and restore its state",
                PROBE.format(device.name),
            )
    if not any((driver := driver_of(p)) and driver.suspend == "yes" for _, p in named(machine)):
        yield Told(Level.SKIP, "no device that is known to suspend")


def slow_calls(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """Some calls take long on hardware and are made again and again."""
    slow = [device.name for device, parent in named(machine) if (parent.module or "").startswith("mlx5")]
    if slow:
        yield Told(
            Level.INFO,
            f"{', '.join(slow)}: queues are created by 15 firmware commands each, at reset or DRIVER_OK",
            "an initiator that resets and asks often waits often",
            "trace = Trace(); VhostVdpa(path, trace): each call with its duration",
        )
    else:
        yield Told(Level.SKIP, "no device whose driver is known for slow calls")


def address_kinds(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """Ring addresses are IOVAs, not pointers."""
    devices = [device for device, _ in named(machine)]
    if not devices:
        return
    yield Told(
        Level.INFO,
        f"{', '.join(d.name for d in devices)}: ring addresses are IOVAs, in a range that only an open device shows",
        "the kernel's field is called desc_user_addr, and a process's own pointer in it is just another IOVA",
        PROBE.format(devices[0].name),
    )


def access_platform(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """VIRTIO_F_ACCESS_PLATFORM is offered and taken: many parents refuse a driver without."""
    for device in machine.devices:
        taken = machine.net.get(device.name, {}).get("negotiated_features")
        if taken and "ACCESS_PLATFORM" not in taken:
            yield Told(
                Level.WARN,
                f"{device.name}: its user did not take ACCESS_PLATFORM",
                "vdpa_sim, mlx5_vdpa and VDUSE refuse such a driver; shadow queues need it",
                "add it to the driver's features",
            )
    # one that reports no features, as VDUSE's, leaves them to each device
    telling = {name: shown["dev_features"] for name, shown in machine.management.items() if shown.get("dev_features")}
    lacking = [name for name, features in telling.items() if "ACCESS_PLATFORM" not in features]
    for name in lacking:
        yield Told(
            Level.FAIL if any(device.mgmtdev == name for device in machine.devices) else Level.INFO,
            f"management device {name} offers no ACCESS_PLATFORM",
            "devices without it cannot be shadowed",
            f"vdpa mgmtdev show {name}",
        )
    if telling and not lacking:
        yield Told(Level.PASS, f"{', '.join(sorted(telling))}: offers ACCESS_PLATFORM; a driver has to take it")
    elif not telling:
        yield Told(Level.SKIP, "no management device reports its features")


def creation(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """MAC, MTU and the number of queue pairs are given at creation."""
    for device in machine.devices:
        config = machine.net.get(device.name)
        if config is None and not device.unknown:
            continue
        if not config:
            yield Told(
                Level.INFO,
                f"{device.name}: MAC address, MTU and link are unknown: {device.unknown or 'netlink shows none'}",
                "only netlink shows them while a device is not open",
                "as root, in the first network namespace, with iproute2: vhost-vdpa list",
            )
            continue
        if config.get("link") == "down":
            yield Told(
                Level.WARN,
                f"{device.name}: its link is down",
                "a guest on it has no network, and one that is migrated to it is refused",
                "bring the link of the device's port up: ip link set PORT up",
            )
        pairs, mtu = config.get("max_vq_pairs") or 1, config.get("mtu") or "?"
        mac = device.mac or "00:00:00:00:00:00"
        unset = set(mac) <= set("0:")
        yield Told(
            Level.WARN if unset else Level.INFO,
            f"{device.name}: created with MAC {mac}, MTU {mtu}, {pairs} queue pair{'s' if pairs != 1 else ''}",
            "a device without a MAC address answers to none"
            if unset
            else "they cannot be changed later, at most the MAC",
            f"vhost-vdpa dev del {device.name}; vhost-vdpa dev add name {device.name} mgmtdev {device.mgmtdev} mac MAC",
        )
