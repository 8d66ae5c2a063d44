# SPDX-License-Identifier: MIT
"""``vhost-vdpa doctor``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..base.errors import MissingFeature
from ..host.doctor import Finding, Level, Plan, examine, healthy, to_dict
from ..host.machine import gather
from .units import size

EPILOG = """exit status: 0 if nothing FAILs (with --strict: nothing WARNs either), else 1"""


def register(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "doctor",
        help="what keeps this machine from using vDPA, and the next command",
        description="Check twenty things that people stumble over. Opens and changes nothing, works without root, "
        "without a device and in a container.",
        epilog=EPILOG,
    )
    parser.add_argument("device", metavar="DEV", nargs="?", help="chardev or vDPA name (default: all)")
    parser.add_argument("--json", "-j", action="store_true", help="print JSON, schema pyvhostvdpa/host/doctor/1")
    parser.add_argument("--strict", action="store_true", help="exit 1 on WARN too")
    parser.add_argument("--memory", type=size, default="1G", help="guest memory to reckon with (default %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Examine and print."""
    machine = gather(device=arguments.device)
    if arguments.device is not None and not machine.devices:
        raise MissingFeature(
            f"no vDPA device {arguments.device}", hint="vhost-vdpa list; vhost-vdpa doctor without DEV"
        )
    findings = examine(machine, Plan(arguments.memory))
    if arguments.json:
        print(json.dumps(to_dict(findings, arguments.strict), indent=2))
    else:
        for finding in findings:
            print(_render(finding))
    return 0 if healthy(findings, arguments.strict) else 1


def _render(finding: Finding) -> str:
    lines = [f"{finding.level.value:<4} {finding.id}  {finding.what}"]
    if finding.level not in (Level.PASS, Level.SKIP):
        lines += [f"          {finding.why}"] if finding.why else []
        lines += [f"          next: {finding.next}"] if finding.next else []
    return "\n".join(lines)
