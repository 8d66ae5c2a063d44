# SPDX-License-Identifier: MIT
"""What a check says, and what all of them share."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator

from ...base.record import Record
from ..drivers import DRIVERS, Driver
from ..machine import Machine
from ..mgmt import VdpaDevice
from ..parents import Parent

DEFAULT_MEMORY = 1 << 30
"""Guest memory in bytes by default, the same as that of ``vhost-vdpa migrate``."""


class Level(enum.Enum):
    """How bad it is. Only FAIL makes the exit status 1; WARN does with ``--strict``."""

    PASS = "PASS"
    INFO = "INFO"
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"


class Finding(Record):
    """What one check found. ``next`` is a command or a thing to change, "" if there is nothing to do."""

    id: str
    level: Level
    what: str
    why: str = ""
    next: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the fields for JSON."""
        return {"id": self.id, "level": self.level.value, "what": self.what, "why": self.why, "next": self.next}


class GuestSize(Record):
    """What this machine shall do: run a guest of ``memory`` bytes."""

    memory: int = DEFAULT_MEMORY


class Told(Record):
    """What a check says; its id is added by the table."""

    level: Level
    what: str
    why: str = ""
    next: str = ""


Check = Callable[[Machine, GuestSize], Iterator[Told]]
CREATE = "vdpa mgmtdev show; vdpa dev add name vdpa0 mgmtdev NAME"
NO_DEVICE = Told(Level.SKIP, "no vDPA device with a chardev to look at", next=CREATE)
"""What a check means that says nothing."""
PROBE = "vhost-vdpa probe {}"


def mebibytes(size: int) -> str:
    """Return a size in bytes for people."""
    return f"{size >> 20} MiB"


def named(machine: Machine) -> Iterator[tuple[VdpaDevice, Parent]]:
    """Yield the devices that vhost_vdpa has, with their parents."""
    for device in machine.devices:
        if device.chardev:
            yield device, machine.parents.get(device.name, Parent(None, None, None, device.unknown))


def driver_of(parent: Parent) -> Driver | None:
    """Return what is known of a parent driver, None for an unknown one."""
    return DRIVERS.get(parent.module or "")
