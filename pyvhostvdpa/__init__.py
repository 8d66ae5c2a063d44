# SPDX-License-Identifier: MIT
"""vhost-vdpa from Python: bindings, shadow virtqueues, live migration.

>>> from pyvhostvdpa import VhostVdpa
>>> with VhostVdpa("/dev/vhost-vdpa-0") as dev:  # doctest: +SKIP
...     print(dev.get_backend_features())

Opening a device resets it, and a device has one user at a time.
"""

from .chardev import VhostVdpa
from .device import State, VdpaNetDevice
from .errors import (
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
from .iotlb import AddressSpace, Iotlb, Limits
from .memory import GuestMemory
from .mgmt import list_devices
from .migration.guest import GuestOptions
from .migration.local import Options, migrate
from .migration.source import SendOptions
from .probe import Probe
from .trace import Event, Trace
from .uapi import Access, BackendFeature, Status

__version__ = "0.1.0"

__all__ = [
    "Access",
    "AddressSpace",
    "BackendFeature",
    "DeviceBusy",
    "DeviceClosed",
    "Event",
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
