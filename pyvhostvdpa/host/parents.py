# SPDX-License-Identifier: MIT
"""The driver that made a device, its parent: which one it is, and whether it pins memory.

No ioctl returns it. sysfs names the driver of hardware, netlink that of simulated devices, and in a container, without
root or without iproute2 neither may answer: then the parent is unknown, which is an answer of its own.
"""

from __future__ import annotations

import os

from ..base import sysfs
from ..base.errors import MissingFeature
from ..base.record import Record
from .drivers import DRIVERS
from .mgmt import SYSFS_DEVICES, ask, name_of
from .processes import sees_all, stuck, vduse_daemon

_SIMULATED = "vdpa_hwsim"
"""The project's own driver."""


class Parent(Record):
    """What is known of the driver that made a device.

    ``module`` is ``None`` if unknown, and ``why`` says why. ``pinned`` is whether it works on pinned pages; no
    ioctl returns it: it follows from the driver. vdpa_sim has a parameter for it (``use_va``), VDUSE never pins, every
    other parent does; None for an unknown one. ``max_iotlb_entries`` is the limit of entries per address space,
    the smaller of vhost_vdpa's and the parent's parameter, None where the kernel has none.
    """

    module: str | None
    pinned: bool | None
    max_iotlb_entries: int | None
    why: str = ""

    @property
    def pins_for_certain(self) -> bool:
        """Whether it is a driver whose source is known to pin, so that it may be given private memory."""
        return bool(self.pinned) and (self.module in DRIVERS or self.module == _SIMULATED)

    @property
    def memory(self) -> str:
        """How it reaches memory, in words."""
        if self.pinned is None:
            return f"whether it pins memory is unknown ({self.why or 'its driver is unknown'})"
        return "pins memory" if self.pinned else "user addresses"


def _module(name: str) -> tuple[str | None, str]:
    """Return the parent's kernel module, and why if it is unknown.

    Simulated devices have no driver in sysfs, so netlink is asked then.
    """
    device = os.path.realpath(f"{SYSFS_DEVICES}/{name}")
    parent = os.path.dirname(device)
    for link in (f"{parent}/driver/module", f"{parent}/module"):
        if module := sysfs.target(link):
            return module, ""
    if "/vduse/" in device:
        return "vduse", ""
    if waiting := stuck():
        return None, f"'vdpa' would wait for {waiting[0]}"
    shown, why = ask("dev", "show", name)
    mgmtdev = str(shown.get("dev", {}).get(name, {}).get("mgmtdev", ""))
    if mgmtdev.startswith("vdpasim"):
        return "vdpa_sim", ""
    module = mgmtdev.partition("/")[0] or None
    return module, "" if module else why or "netlink does not list the device"


def _parameter(module: str, name: str) -> str | None:
    return sysfs.read(f"/sys/module/{module}/parameters/{name}")


def _pins(module: str | None) -> tuple[bool | None, str]:
    if module is None or module == "vduse":
        return (None if module is None else False), ""
    if module == "vdpa_sim":
        use_va = _parameter("vdpa_sim", "use_va")
        return (None, "vdpa_sim's parameter use_va cannot be read") if use_va is None else (use_va != "Y", "")
    return True, ""


def parent_of(chardev: str | os.PathLike[str]) -> Parent:
    """Return what sysfs and netlink show of a chardev's parent driver."""
    name = name_of(chardev)
    module, why = _module(name) if name else (None, "sysfs does not know the device behind this node")
    pinned, no_parameter = _pins(module)
    limits = [_parameter(each, "max_iotlb_entries") for each in ("vhost_vdpa", module) if each]
    values = [int(limit) for limit in limits if limit and limit.isdigit() and int(limit) > 0]
    return Parent(module, pinned, min(values, default=None), why or no_parameter)


def unserved(name: str, parent: Parent) -> tuple[str, str] | None:
    """Return why nothing answers for a VDUSE device, and the next command; None while its daemon may answer.

    The kernel waits for the daemon, 30 s for each request by default, before it fails it with EIO
    (drivers/vdpa/vdpa_user/vduse_dev.c:vduse_dev_msg_sync).
    """
    if parent.module != "vduse":
        return None
    daemon = vduse_daemon(name)
    if daemon is not None and daemon.stopped:
        return f"its VDUSE daemon {daemon} is stopped (state {daemon.state}) and does not answer", (
            f"kill -CONT {daemon.pid}"
        )
    if daemon is None and sees_all():
        return "no process serves it: its VDUSE daemon is gone", f"start the daemon again, or: vdpa dev del {name}"
    return None


def check_served(chardev: str | os.PathLike[str]) -> None:
    """Raise :class:`~pyvhostvdpa.MissingFeature` if a VDUSE device's daemon cannot answer; opens nothing."""
    name = name_of(chardev)
    wrong = unserved(name, parent_of(chardev)) if name else None
    if wrong:
        raise MissingFeature(f"{os.fspath(chardev)} ({name}): {wrong[0]}", hint=wrong[1])
