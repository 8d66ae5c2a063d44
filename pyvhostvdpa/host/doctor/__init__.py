# SPDX-License-Identifier: MIT
"""Twenty things that keep people from using vDPA, each checked without opening a device.

A check is a function from facts (:class:`pyvhostvdpa.host.machine.Machine`) to
findings; :data:`CHECKS` lists them. A fact that only the opened
device shows is reported as such, with the command that shows it.
"""

from __future__ import annotations

from ..machine import Machine
from . import access, hardware, memory, migrating
from .finding import CREATE, DEFAULT_MEMORY, NO_DEVICE, Check, Finding, GuestSize, Level

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SCHEMA = "pyvhostvdpa/host/doctor/1"

CHECKS: dict[str, Check] = {
    "K01": hardware.kernel_parts,
    "D02": hardware.management_device,
    "D03": hardware.which_nic,
    "D04": hardware.firmware,
    "M05": memory.memory,
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

NAMES = {
    "K01": "kernel modules",
    "D02": "management device",
    "D03": "NICs",
    "D04": "firmware",
    "M05": "memory",
    "M06": "IOTLB entries",
    "M07": "private memory",
    "M08": "failed batches",
    "O09": "IOMMU",
    "O10": "in use",
    "O11": "device nodes",
    "O12": "permission",
    "G13": "migration",
    "G14": "queue bases",
    "G15": "resume",
    "G16": "cost of maps",
    "G17": "slow calls",
    "A18": "addresses",
    "F19": "ACCESS_PLATFORM",
    "D20": "configuration",
}
"""What each check is about, in a word or two."""

_WORST = (Level.FAIL, Level.WARN, Level.INFO, Level.PASS, Level.SKIP)


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


def by_level(findings: list[Finding]) -> dict[Level, list[str]]:
    """Return the ids of the checks by the worst level that each has found, worst level first."""
    found: dict[Level, list[str]] = {level: [] for level in _WORST}
    for identity in dict.fromkeys(finding.id for finding in findings):
        levels = {finding.level for finding in findings if finding.id == identity}
        found[next(level for level in _WORST if level in levels)].append(identity)
    return found


def to_dict(findings: list[Finding], strict: bool = False) -> dict[str, Any]:
    """Return the findings for JSON."""
    counts = {level.value: sum(finding.level is level for finding in findings) for level in Level}
    return {
        "schema": SCHEMA,
        "healthy": healthy(findings, strict),
        "counts": counts,
        "findings": [{**finding.to_dict(), "name": NAMES[finding.id]} for finding in findings],
    }


__all__ = [
    "CHECKS",
    "CREATE",
    "DEFAULT_MEMORY",
    "NAMES",
    "SCHEMA",
    "Finding",
    "GuestSize",
    "Level",
    "by_level",
    "examine",
    "healthy",
    "to_dict",
]
