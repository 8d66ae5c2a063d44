# SPDX-License-Identifier: MIT
"""Twenty things that keep people from using vDPA, each checked without opening a device.

A check is a function from facts (:class:`pyvhostvdpa.host.machine.Machine`) to
findings; :data:`CHECKS` lists them. What can only be told by the opened
device is said to be so, with the command that tells.
"""

from __future__ import annotations

from ..machine import Machine
from . import access, hardware, memory, migrating
from .finding import DEFAULT_MEMORY, NO_DEVICE, Check, Finding, GuestSize, Level

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SCHEMA = "pyvhostvdpa/host/doctor/1"

CHECKS: dict[str, Check] = {
    "K01": hardware.kernel_parts,
    "D02": hardware.management_device,
    "D03": hardware.which_nic,
    "D04": hardware.firmware,
    "M05": memory.memlock,
    "M06": memory.entry_limit,
    "M07": memory.private_memory,
    "M08": memory.silent_batches,
    "O09": access.iommu,
    "O10": access.held,
    "O11": access.node_names,
    "O12": access.permission,
    "G13": migrating.migration,
    "G14": migrating.vring_base,
    "G15": migrating.resume,
    "G16": memory.map_cost,
    "G17": migrating.slow_calls,
    "A18": migrating.address_kinds,
    "F19": migrating.access_platform,
    "D20": migrating.creation,
}
"""Every check by its id: K kernel, D device, M memory, O opening, G migration, A addresses, F features."""


def examine(machine: Machine, plan: GuestSize | None = None) -> list[Finding]:
    """Run all checks on the facts."""
    plan = plan or GuestSize()
    found = []
    for identity, check in CHECKS.items():
        told = list(check(machine, plan)) or [NO_DEVICE]
        found += [Finding(identity, each.level, each.what, each.why, each.next) for each in told]
    return found


def healthy(findings: list[Finding], strict: bool = False) -> bool:
    """Whether nothing failed; with ``strict`` whether nothing was warned of either."""
    bad = {Level.FAIL, Level.WARN} if strict else {Level.FAIL}
    return not any(finding.level in bad for finding in findings)


def to_dict(findings: list[Finding], strict: bool = False) -> dict[str, Any]:
    """Return the findings for JSON."""
    counts = {level.value: sum(finding.level is level for finding in findings) for level in Level}
    return {
        "schema": SCHEMA,
        "healthy": healthy(findings, strict),
        "counts": counts,
        "findings": [finding.to_dict() for finding in findings],
    }


__all__ = ["CHECKS", "DEFAULT_MEMORY", "SCHEMA", "Finding", "GuestSize", "Level", "examine", "healthy", "to_dict"]
