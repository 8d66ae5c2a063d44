# SPDX-License-Identifier: MIT
"""vhost-vdpa from Python: bindings, shadow virtqueues, live migration.

>>> from pyvhostvdpa import VhostVdpa
>>> with VhostVdpa("/dev/vhost-vdpa-0") as dev:  # doctest: +SKIP
...     print(dev.get_backend_features())

Opening a device resets it, and a device has one user at a time.
"""

from .base.errors import (
    DeviceBusy,
    DeviceClosed,
    KernelError,
    ManagementFailed,
    MapRejected,
    MigrationCancelled,
    MigrationFailed,
    MigrationRefused,
    MissingFeature,
    NotVhostVdpa,
    OutOfOrder,
    QueueBroken,
    VhostVdpaError,
)
from .base.uapi import Access, BackendFeature, Status
from .chardev.door import VhostVdpa
from .chardev.iotlb import AddressSpace, Iotlb, Limits
from .device.net import State, VdpaNetDevice
from .guest.synthetic import GuestOptions
from .host.mgmt import list_devices
from .memory.guest import FileRegion, GuestMemory
from .memory.log import SharedLog
from .migration.local import Options, migrate
from .migration.source import SendOptions
from .probe.probe import Probe
from .trace.recorder import Event, Trace

__version__ = "0.1.0"

__all__ = [
    "Access",
    "AddressSpace",
    "BackendFeature",
    "DeviceBusy",
    "DeviceClosed",
    "Event",
    "FileRegion",
    "GuestMemory",
    "GuestOptions",
    "Iotlb",
    "KernelError",
    "Limits",
    "ManagementFailed",
    "MapRejected",
    "MigrationCancelled",
    "MigrationFailed",
    "MigrationRefused",
    "MissingFeature",
    "NotVhostVdpa",
    "Options",
    "OutOfOrder",
    "Probe",
    "QueueBroken",
    "SendOptions",
    "SharedLog",
    "State",
    "Status",
    "Trace",
    "VdpaNetDevice",
    "VhostVdpa",
    "VhostVdpaError",
    "__version__",
    "list_devices",
    "migrate",
]
