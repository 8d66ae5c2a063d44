# SPDX-License-Identifier: MIT
"""What this machine shows of its vDPA parts without opening a device: facts for ``vhost-vdpa doctor``.

Everything is read below one root (``/``, or a tree made for a test); what
cannot be read, as in a container or as another user than root, is ``None``.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from ..base import sysfs
from ..base.record import Record
from ..memory import hugepages
from ..memory.available import UNLIMITED, ordinary
from ..memory.pinned import HUGE_PAGE, pinned_bytes
from . import mgmt
from .mgmt import VdpaDevice
from .parents import Parent, parent_of
from .processes import Daemon, Holder, sees_all, vduse_daemon

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..base.sysfs import StrPath

CONFIGS = (
    "proc/config.gz",
    "boot/config-{release}",
    "lib/modules/{release}/config",
    "lib/modules/{release}/build/.config",
)


_GZIP_MAGIC = b"\x1f\x8b"
_GZIP = 16
"""Makes zlib expect a gzip header."""


class Settings(Mapping[str, str]):
    """A kernel's configuration by name, without ``CONFIG_``. Of thousands of lines a few are asked for, or none."""

    def __init__(self, content: bytes) -> None:
        """``content`` is what the file has, packed by gzip or not."""
        self._content = content

    @property
    def _text(self) -> str:
        if self._content.startswith(_GZIP_MAGIC):
            # loaded only where a kernel shows its configuration like that; gzip would load every compression there is
            import zlib  # noqa: PLC0415

            try:
                self._content = zlib.decompress(self._content, zlib.MAX_WBITS | _GZIP)
            except zlib.error:
                self._content = b""
        return "\n" + self._content.decode(errors="replace")

    def __getitem__(self, name: str) -> str:
        _, found, after = self._text.partition(f"\nCONFIG_{name}=")
        if not found:
            raise KeyError(name)
        return after.partition("\n")[0]

    def __iter__(self) -> Iterator[str]:
        for line in self._text.splitlines():
            name, found, _ = line.partition("=")
            if found and name.startswith("CONFIG_"):
                yield name.removeprefix("CONFIG_")

    def __len__(self) -> int:
        return sum(1 for _ in self)


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Nic(Record):
    """A PCI network function that has, or could have, a vDPA driver. ``ids`` as ``15b3:101d``."""

    slot: str
    ids: str
    driver: str | None
    vfs: int
    max_vfs: int


class Firmware(Record):
    """Firmware of an RDMA-capable NIC: its version and board id (PSID)."""

    name: str
    version: str
    board: str


class Node(Record):
    """A device node. ``usable`` is whether this user may open it."""

    mode: int
    uid: int
    gid: int
    usable: bool


class Machine(Record):
    """The facts. Sizes in bytes, ``memlock`` None for unlimited.

    ``open_elsewhere`` are the processes that have a device open that has left the bus: one that is being deleted.
    ``stuck`` are processes that wait for one to be closed, the one that the others wait for first. ``daemons`` serve
    VDUSE devices; None for one whose daemon is gone, or cannot be seen by this user.
    ``management_unknown`` says why netlink showed no management device, "" if it did.
    ``sees_all`` is whether all processes can be seen: as root, outside of a PID namespace.
    ``available`` is the rest for a guest's memory in bytes, and ``available_by`` which limit that is.
    ``own_network`` is whether the network namespace differs from the machine's; in such a one netlink shows no device.
    """

    release: str = ""
    config: Mapping[str, str] | None = None
    config_source: str = ""
    installed: frozenset[str] | None = None
    loaded: frozenset[str] = frozenset()
    bus: bool = False
    tool: bool = False
    own_network: bool = False
    stuck: tuple[Holder, ...] = ()
    open_elsewhere: tuple[Holder, ...] = ()
    management: Mapping[str, Any] = _NOTHING
    management_unknown: str = ""
    devices: tuple[VdpaDevice, ...] = ()
    parents: Mapping[str, Parent] = _NOTHING
    daemons: Mapping[str, Daemon | None] = _NOTHING
    net: Mapping[str, Mapping[str, Any]] = _NOTHING
    nodes: Mapping[str, Node | None] = _NOTHING
    nics: tuple[Nic, ...] = ()
    firmware: tuple[Firmware, ...] = ()
    vendor_modules: Mapping[str, str] = _NOTHING
    incoherent_iommus: tuple[str, ...] = ()
    iommu_groups: int = 0
    shmem_huge: str | None = None
    free_huge: int = 0
    memlock: int | None = None
    pinned: int = 0
    available: int | None = None
    available_by: str = ""
    uid: int = 0
    sees_all: bool = True
    selinux: bool = False


def gather(root: StrPath = "/", device: str | None = None) -> Machine:
    """Read the facts; ``device`` (a chardev or vDPA name) leaves the others out.

    Raises as :func:`pyvhostvdpa.host.mgmt.select` does.
    """
    release = os.uname().release
    config, source = _kernel_config(root, release)
    here = os.fspath(root) == "/"
    # without the bus there is no vDPA whose lock a process could wait for; there may be thousands of processes
    no_bus = os.path.isdir(f"{root}/sys/bus") and not os.path.isdir(f"{root}/sys/bus/vdpa")
    stuck = mgmt.stuck() if here and not no_bus else ()
    tool = here and mgmt.has_tool()
    known = mgmt.list_devices() if here else []
    devices = tuple(known if device is None else mgmt.select(known, device))
    management, management_unknown = mgmt.ask("mgmtdev", "show") if tool and not stuck else ({}, "")
    listed = {mgmt.number_of(d.name) for d in devices}
    parents = {d.name: parent_of(d.chardev) for d in devices if d.chardev}
    left = ordinary(root)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Machine(
        release=release,
        config=config,
        config_source=source,
        installed=_installed(root, release),
        loaded=frozenset(sysfs.entries(f"{root}/sys/module")),
        bus=os.path.isdir(f"{root}/sys/bus/vdpa/devices"),
        tool=tool,
        own_network=_own_network(root),
        stuck=stuck,
        open_elsewhere=tuple(w for number, who in mgmt.openers().items() if number not in listed for w in who)
        if stuck
        else (),
        management=management.get("mgmtdev", {}),
        management_unknown=management_unknown,
        devices=devices,
        parents=parents,
        daemons={name: vduse_daemon(name) for name, parent in parents.items() if parent.module == "vduse"},
        net={d.name: mgmt.net_config(d.name) for d in devices if d.virtio_id == 1 and not stuck},
        nodes={d.chardev: node(d.chardev) for d in devices if d.chardev},
        nics=tuple(_nics(root)),
        firmware=tuple(_firmware(root)),
        vendor_modules=_versions(root),
        incoherent_iommus=tuple(_incoherent(root)),
        iommu_groups=len(sysfs.entries(f"{root}/sys/kernel/iommu_groups")),
        shmem_huge=hugepages.choice("shmem_enabled", root),
        free_huge=hugepages.free(HUGE_PAGE, root),
        memlock=None if soft == resource.RLIM_INFINITY else soft,
        pinned=pinned_bytes(),
        available=left.free if left.free < UNLIMITED else None,
        available_by=left.source,
        uid=os.geteuid(),
        sees_all=sees_all(),
        selinux=sysfs.read(f"{root}/sys/fs/selinux/enforce") == "1",
    )


def _kernel_config(root: StrPath, release: str) -> tuple[Settings | None, str]:
    """Return the running kernel's configuration and where it was found."""
    for name in CONFIGS:
        path = os.path.join(root, name.format(release=release))
        try:
            with open(path, "rb", buffering=0) as file:
                return Settings(file.read()), path
        except OSError:
            continue
    return None, ""


def _installed(root: StrPath, release: str) -> frozenset[str] | None:
    """Return the modules on disk and built in, None if there is no list of them."""
    folder = f"{root}/lib/modules/{release}"
    found = (sysfs.read(f"{folder}/{name}") or "" for name in ("modules.dep", "modules.builtin"))
    lines = [line for text in found for line in text.splitlines()]
    if not lines:
        return None
    files = (line.partition(":")[0] for line in lines)
    return frozenset(os.path.basename(file).partition(".")[0].replace("-", "_") for file in files)


def _own_network(root: StrPath) -> bool:
    try:
        return os.stat(f"{root}/proc/self/ns/net").st_ino != os.stat(f"{root}/proc/1/ns/net").st_ino
    except OSError:
        return False


def node(path: str) -> Node | None:
    """Return the owner and mode of a device node, None if it is not there."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return Node(info.st_mode & 0o777, info.st_uid, info.st_gid, os.access(path, os.R_OK | os.W_OK))


def _nics(root: StrPath) -> list[Nic]:
    found = []
    folder = f"{root}/sys/bus/pci/devices"
    for slot in sysfs.entries(folder):
        function = f"{folder}/{slot}"
        if (sysfs.read(f"{function}/class") or "")[:4] != "0x02":
            continue
        vendor, device = (sysfs.read(f"{function}/{name}") or "" for name in ("vendor", "device"))
        found.append(
            Nic(
                slot=slot,
                ids=f"{vendor.removeprefix('0x')}:{device.removeprefix('0x')}",
                driver=sysfs.target(f"{function}/driver"),
                vfs=int(sysfs.read(f"{function}/sriov_numvfs") or 0),
                max_vfs=int(sysfs.read(f"{function}/sriov_totalvfs") or 0),
            )
        )
    return found


def _firmware(root: StrPath) -> list[Firmware]:
    found = []
    folder = f"{root}/sys/class/infiniband"
    for device in sysfs.entries(folder):
        version = sysfs.read(f"{folder}/{device}/fw_ver")
        if version:
            found.append(Firmware(device, version, sysfs.read(f"{folder}/{device}/board_id") or "?"))
    return found


def _versions(root: StrPath) -> dict[str, str]:
    """Return the versions that vendor builds give their modules; the kernel's own have none."""
    names = ("mlx5_core", "mlx5_vdpa", "ib_core")
    versions = {name: sysfs.read(f"{root}/sys/module/{name}/version") for name in names}
    return {name: version for name, version in versions.items() if version}


_SNOOP_CONTROL = 1 << 7
"""Bit SC of the extended capability register of a VT-d unit."""


def _incoherent(root: StrPath) -> list[str]:
    """Return the VT-d units that cannot enforce snooping (drivers/iommu/intel)."""
    found = []
    folder = f"{root}/sys/class/iommu"
    for unit in sysfs.entries(folder):
        ecap = sysfs.read(f"{folder}/{unit}/intel-iommu/ecap") if unit.startswith("dmar") else None
        if ecap and not int(ecap, 16) & _SNOOP_CONTROL:
            found.append(unit)
    return found
