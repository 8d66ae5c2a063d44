# SPDX-License-Identifier: MIT
"""``vhost-vdpa doctor``."""

from __future__ import annotations

from ..base.errors import MissingFeature
from ..host.doctor import CREATE, NAMES, Finding, GuestSize, Level, by_level, examine, healthy, to_dict
from ..host.machine import gather
from .commands import columns
from .options import DEVICE, add_json
from .table import wrap
from .units import SIZES, guest_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from ..host.mgmt import VdpaDevice

_INDENT = " " * 27

EPILOG = f"""\
{SIZES}

examples:
  vhost-vdpa doctor                       the machine and all devices
  vhost-vdpa doctor vdpa0 --memory 16G    one device, and a guest of 16 GiB

exit status: 0 if nothing FAILs (with --strict: nothing WARNs either), else 1"""
DESCRIPTION = (
    "Check twenty things that people stumble over. Opens and changes nothing, works without root, "
    "without a device and in a container."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("device", metavar="DEV", nargs="?", help=f"{DEVICE} (default: all)")
    add_json(parser, "print JSON, schema pyvhostvdpa/host/doctor/1")
    parser.add_argument("--strict", action="store_true", help="exit 1 on WARN too")
    parser.add_argument(
        "--memory", type=guest_memory, default="1G", metavar="SIZE", help="guest memory to expect (default %(default)s)"
    )


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
        print(_render(findings, machine.devices, arguments.strict))
    return 0 if healthy(findings, arguments.strict) else 1


def _render(findings: Sequence[Finding], devices: Sequence[VdpaDevice], strict: bool) -> str:
    wide, found = columns(), by_level(list(findings))
    lines = [*_verdict(found, wide, strict), ""]
    for finding in findings:
        if finding.level is not Level.SKIP:
            # what passes of a check that does not pass as a whole is not counted as passed
            passes = finding.level is not Level.PASS or finding.id in found[Level.PASS]
            head = f"{finding.level.value if passes else '':<4} {finding.id} {NAMES[finding.id]:<17} "
            lines.append(wrap(finding.what, head, _INDENT, wide))
            if finding.level is not Level.PASS:
                lines += [wrap(finding.why, _INDENT, _INDENT, wide)] if finding.why else []
                lines += [wrap(finding.next, f"{_INDENT}next: ", f"{_INDENT}      ", wide)] if finding.next else []
    if found[Level.SKIP]:
        lines += ["", wrap(f"skipped: {' '.join(found[Level.SKIP])}", "", "", wide)]
    return "\n".join([*lines, "", f"next: {_next(findings, devices)}"])


def _verdict(found: Mapping[Level, Sequence[str]], wide: int, strict: bool) -> list[str]:
    failed, warned = found[Level.FAIL], found[Level.WARN]
    total = sum(map(len, found.values()))
    if failed:
        said = f"{_checks(len(failed), 'fails', 'fail')}, so vDPA or a migration will not work here: {_named(failed)}"
    elif warned:
        said = f"nothing fails, {_checks(len(warned), 'warns', 'warn')}: {_named(warned)}"
        said += "; that counts, by --strict" if strict else ""
    else:
        said = "nothing is in the way"
    words = ("failed", "warned", "for information", "passed", "skipped")
    counts = ", ".join(f"{len(ids)} {word}" for ids, word in zip(found.values(), words, strict=True))
    why = " (why: --json)" if found[Level.SKIP] else ""
    return [wrap(f"{said[0].upper()}{said[1:]}.", "", "", wide), wrap(f"{total} checks: {counts}{why}", "", "", wide)]


def _checks(number: int, one: str, many: str) -> str:
    return f"{number} check{'s' if number > 1 else ''} {many if number > 1 else one}"


def _named(ids: Sequence[str]) -> str:
    return ", ".join(f"{each} {NAMES[each]}" for each in ids)


def _next(findings: Sequence[Finding], devices: Sequence[VdpaDevice]) -> str:
    for level in (Level.FAIL, Level.WARN):
        for finding in findings:
            if finding.level is level and finding.next:
                return finding.next
    nodes = [device.chardev for device in devices if device.chardev]
    return f"vhost-vdpa probe {nodes[0]} --verify" if nodes else CREATE
