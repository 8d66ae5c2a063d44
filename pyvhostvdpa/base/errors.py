# SPDX-License-Identifier: MIT
"""What can go wrong, by meaning.

Kernel errors stay ``OSError`` with the kernel's errno; the few subclasses
separate cases that a caller would handle differently. Each message says what
happened and, if known, why; ``hint`` is the command to run or
the thing to change next.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class VhostVdpaError(Exception):
    """Base of everything that this package raises on purpose.

    ``message`` (also ``str()``) has the event and its cause;
    ``hint`` is the command to run or the thing to change next, "" if
    unknown.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class KernelError(VhostVdpaError, OSError):
    """A system call on the device failed.

    ``number`` is the kernel's answer (``errno``), ``ioctl`` the request's
    kernel name (or ``write``, ``open``, ``mmap``), ``argument`` what was asked.
    ``cause`` is the likely reason and ``hint`` the next step; where they are
    empty, :mod:`pyvhostvdpa.base.causes` has them, each with the kernel
    function that returns that number.
    """

    def __init__(self, number: int, ioctl: str, argument: str = "", cause: str = "", hint: str = "") -> None:
        # the table of causes takes as long to load as a small command runs, and most of them need no cause
        from .causes import errno_text, explain  # noqa: PLC0415

        what = f"{ioctl}({argument})" if argument else ioctl
        known = explain(ioctl, number)
        cause, hint = cause or known.cause, hint or known.hint
        message = f"{what}: {errno_text(number)}" + (f" ({cause})" if cause else "")
        VhostVdpaError.__init__(self, message, hint)
        self.errno = number
        self.strerror = message
        self.ioctl = ioctl
        self.argument = argument
        self.cause = cause


class DeviceBusy(KernelError):
    """Another process has the device open; the chardev is exclusive (drivers/vhost/vdpa.c:vhost_vdpa_open)."""


class DeviceClosed(VhostVdpaError):
    """The object was used after ``close()``."""


class NotVhostVdpa(VhostVdpaError):
    """The path is not a vhost-vdpa character device."""


class MapRejected(VhostVdpaError, ValueError):
    """A map or unmap that the kernel would answer with a bare EFAULT was refused before the request."""


class MissingFeature(VhostVdpaError):
    """The device or kernel lacks what the request needs."""


class ManagementFailed(VhostVdpaError):
    """iproute2's ``vdpa`` failed; the message has its words."""


class MigrationEnded(VhostVdpaError):
    """The migration did not complete; the message says where the guest is now.

    ``report`` has the measurements taken so far, None if the guest is stopped or
    was never started.
    """

    report: Any = None


class MigrationRefused(MigrationEnded):
    """A migration that cannot work was refused before anything was touched."""


class MigrationFailed(MigrationEnded):
    """The migration failed after it had started."""


class MigrationCancelled(MigrationEnded):
    """The user cancelled a migration that was under way."""


class StreamBroken(VhostVdpaError):
    """The other side of a migration is gone, or nothing moved for as long as the stream may stall."""


class StreamCorrupt(VhostVdpaError):
    """The other side of a migration sent what no correct one sends."""


class QueueBroken(VhostVdpaError):
    """A ring holds what no correct guest or device writes; the queue failed and is served no more."""


class DeviceNeedsReset(VhostVdpaError):
    """A device failed: it set DEVICE_NEEDS_RESET (virtio 1.3, 2.1). Nothing goes through it any more."""


class NotProved(VhostVdpaError):
    """The device did something else than the feature under test promises."""


class OutOfOrder(VhostVdpaError):
    """A device in passthrough uses descriptors out of order, so its queues cannot be stopped in order.

    With the RESUME backend feature it continues in passthrough. Without it the
    device was reset, since nothing else ends a suspension; the message says which.
    """
