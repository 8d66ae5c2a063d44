# SPDX-License-Identifier: MIT
"""``vhost-vdpa doctor``."""

from __future__ import annotations

from ..base.errors import MissingFeature
from ..host.doctor import Finding, GuestSize, Level, examine, healthy, to_dict
from ..host.machine import gather
from .commands import COMMANDS
from .options import DEVICE, add_json
from .units import SIZES, guest_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

_EPILOG = f"""\
{SIZES}

examples:
  vhost-vdpa doctor                       the machine and all devices
  vhost-vdpa doctor vdpa0 --memory 16G    one device, and a guest of 16 GiB

exit status: 0 if nothing FAILs (with --strict: nothing WARNs either), else 1"""


def register(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "doctor",
        help=COMMANDS["doctor"],
        description="Check twenty things that people stumble over. Opens and changes nothing, works without root, "
        "without a device and in a container.",
        epilog=_EPILOG,
    )
    parser.add_argument("device", metavar="DEV", nargs="?", help=f"{DEVICE} (default: all)")
    add_json(parser, "print JSON, schema pyvhostvdpa/host/doctor/1")
    parser.add_argument("--strict", action="store_true", help="exit 1 on WARN too")
    parser.add_argument(
        "--memory", type=guest_memory, default="1G", metavar="SIZE", help="guest memory to expect (default %(default)s)"
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Examine and print."""
    machine = gather(device=arguments.device)
    if arguments.device is not None and not machine.devices:
        raise MissingFeature(
            f"no vDPA device {arguments.device}", hint="vhost-vdpa list; vhost-vdpa doctor without DEV"
        )
    findings = examine(machine, GuestSize(arguments.memory))
    if arguments.json:
        import json  # noqa: PLC0415

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
