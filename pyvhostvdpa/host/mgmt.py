# SPDX-License-Identifier: MIT
"""What can be learnt about vDPA devices without opening them.

sysfs for names, drivers and nodes; iproute2's ``vdpa`` for what netlink
tells; ``/proc`` for who holds a node. Opening a node resets its device, so
nothing here does.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..base.errors import DeviceBusy, ManagementFailed, MissingFeature, NotVhostVdpa, VhostVdpaError
from ..base.record import Record
from .command import outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SYSFS_DEVICES = Path("/sys/bus/vdpa/devices")
_VDPA_TIMEOUT = 10.0
_QUEUE_TIMEOUT = 2.0
_CHARDEV_POLL = 0.01


class Holder(Record):
    """A process that has a chardev open."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.name})"


class VdpaDevice(Record):
    """One device on the vdpa bus. What is not known is None."""

    name: str
    chardev: str | None
    driver: str | None
    mgmtdev: str | None
    virtio_id: int | None
    mac: str | None
    holders: tuple[Holder, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "name": self.name,
            "chardev": self.chardev,
            "driver": self.driver,
            "mgmtdev": self.mgmtdev,
            "virtio_id": self.virtio_id,
            "mac": self.mac,
            "holders": [{"pid": h.pid, "name": h.name} for h in self.holders],
        }


def _processes() -> Iterator[Path]:
    return (entry for entry in Path("/proc").iterdir() if entry.name.isdigit())


def stuck() -> tuple[int, ...]:
    """Return the ``vdpa`` processes that sleep uninterruptibly: a deletion that waits for an open device.

    Until it is closed every other ``vdpa`` would sleep too
    (drivers/vhost/vdpa.c:vhost_vdpa_remove, under the lock of drivers/vdpa/vdpa.c).
    """
    return tuple(int(pid) for pid in os.listdir("/proc") if pid.isdigit() and b"(vdpa) D " in _stat(pid))


def _stat(pid: str) -> bytes:
    """Return the beginning of a process's ``stat``, empty if it is gone. There may be thousands, so without a file."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 256)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _run(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Run ``vdpa`` and return its status, output and complaints; TimeoutError if it does not come back."""
    return outcome([_tool(), *arguments], _VDPA_TIMEOUT)


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
    """Run ``vdpa -j ARGUMENTS`` and return what it printed; {} if it cannot tell."""
    import json  # noqa: PLC0415

    try:
        _, said, _ = _run(["-j", *arguments])
        parsed = json.loads(said or "{}")
    except (FileNotFoundError, TimeoutError, json.JSONDecodeError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


_REFUSALS = {
    "Operation not permitted": "run as root: it takes CAP_NET_ADMIN in the first network namespace",
    "Operation not supported": "vdpa mgmtdev show tells which attributes and features a management device takes",
    "No such device": "vdpa mgmtdev show lists the management devices",
    "File exists": "vhost-vdpa list shows the names that are taken",
    "Invalid argument": "an attribute needs its feature in device_features as well",
}


def _vdpa(*arguments: str) -> None:
    """Run iproute2's ``vdpa``; :class:`~pyvhostvdpa.ManagementFailed` has its words if it fails."""
    command = " ".join(["vdpa", *arguments])
    try:
        if stuck():
            raise TimeoutError
        status, said, complained = _run(arguments)
    except FileNotFoundError as e:
        raise ManagementFailed(f"{command}: there is no 'vdpa' command", hint="apt-get install iproute2") from e
    except TimeoutError as e:
        raise ManagementFailed(
            f"{command}: no answer; a deletion that waits for an open device holds the kernel's lock",
            hint="vhost-vdpa doctor names the holder; end that process",
        ) from e
    if status:
        words = complained.strip() or said.strip() or f"status {status}"
        hint = next((hint for part, hint in _REFUSALS.items() if part in words), "vhost-vdpa doctor")
        raise ManagementFailed(f"{command}: {words}", hint=hint)


def add_device(name: str, mgmtdev: str, *attributes: str) -> None:
    """Create a device by iproute2's ``vdpa dev add``; ``attributes`` in its words: ``"mac", "52:54:…"``.

    Raises :class:`~pyvhostvdpa.ManagementFailed`, also for a name that the
    kernel would take and no other command could handle: with a blank or a
    slash, or one that begins as an option does.
    """
    if not name.strip("._:-") or name[0] in "-." or not all(c.isascii() and (c.isalnum() or c in "._:-") for c in name):
        raise ManagementFailed(
            f"{name!r} is not a usable name for a device: letters and digits, with . _ : - between them",
            hint="vhost-vdpa dev add name vdpa0 mgmtdev MGMTDEV",
        )
    _vdpa("dev", "add", "name", name, "mgmtdev", mgmtdev, *attributes)


def delete_device(name: str) -> None:
    """Delete a device that nobody has open.

    Deleting an open one would not fail but wait in the kernel, unkillable and
    with a lock that every other ``vdpa`` command needs
    (drivers/vhost/vdpa.c:vhost_vdpa_remove). So its holder is looked up, and
    the chardev is opened to see whether somebody out of sight has it: that
    resets the device, which is to go anyway. Raises
    :class:`~pyvhostvdpa.DeviceBusy`,
    :class:`~pyvhostvdpa.ManagementFailed`.
    """
    chardev = _chardev((SYSFS_DEVICES / name).resolve())
    if chardev is not None and (holders(chardev) or not _can_be_opened(chardev)):
        raise busy(
            chardev,
            f"end that process, then delete {name}: deleting an open device hangs every 'vdpa' command until then",
        )
    _vdpa("dev", "del", name)


def _can_be_opened(chardev: str) -> bool:
    # nothing else here opens a device, and the door takes long to load
    from ..chardev.door import VhostVdpa  # noqa: PLC0415

    try:
        VhostVdpa(chardev).close()
    except DeviceBusy:
        return False
    except VhostVdpaError:
        # no node, no permission: the kernel will have the last word
        return True
    return True


def device_number(path: str | os.PathLike[str]) -> int | None:
    """Return the number of the device behind a node, None if there is none."""
    try:
        return os.stat(path).st_rdev
    except OSError:
        return None


def openers() -> dict[int, tuple[Holder, ...]]:
    """Return the processes that have a vhost-vdpa device open, by device number, as far as this user may see.

    A device that is being deleted is among them: its node is gone, its number is not.
    """
    found: dict[int, list[Holder]] = {}
    for process in _processes():
        try:
            descriptors = [entry for entry in (process / "fd").iterdir() if "/vhost-vdpa-" in os.readlink(entry)]
            name = (process / "comm").read_text().strip() if descriptors else ""
        except OSError:
            continue
        for number in {device_number(entry) for entry in descriptors} - {None}:
            found.setdefault(number or 0, []).append(Holder(int(process.name), name))
    return {number: tuple(who) for number, who in found.items()}


def holders(chardev: str | os.PathLike[str]) -> tuple[Holder, ...]:
    """Return the processes that have ``chardev`` open, as far as this user may see."""
    return openers().get(device_number(chardev) or 0, ())


def busy(chardev: str | os.PathLike[str], hint: str = "") -> DeviceBusy:
    """Return the error for a chardev that cannot be opened because somebody has it, naming who."""
    held_by = ", ".join(str(holder) for holder in holders(chardev))
    return DeviceBusy(
        errno.EBUSY,
        f"open {os.fspath(chardev)}",
        cause=f"held by {held_by}" if held_by else "held by a process that is not visible from here",
        hint=hint or "close it there first; a vhost-vdpa device has one user at a time",
    )


def _chardev(device: Path) -> str | None:
    for entry in device.glob("vhost-vdpa-*"):
        return f"/dev/{entry.name}"
    return None


def wait_for_chardev(name: str, seconds: float = 10.0) -> str:
    """Return the chardev of a device that was just made; MissingFeature if it has none within ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        chardev = _chardev((SYSFS_DEVICES / name).resolve())
        if chardev is not None and os.path.exists(chardev):
            return chardev
        if time.monotonic() > deadline:
            raise MissingFeature(f"{name} got no chardev within {seconds:g} s", hint="modprobe vhost_vdpa")
        time.sleep(_CHARDEV_POLL)


def list_devices() -> list[VdpaDevice]:
    """Return the devices of the vdpa bus, by name."""
    if not SYSFS_DEVICES.is_dir():
        return []
    known = {} if stuck() else vdpa_json("dev", "show").get("dev", {})
    open_now = openers()
    devices = []
    for entry in sorted(SYSFS_DEVICES.iterdir()):
        driver = entry / "driver"
        chardev = _chardev(entry.resolve())
        shown = known.get(entry.name, {})
        is_net = shown.get("type") == "network"
        config = vdpa_json("dev", "config", "show", entry.name).get("config", {}) if is_net else {}
        devices.append(
            VdpaDevice(
                name=entry.name,
                chardev=chardev,
                driver=driver.resolve().name if driver.exists() else None,
                mgmtdev=shown.get("mgmtdev"),
                virtio_id={"network": 1, "block": 2}.get(shown.get("type", "")),
                mac=config.get(entry.name, {}).get("mac"),
                holders=open_now.get(device_number(chardev) or 0, ()) if chardev else (),
            )
        )
    return devices


def chardev_of(device: str | os.PathLike[str] | None) -> str:
    """Return the chardev that ``device`` means: a path, a vDPA name, or None for the only one there is.

    Raises :class:`~pyvhostvdpa.MissingFeature` telling what there is instead.
    """
    known = list_devices() if device is None or os.sep not in os.fspath(device) else []
    nodes = [d.chardev for d in known if d.chardev and device in (None, d.name, Path(d.chardev).name)]
    if len(nodes) == 1:
        return nodes[0]
    if device is not None and not known:
        return os.fspath(device)
    there = ", ".join(f"{d.name} ({d.chardev or f'no chardev, driver {d.driver}'})" for d in known) or "none"
    what = f"no vDPA device {os.fspath(device)} with a chardev" if device else "which device?"
    raise MissingFeature(f"{what}; this machine has: {there}", hint="vhost-vdpa doctor" if not nodes else "name one")


def vdpa_name(device: str | os.PathLike[str]) -> str:
    """Return the vDPA name that ``device`` means: a chardev's path, the path's last part, or a vDPA name.

    What means no device is returned as it is, for the caller's message;
    a path that is not a vhost-vdpa device raises :class:`~pyvhostvdpa.NotVhostVdpa`.
    """
    text = os.fspath(device)
    if os.sep in text:
        name = name_of(text)
        if name is None:
            raise NotVhostVdpa(
                f"{text}: not a vhost-vdpa character device", hint="vhost-vdpa list shows the devices of this machine"
            )
        return name
    if (SYSFS_DEVICES / text).exists():
        return text
    return name_of(f"/dev/{text}") or text


def name_of(chardev: str | os.PathLike[str]) -> str | None:
    """Return the vdpa name behind a chardev (``vdpa0``), None if sysfs does not know."""
    number = device_number(chardev)
    if number is None:
        return None
    node = Path(f"/sys/dev/char/{os.major(number)}:{os.minor(number)}").resolve()
    return node.parent.name if node.name.startswith("vhost-vdpa-") else None


_EACH_QUEUE = """tool=$1 name=$2; shift 2
for queue; do printf '\n%s ' "$queue"; "$tool" -j dev vstats show "$name" qidx "$queue"; done"""


def vendor_statistics(chardev: str | os.PathLike[str], queues: Sequence[int]) -> dict[int, dict[str, int]]:
    """Return the vendor statistics of queues by their names, as far as the parent has any and may be asked now.

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


class Parent(Record):
    """What is known of the driver that made a device.

    ``pinned`` tells whether it works on pinned pages; no ioctl tells, so it
    follows from the driver: vdpa_sim has a parameter for it (``use_va``),
    VDUSE never pins, every other parent does. ``max_iotlb_entries`` is how
    many entries an address space may hold, the smaller of vhost_vdpa's and
    the parent's parameter, None where the kernel has none.
    """

    module: str | None
    pinned: bool
    max_iotlb_entries: int | None


def _parent_module(name: str) -> str | None:
    """Return the parent's kernel module; vdpa_sim's devices have no parent in sysfs, so netlink is asked then."""
    driver = (SYSFS_DEVICES / name).resolve().parent / "driver" / "module"
    if driver.exists():
        return driver.resolve().name
    mgmtdev = str(vdpa_json("dev", "show", name).get("dev", {}).get(name, {}).get("mgmtdev", ""))
    if mgmtdev.startswith("vdpasim"):
        return "vdpa_sim"
    return mgmtdev.partition("/")[0] or None


def _parameter(module: str, name: str) -> str | None:
    try:
        return Path(f"/sys/module/{module}/parameters/{name}").read_text().strip()
    except OSError:
        return None


def parent_of(chardev: str | os.PathLike[str]) -> Parent:
    """Return what sysfs and netlink tell of a chardev's parent driver."""
    name = name_of(chardev)
    module = _parent_module(name) if name else None
    pinned = module != "vduse" and not (module == "vdpa_sim" and _parameter("vdpa_sim", "use_va") == "Y")
    limits = [_parameter(each, "max_iotlb_entries") for each in ("vhost_vdpa", module) if each]
    values = [int(limit) for limit in limits if limit and limit.isdigit() and int(limit) > 0]
    return Parent(module, pinned, min(values, default=None))
