# SPDX-License-Identifier: MIT
"""What can be learnt about vDPA devices without opening them.

sysfs for names, drivers and nodes; iproute2's ``vdpa`` for what netlink
shows; ``/proc`` for the holders of a node. Opening a node resets its device, so
nothing here does.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence

from ..base import sysfs
from ..base.errors import DeviceBusy, ManagementFailed, MissingFeature, NotVhostVdpa
from ..base.record import Record
from .command import outcome
from .processes import Holder, device_number, openers, sees_all, stuck

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "SYSFS_DEVICES",
    "Holder",
    "VdpaDevice",
    "add_device",
    "ask",
    "busy",
    "chardev_of",
    "delete_device",
    "device_number",
    "has_tool",
    "holders",
    "list_devices",
    "name_of",
    "net_config",
    "number_of",
    "openers",
    "parse_vendor_statistics",
    "select",
    "stuck",
    "vdpa_json",
    "vdpa_name",
    "vendor_statistics",
    "wait_for_chardev",
]

SYSFS_DEVICES = "/sys/bus/vdpa/devices"
_VDPA_TIMEOUT = 10.0
CHANGE_SECONDS = 60.0
"""Seconds that making or deleting a device may take: hardware sets its queues and flows up by firmware commands."""
_QUEUE_TIMEOUT = 2.0
_CHARDEV_POLL = 0.01


class VdpaDevice(Record):
    """One device on the vdpa bus. What is not known is ``None``, and ``unknown`` says why, "" if netlink answered.

    ``holders_known`` is whether every process could be looked at; without it there may be more than ``holders``.
    """

    name: str
    chardev: str | None
    driver: str | None
    mgmtdev: str | None
    virtio_id: int | None
    mac: str | None
    holders: tuple[Holder, ...]
    link_up: bool | None = None
    unknown: str = ""
    holders_known: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "name": self.name,
            "chardev": self.chardev,
            "driver": self.driver,
            "mgmtdev": self.mgmtdev,
            "virtio_id": self.virtio_id,
            "mac": self.mac,
            "link_up": self.link_up,
            "holders": [{"pid": h.pid, "name": h.name} for h in self.holders],
            "holders_known": self.holders_known,
            "unknown": self.unknown or None,
        }


def _run(arguments: Sequence[str], seconds: float = _VDPA_TIMEOUT) -> tuple[int, str, str]:
    """Run ``vdpa`` and return its status, output and complaints; TimeoutError if it does not come back in time."""
    return outcome([_tool(), *arguments], seconds)


def has_tool() -> bool:
    """Whether iproute2's ``vdpa`` is installed."""
    try:
        _tool()
    except FileNotFoundError:
        return False
    return True


def _tool() -> str:
    # shutil.which() would load every compression there is
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        tool = os.path.join(folder, "vdpa")
        if os.path.isfile(tool) and os.access(tool, os.X_OK):
            return tool
    raise FileNotFoundError("vdpa")


def vdpa_json(*arguments: str) -> dict[str, Any]:
    """Run ``vdpa -j ARGUMENTS`` and return what it printed; {} if it failed, see :func:`ask`."""
    return ask(*arguments)[0]


def ask(*arguments: str) -> tuple[dict[str, Any], str]:
    """Run ``vdpa -j ARGUMENTS``; return what it printed, and why it printed nothing: "" if it answered."""
    try:
        status, said, complained = _run(["-j", *arguments])
        parsed = _parsed(said)
    except FileNotFoundError:
        return {}, "there is no 'vdpa' command (apt-get install iproute2)"
    except PermissionError as e:
        return {}, f"'vdpa' cannot be run ({e.strerror})"
    except TimeoutError:
        return {}, f"'vdpa' did not answer within {_VDPA_TIMEOUT:g} s"
    except ValueError:
        return {}, "'vdpa' answered with something else than JSON"
    if not status and isinstance(parsed, dict):
        return parsed, ""
    words = " ".join((complained or said).split())
    why = "the kernel has no vdpa yet (modprobe vdpa)"
    if os.path.isdir(SYSFS_DEVICES):
        why = "only the first network namespace sees vDPA's netlink"
    return {}, f"'vdpa' failed ({words or f'status {status}'}); {why}"


def _parsed(said: str) -> Any:
    if not said:
        return {}
    # where netlink does not answer there is nothing to parse, and to load this takes longer than to ask
    import json  # noqa: PLC0415

    return json.loads(said)


def net_config(name: str) -> dict[str, Any]:
    """Return a net device's configuration as netlink shows it, {} if it does not."""
    config = vdpa_json("dev", "config", "show", name).get("config", {}).get(name, {})
    # iproute2 prints keys such as "link " with a trailing blank
    return {key.strip(): value for key, value in config.items()} if isinstance(config, dict) else {}


_REFUSALS = {
    "Operation not permitted": "run as root: it takes CAP_NET_ADMIN in the first network namespace",
    "Operation not supported": "vdpa mgmtdev show lists the attributes and features that a management device takes",
    "No such device": "vdpa mgmtdev show lists the management devices",
    "File exists": "vhost-vdpa list shows the names that are taken",
    "Invalid argument": "an attribute needs its feature in device_features as well",
}


def _vdpa(*arguments: str, seconds: float) -> None:
    """Run iproute2's ``vdpa``; :class:`~pyvhostvdpa.ManagementFailed` has its words if it fails."""
    command = " ".join(["vdpa", *arguments])
    if waiting := stuck():
        raise ManagementFailed(
            f"{command}: not tried, {waiting[0]} waits for an open device with the kernel's lock held",
            hint="vhost-vdpa doctor names the holder; end that process",
        )
    try:
        status, said, complained = _run(arguments, seconds)
    except FileNotFoundError as e:
        raise ManagementFailed(f"{command}: there is no 'vdpa' command", hint="apt-get install iproute2") from e
    except TimeoutError as e:
        first = next(iter(stuck()), None)
        raise ManagementFailed(
            f"{command}: no answer within {seconds:g} s; " + (f"{first} is stuck" if first else "the driver is slow"),
            hint="vhost-vdpa doctor names the holder; end that process"
            if first
            else "give it more time: vhost-vdpa dev takes --timeout SECONDS",
        ) from e
    if status:
        words = complained.strip() or said.strip() or f"status {status}"
        hint = next((hint for part, hint in _REFUSALS.items() if part in words), "vhost-vdpa doctor")
        raise ManagementFailed(f"{command}: {words}", hint=hint)


def add_device(name: str, mgmtdev: str, *attributes: str, seconds: float = CHANGE_SECONDS) -> None:
    """Create a device by iproute2's ``vdpa dev add``; ``attributes`` in its words: ``"mac", "52:54:…"``.

    Raises :class:`~pyvhostvdpa.ManagementFailed` if it fails or takes longer
    than ``seconds``, and for a name that the kernel would take and no other
    command could handle: with a blank or a slash, or one that begins as an
    option does.
    """
    if not name.strip("._:-") or name[0] in "-." or not all(c.isascii() and (c.isalnum() or c in "._:-") for c in name):
        raise ManagementFailed(
            f"{name!r} is not a usable name for a device: letters and digits, with . _ : - between them",
            hint="vhost-vdpa dev add name vdpa0 mgmtdev MGMTDEV",
        )
    _vdpa("dev", "add", "name", name, "mgmtdev", mgmtdev, *attributes, seconds=seconds)


def delete_device(name: str, can_be_opened: Callable[[str], bool], seconds: float = CHANGE_SECONDS) -> None:
    """Delete a device that no process has open; it may take ``seconds``.

    Deleting an open one would not fail but wait in the kernel, unkillable and
    with a lock that every other ``vdpa`` command needs
    (drivers/vhost/vdpa.c:vhost_vdpa_remove). So its holder is looked up, and
    ``can_be_opened`` is asked about the chardev, to notice a holder that is
    not visible from here (:func:`pyvhostvdpa.chardev.door.can_be_opened`
    opens it, which resets the device).

    Raises :class:`~pyvhostvdpa.DeviceBusy`, :class:`~pyvhostvdpa.ManagementFailed`.
    """
    chardev = _chardev(name)
    held = openers().get(number_of(name) or 0, ())
    if chardev is not None and (held or not can_be_opened(chardev)):
        raise busy(
            chardev,
            f"end that process, then delete {name}: deleting an open device hangs every 'vdpa' command until then",
            held,
        )
    _vdpa("dev", "del", name, seconds=seconds)


def holders(chardev: str | os.PathLike[str]) -> tuple[Holder, ...]:
    """Return the processes that have ``chardev`` open, this one included, if this user may see them."""
    number = device_number(chardev)
    return openers().get(number, ()) if number is not None else ()


def busy(chardev: str | os.PathLike[str], hint: str = "", held: Sequence[Holder] = ()) -> DeviceBusy:
    """Return the error for a chardev that cannot be opened because a process has it, naming that process.

    ``held`` are its holders if they are known already; a node of this namespace may not lead to them.
    """
    held_by = ", ".join(str(holder) for holder in held or holders(chardev))
    return DeviceBusy(
        errno.EBUSY,
        f"open {os.fspath(chardev)}",
        cause=f"held by {held_by}" if held_by else "held by a process that is not visible from here",
        hint=hint or "close it there first; a vhost-vdpa device has one user at a time",
    )


def _node(name: str) -> str | None:
    """Return the folder of a device's chardev in sysfs, None without one."""
    device = os.path.realpath(f"{SYSFS_DEVICES}/{name}")
    for entry in sysfs.entries(device):
        if entry.startswith("vhost-vdpa-"):
            return f"{device}/{entry}"
    return None


def _chardev(name: str) -> str | None:
    node = _node(name)
    return None if node is None else f"/dev/{os.path.basename(node)}"


def wait_for_chardev(name: str, seconds: float = 10.0) -> str:
    """Return the chardev of a device that was just made; MissingFeature if it has none within ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        chardev = _chardev(name)
        if chardev is not None and os.path.exists(chardev):
            return chardev
        if time.monotonic() > deadline:
            raise MissingFeature(f"{name} got no chardev within {seconds:g} s", hint="modprobe vhost_vdpa")
        time.sleep(_CHARDEV_POLL)


def list_devices() -> list[VdpaDevice]:
    """Return the devices of the vdpa bus, by name; opens none.

    They are read from sysfs, iproute2's ``vdpa dev show`` and ``/proc``. What
    one of these does not report is ``None`` or empty, with the reason beside it.
    """
    names = sysfs.entries(SYSFS_DEVICES)
    if not names:
        return []
    waiting = stuck()
    shown, why = ({}, f"'vdpa' would wait for {waiting[0]}") if waiting else ask("dev", "show")
    open_now = openers()
    known = shown.get("dev", {})
    return [_device(name, known, why, open_now) for name in names]


def _device(name: str, known: dict[str, Any], why: str, open_now: dict[int, tuple[Holder, ...]]) -> VdpaDevice:
    shown = known.get(name, {})
    config = net_config(name) if shown.get("type") == "network" else {}
    link = config.get("link")
    return VdpaDevice(
        name=name,
        chardev=_chardev(name),
        driver=sysfs.target(f"{SYSFS_DEVICES}/{name}/driver"),
        mgmtdev=shown.get("mgmtdev"),
        virtio_id={"network": 1, "block": 2}.get(shown.get("type", "")),
        mac=config.get("mac"),
        holders=open_now.get(number_of(name) or 0, ()),
        link_up=None if link is None else link == "up",
        unknown="" if shown else why or "netlink does not list it",
        holders_known=sees_all(),
    )


def number_of(name: str) -> int | None:
    """Return the number of a device's chardev as sysfs has it: the node may be missing here, or have another name."""
    node = _node(name)
    number = sysfs.read(f"{node}/dev") if node else None
    if number is None:
        return None
    major, minor = number.split(":")
    return os.makedev(int(major), int(minor))


def select(devices: Sequence[VdpaDevice], device: str | os.PathLike[str]) -> list[VdpaDevice]:
    """Return the one of ``devices`` that a path (by the device behind the node), vDPA name or chardev's name means.

    A name of none of them gives an empty list. :class:`~pyvhostvdpa.MissingFeature` if a name means two: a device
    may be called as another one's chardev. A path of something else is :class:`~pyvhostvdpa.NotVhostVdpa`.
    """
    text = os.fspath(device)
    if os.sep in text:
        number = device_number(text)
        at = [d for d in devices if d.chardev == text or (number is not None and number == number_of(d.name))]
        if not at and name_of(text) is None:
            what = "not a vhost-vdpa character device" if os.path.lexists(text) else "No such file or directory"
            raise NotVhostVdpa(f"{text}: {what}", hint="vhost-vdpa list shows the devices of this machine")
        return at
    found = [d for d in devices if text in (d.name, os.path.basename(d.chardev) if d.chardev else d.name)]
    if len(found) > 1:
        words = " or ".join(f"{d.name} ({d.chardev or f'no chardev, driver {d.driver}'})" for d in found)
        paths = ", ".join(d.chardev for d in found if d.chardev)
        raise MissingFeature(f"{text}: which device, {words}?", hint=f"name it by its path: {paths}")
    return found


def chardev_of(device: str | os.PathLike[str] | None) -> str:
    """Return the chardev that ``device`` means: a path, a vDPA name, or None for the only one there is.

    Raises :class:`~pyvhostvdpa.MissingFeature` naming the existing ones, or if a name means two devices.
    """
    if device is not None and os.sep in os.fspath(device):
        return os.fspath(device)
    known = list_devices()
    nodes = [d.chardev for d in (known if device is None else select(known, device)) if d.chardev]
    if len(nodes) == 1:
        return nodes[0]
    if device is not None and not known and os.path.exists(device):
        return os.fspath(device)
    there = ", ".join(f"{d.name} ({d.chardev or f'no chardev, driver {d.driver}'})" for d in known)
    has = f"this machine has: {there}" if there else "this machine has none"
    what = f"no vDPA device {os.fspath(device)} with a chardev" if device else "which device? None was named"
    raise MissingFeature(f"{what}; {has}", hint="vhost-vdpa doctor" if not nodes else "name one")


def vdpa_name(device: str | os.PathLike[str]) -> str:
    """Return the vDPA name that ``device`` means, raising as :func:`select` does.

    What means no device is returned as it is, for the caller's message.
    """
    found = select(list_devices(), device)
    return found[0].name if found else os.fspath(device)


def name_of(chardev: str | os.PathLike[str]) -> str | None:
    """Return the vdpa name behind a chardev (``vdpa0``), None if sysfs does not know."""
    number = device_number(chardev)
    if number is None:
        return None
    folder, node = os.path.split(os.path.realpath(f"/sys/dev/char/{os.major(number)}:{os.minor(number)}"))
    return os.path.basename(folder) if node.startswith("vhost-vdpa-") else None


_EACH_QUEUE = """tool=$1 name=$2; shift 2
for queue; do printf '\n%s ' "$queue"; "$tool" -j dev vstats show "$name" qidx "$queue"; done"""


def vendor_statistics(chardev: str | os.PathLike[str], queues: Sequence[int]) -> dict[int, dict[str, int]]:
    """Return the vendor statistics of queues by their names, if the parent has any and may be asked now.

    The kernel answers for one queue at a time
    (drivers/vdpa/vdpa.c:vdpa_nl_cmd_dev_stats_get_doit), and so does iproute2's
    ``vdpa``. One shell runs it for all of them: to start it from here is what
    costs. Asking the kernel ourselves would be cheaper still, but a deletion
    that waits for us to close the device would have us wait for it.
    """
    name = name_of(chardev)
    if name is None or stuck():
        return {}
    try:
        argv = ["sh", "-c", _EACH_QUEUE, "sh", _tool(), name, *map(str, queues)]
        _, said, _ = outcome(argv, _VDPA_TIMEOUT + _QUEUE_TIMEOUT * len(queues))
    except (FileNotFoundError, TimeoutError):
        return {}
    return parse_vendor_statistics(said, name)


def parse_vendor_statistics(said: str, name: str) -> dict[int, dict[str, int]]:
    """Read lines of a queue's number and what ``vdpa -j dev vstats show`` said of it, which may be nothing."""
    import json  # noqa: PLC0415

    found = {}
    for line in said.splitlines():
        queue, _, text = line.partition(" ")
        try:
            shown = json.loads(text or "{}").get("vstats", {}).get(name, {})
        except json.JSONDecodeError:
            continue
        values = {key: value for key, value in shown.items() if isinstance(value, int)}
        if values:
            found[int(queue)] = values
    return found
