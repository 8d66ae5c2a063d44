# SPDX-License-Identifier: MIT
"""Checks of the kernel, its drivers and the NICs."""

from __future__ import annotations

from collections.abc import Iterator

from ..drivers import DRIVERS, NICS
from ..machine import Machine
from ..processes import Holder
from .finding import GuestSize, Level, Told


def kernel_parts(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """The kernel has vhost_vdpa, and a driver that makes devices."""
    have = machine.loaded | (machine.installed or frozenset())
    if "vhost_vdpa" not in have:
        yield _no_vhost_vdpa(machine)
        return
    parents = sorted(have & set(DRIVERS) - {"mlx5_core"})
    if machine.devices or parents:
        yield Told(Level.PASS, f"vhost_vdpa is there; drivers: {', '.join(parents) or 'of the devices at hand'}")
    else:
        yield Told(
            Level.FAIL,
            f"kernel {machine.release} has vhost_vdpa but no driver that makes a vDPA device",
            "Debian builds neither vdpa_sim nor mlx5_vdpa; others put them into a package of extra modules",
            "use a kernel with CONFIG_MLX5_VDPA_NET=m or CONFIG_VDPA_SIM=m; 'tools/lab run' in the source tree has one",
        )
    if "vdpa_sim" not in have and not machine.devices:
        yield Told(
            Level.INFO,
            f"no simulator: {_setting(machine, 'VDPA_SIM')}",
            "only hardware or a VDUSE daemon can make a device here",
            "in the source tree: tools/lab run -- vhost-vdpa list   (a VM with simulated devices)",
        )


def _no_vhost_vdpa(machine: Machine) -> Told:
    if machine.installed is None:
        return Told(
            Level.WARN,
            f"vhost_vdpa is not loaded, and the modules of kernel {machine.release} cannot be read from here",
            f"there is no list of modules in /lib/modules/{machine.release}; in a container the host's modules count",
            "modprobe vhost_vdpa (from a container: on the host)",
        )
    return Told(
        Level.FAIL,
        f"kernel {machine.release} has no vhost_vdpa: {_setting(machine, 'VHOST_VDPA')}",
        "without it there is no /dev/vhost-vdpa-N",
        "install the modules package of this kernel (Ubuntu: linux-modules-extra-$(uname -r)), or another kernel",
    )


def _setting(machine: Machine, name: str) -> str:
    if machine.config is None:
        return f"CONFIG_{name} unknown, this kernel's configuration was not found"
    value = machine.config.get(name)
    return f"CONFIG_{name}{'=' + value if value else ' is not set'} ({machine.config_source})"


def management_device(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """Something can make devices: `vdpa mgmtdev show` is not empty."""
    if machine.stuck:
        who = ", ".join(str(holder) for holder in machine.open_elsewhere) or "a process that is not visible from here"
        yield Told(
            Level.FAIL,
            f"{_waiting(machine.stuck[0])} a device that {who} has open",
            "every vdpa command waits with it, unkillable (drivers/vhost/vdpa.c:vhost_vdpa_remove)" + _behind(machine),
            f"kill {' '.join(str(holder.pid) for holder in machine.open_elsewhere)}".strip(),
        )
    elif not machine.tool:
        yield Told(
            Level.WARN,
            "there is no 'vdpa' command",
            "it makes and names devices; MAC address, features and statistics come from it",
            "apt-get install iproute2   (5.12 or newer)",
        )
    elif machine.management:
        yield Told(Level.PASS, f"management devices: {', '.join(sorted(machine.management))}")
    else:
        yield Told(
            Level.WARN,
            "'vdpa mgmtdev show' lists nothing" + (f": {why}" if (why := machine.management_unknown) else ""),
            "whether a driver here makes vDPA devices is unknown" if why else "no driver here makes vDPA devices",
            _first_step(machine),
        )


def _waiting(first: Holder) -> str:
    if first.name == "vdpa":
        return f"'vdpa' is stuck (pid {first.pid}): it deletes"
    return f"'{first.name}' is stuck (pid {first.pid}): it removes the driver of"


def _behind(machine: Machine) -> str:
    """Name the other processes that wait: they are not the reason."""
    others = ", ".join(str(each) for each in machine.stuck[1:])
    return f"; behind it: {others}" if others else ""


def _first_step(machine: Machine) -> str:
    if machine.own_network:
        return "nsenter --target 1 --net vdpa mgmtdev show   (only the first network namespace sees devices)"
    for nic in machine.nics:
        if nic.ids in NICS:
            if nic.vfs == 0 and nic.max_vfs:
                return f"echo 1 > /sys/bus/pci/devices/{nic.slot}/sriov_numvfs; modprobe {NICS[nic.ids][1]}"
            return f"devlink dev eswitch set pci/{nic.slot} mode switchdev; modprobe {NICS[nic.ids][1]}"
    have = machine.installed or frozenset()
    if "vdpa_sim_net" in have:
        return "modprobe vdpa_sim_net   (simulated devices)"
    return "in the source tree: tools/lab run -- vdpa mgmtdev show   (a VM with simulated devices)"


def which_nic(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """Which NICs here have a vDPA driver, and what it does."""
    known = [nic for nic in machine.nics if nic.ids in NICS]
    for nic in known:
        name, module = NICS[nic.ids]
        does = DRIVERS[module]
        yield Told(
            Level.INFO,
            f"{nic.slot} {nic.ids} {name}: {module}; suspend {does.suspend}, resume {does.resume}, "
            f"descriptor ASID {does.desc_asid}",
            "by the driver's source; the firmware decides on the rest",
        )
    if not known:
        seen = ", ".join(f"{nic.slot} {nic.ids}" for nic in machine.nics) or "none"
        yield Told(
            Level.INFO,
            f"no NIC of which a vDPA driver is known (network functions: {seen})",
            "a NIC that is not in the list may be able to: drivers add ids",
            "vhost-vdpa probe --json of a device on it, sent in, makes it known",
        )


def firmware(machine: Machine, _: GuestSize) -> Iterator[Told]:
    """Firmware versions with their board, and modules that are not from the kernel."""
    for each in machine.firmware:
        yield Told(
            Level.INFO,
            f"{each.name}: firmware {each.version}, board {each.board}",
            "RESUME and descriptor ASIDs depend on it; from which version on is not documented",
            "compare with: vhost-vdpa probe --verify",
        )
    for module, version in machine.vendor_modules.items():
        yield Told(
            Level.WARN,
            f"{module} {version} is not the kernel's own build",
            "modules of two builds do not fit together: unknown symbols, or missing features",
            "dmesg | grep -i 'disagrees about version'",
        )
    if not machine.firmware and not machine.vendor_modules:
        yield Told(Level.SKIP, "no firmware version visible (no RDMA-capable NIC, or its driver is not loaded)")
