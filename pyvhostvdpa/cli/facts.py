# SPDX-License-Identifier: MIT
"""``vhost-vdpa facts``."""

from __future__ import annotations

import os

from .. import __version__
from ..host.doctor import NAMES, Level, by_level, examine, healthy
from ..host.machine import gather

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence
    from typing import Any

    from ..host.doctor import Finding
    from ..host.machine import Machine

SCHEMA = "pyvhostvdpa/facts/1"
_SEVERITY = {Level.SKIP: -1, Level.PASS: 0, Level.INFO: 0, Level.WARN: 1, Level.FAIL: 2}
EPILOG = """\
As an Ansible local fact, then ansible_local.vhost_vdpa in a playbook:
  mkdir -p /etc/ansible/facts.d && cd /etc/ansible/facts.d
  printf '#!/bin/sh\\nexec vhost-vdpa facts\\n' > vhost_vdpa.fact
  chmod +x vhost_vdpa.fact

For the textfile collector of Prometheus's node_exporter, from a timer:
  vhost-vdpa facts --openmetrics --output DIR/vhost_vdpa.prom

examples:
  vhost-vdpa facts
  vhost-vdpa facts --openmetrics

exit status: 0, whatever doctor finds; 1 if FILE cannot be written"""
DESCRIPTION = (
    "Print what 'list' and 'doctor' find, for programs that look after many machines. Opens and changes nothing."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", "-j", action="store_true", help=f"print JSON, schema {SCHEMA} (the default)")
    form.add_argument("--openmetrics", action="store_true", help="print gauges in the OpenMetrics text format")
    parser.add_argument("--output", metavar="FILE", help="replace FILE in one step instead of printing")


def run(arguments: argparse.Namespace) -> int:
    """Collect and print."""
    machine = gather()
    findings = examine(machine)
    if arguments.openmetrics:
        text = "\n".join([*_metrics(machine, findings), "# EOF"])
    else:
        import json  # noqa: PLC0415

        text = json.dumps(_facts(machine, findings), indent=2)
    if arguments.output is None:
        print(text)
    else:
        from ..base.files import check_writable, replace_file  # noqa: PLC0415

        check_writable(arguments.output)
        replace_file(arguments.output, lambda file: file.write(f"{text}\n"))
    return 0


def _facts(machine: Machine, findings: Sequence[Finding]) -> dict[str, Any]:
    parents = machine.parents
    return {
        "schema": SCHEMA,
        "version": __version__,
        "kernel": machine.release,
        "devices": [
            {
                **device.to_dict(),
                "module": parents[device.name].module if device.name in parents else None,
                "pinned": parents[device.name].pinned if device.name in parents else None,
            }
            for device in machine.devices
        ],
        "doctor": {
            "healthy": healthy(list(findings)),
            "checks": {level.value: ids for level, ids in by_level(list(findings)).items()},
        },
        "memory": {"available": machine.available, "memlock": machine.memlock, "pinned": machine.pinned},
    }


def _metrics(machine: Machine, findings: Sequence[Finding]) -> Iterator[str]:
    """Yield the lines. Only gauges: the collector knows fewer types than OpenMetrics has."""
    release = os.uname().release
    yield from _family("info", "The tool and the kernel.", [({"version": __version__, "kernel": release}, 1)])
    named = [({"name": each.name}, each) for each in machine.devices]
    yield from _family(
        "device_info",
        "A vDPA device of this machine.",
        [
            (
                {
                    "name": each.name,
                    "chardev": each.chardev or "",
                    "driver": each.driver or "",
                    "mgmtdev": each.mgmtdev or "",
                    "mac": each.mac or "",
                },
                1,
            )
            for each in machine.devices
        ],
    )
    yield from _family(
        "device_in_use",
        "Whether a process has the device open.",
        [(label, int(bool(each.holders))) for label, each in named if each.holders or each.holders_known],
    )
    yield from _family(
        "device_link_up",
        "Whether the device's link is up.",
        [(label, int(each.link_up)) for label, each in named if each.link_up is not None],
    )
    yield from _family("doctor_healthy", "Whether no check of doctor fails.", [({}, int(healthy(list(findings))))])
    yield from _family(
        "doctor_check",
        "What a check of doctor found: 0 nothing, 1 a warning, 2 a failure, -1 it was skipped.",
        [
            ({"id": each, "check": NAMES[each]}, _SEVERITY[level])
            for level, ids in by_level(list(findings)).items()
            for each in ids
        ],
    )
    if machine.available is not None:
        yield from _family("memory_available_bytes", "Memory left for a guest.", [({}, machine.available)])


def _family(name: str, what: str, samples: Sequence[tuple[dict[str, str], int]]) -> Iterator[str]:
    if not samples:
        return
    yield f"# HELP vhost_vdpa_{name} {what}"
    yield f"# TYPE vhost_vdpa_{name} gauge"
    for labels, value in samples:
        words = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"vhost_vdpa_{name}{{{words}}} {value}" if words else f"vhost_vdpa_{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
