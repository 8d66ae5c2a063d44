# SPDX-License-Identifier: MIT
"""vhost-vdpa from Python: bindings, shadow virtqueues, live migration.

>>> from pyvhostvdpa import VhostVdpa
>>> with VhostVdpa("/dev/vhost-vdpa-0") as dev:  # doctest: +SKIP
...     print(dev.get_backend_features())

Opening a device resets it, and a device has one user at a time.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .base.errors import (
        DeviceBusy,
        DeviceClosed,
        DeviceNeedsReset,
        KernelError,
        ManagementFailed,
        MapRejected,
        MigrationCancelled,
        MigrationEnded,
        MigrationFailed,
        MigrationRefused,
        MissingFeature,
        NotVhostVdpa,
        OutOfOrder,
        QueueBroken,
        StreamBroken,
        StreamCorrupt,
        VhostVdpaError,
    )
    from .base.uapi import Access, BackendFeature, Status
    from .chardev.door import VhostVdpa
    from .chardev.iotlb import AddressSpace, Iotlb, Limits
    from .device.net import State, VdpaNetDevice
    from .guest.synthetic import GuestOptions
    from .host.mgmt import list_devices
    from .memory.guest import DEFAULT_GPA, FileRegion, GuestMemory
    from .memory.log import SharedLog
    from .migration.local import MigrationOptions, migrate
    from .migration.report import MigrationReport, ReceivedReport, SentReport
    from .migration.source import SendOptions
    from .probe.probe import Probe
    from .trace.recorder import Event, Trace

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_GPA",
    "Access",
    "AddressSpace",
    "BackendFeature",
    "DeviceBusy",
    "DeviceClosed",
    "DeviceNeedsReset",
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
    "MigrationEnded",
    "MigrationFailed",
    "MigrationOptions",
    "MigrationRefused",
    "MigrationReport",
    "MissingFeature",
    "NotVhostVdpa",
    "OutOfOrder",
    "Probe",
    "QueueBroken",
    "ReceivedReport",
    "SendOptions",
    "SentReport",
    "SharedLog",
    "State",
    "Status",
    "StreamBroken",
    "StreamCorrupt",
    "Trace",
    "VdpaNetDevice",
    "VhostVdpa",
    "VhostVdpaError",
    "__version__",
    "list_devices",
    "migrate",
]

_HOMES = {
    "base.errors": (
        "DeviceBusy DeviceClosed DeviceNeedsReset KernelError ManagementFailed MapRejected MigrationCancelled "
        "MigrationEnded MigrationFailed MigrationRefused MissingFeature NotVhostVdpa OutOfOrder QueueBroken "
        "StreamBroken StreamCorrupt VhostVdpaError"
    ),
    "base.uapi": "Access BackendFeature Status",
    "chardev.door": "VhostVdpa",
    "chardev.iotlb": "AddressSpace Iotlb Limits",
    "device.net": "State VdpaNetDevice",
    "guest.synthetic": "GuestOptions",
    "host.mgmt": "list_devices",
    "memory.guest": "DEFAULT_GPA FileRegion GuestMemory",
    "memory.log": "SharedLog",
    "migration.local": "MigrationOptions migrate",
    "migration.report": "MigrationReport ReceivedReport SentReport",
    "migration.source": "SendOptions",
    "probe.probe": "Probe",
    "trace.recorder": "Event Trace",
}
"""Where the public names are defined. They load their module when they are first used, so that
``vhost-vdpa --help`` loads none (PEP 562)."""

_RENAMED = {"Options": "MigrationOptions"}
"""Public names of an earlier release, and what they are called now. They still work, with a DeprecationWarning."""

# for a type checker the names above are all there is: a misspelt one is an error
if not TYPE_CHECKING:

    def __getattr__(name):
        """Return a public name, or a room of the package."""
        from importlib import import_module  # noqa: PLC0415

        if name in _RENAMED:
            from warnings import warn  # noqa: PLC0415

            new = _RENAMED[name]
            warn(f"pyvhostvdpa.{name} is called {new} now", DeprecationWarning, stacklevel=2)
            return __getattr__(new)
        for home, names in _HOMES.items():
            if name in names.split():
                value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
                return value
        if not name.startswith("_"):
            try:
                return import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as e:
                if e.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
