# SPDX-License-Identifier: MIT
"""An IOTLB message (``struct vhost_msg_v2``), and the error for one that the kernel refuses."""

from __future__ import annotations

from typing import NamedTuple

from ..base.errors import KernelError
from ..base.uapi import IotlbType
from ..trace.recorder import describe


class IotlbMessage(NamedTuple):
    """One IOTLB message. Sizes and addresses in bytes; ``size`` 0 only with batches."""

    type: IotlbType
    asid: int
    iova: int = 0
    size: int = 0
    uaddr: int = 0
    perm: int = 0

    @property
    def fields(self) -> dict[str, int | str]:
        """What the type of the message gives a meaning to."""
        if self.type in (IotlbType.BATCH_BEGIN, IotlbType.BATCH_END):
            return {"asid": self.asid}
        found: dict[str, int | str] = {"asid": self.asid, "iova": self.iova, "size": self.size}
        if self.type is IotlbType.UPDATE:
            found["uaddr"], found["perm"] = self.uaddr, self.perm
        return found

    def __str__(self) -> str:
        return describe(self.fields)


class IotlbWriteError(KernelError):
    """The kernel refused a message. ``applied`` messages of the burst are in force."""

    def __init__(self, number: int, message: IotlbMessage, applied: int, cause: str = "", hint: str = "") -> None:
        super().__init__(number, f"write IOTLB_{message.type.name}", str(message), cause, hint)
        self.rejected = message
        self.applied = applied
