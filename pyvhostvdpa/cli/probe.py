# SPDX-License-Identifier: MIT
"""``vhost-vdpa probe``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..base.uapi import BackendFeature, names
from ..host import mgmt
from ..probe.probe import Probe, look, probe
from ..probe.proofs import MUST_MOVE_S
from .commands import columns
from .failure import report
from .options import DEVICE, add_json, add_seconds
from .table import table, wrap

DESCRIPTION = """\
Print what a device is and can do: queues, groups, address spaces, features, and what they make possible for a live
migration. Opening a device resets it, so one that is in use is refused; --no-open prints what is known without opening
it. --verify proves each backend feature with real descriptors: maps that a frame goes through, a suspend after which
nothing moves. It sends a few broadcast frames (EtherType 0x88b5). Afterwards the device is reset."""
EPILOG = """\
examples:
  vhost-vdpa probe vdpa0 --no-open      of a device in use
  vhost-vdpa probe vdpa0 --verify       advertised, usable, proved
  vhost-vdpa probe vdpa0 -j > vdpa0.json

exit status: 0; 1 if something failed, or if --verify found a feature that does not do what it says"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("device", metavar="DEV", nargs="?", help=f"{DEVICE} (default: the only device)")
    add_json(parser, "print JSON, schema pyvhostvdpa/probe/probe/1")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--verify", action="store_true", help="prove each feature with real descriptors")
    mode.add_argument("--no-open", action="store_true", help="print only what is known without opening the device")
    finish = "with --verify: how long a device may take to finish a descriptor"
    add_seconds(parser, "--patience", MUST_MOVE_S, finish)


def run(arguments: argparse.Namespace) -> int:
    """Probe and print."""
    path = mgmt.chardev_of(arguments.device)
    if arguments.no_open:
        _print_look(look(path), arguments.json)
        return 0
    found = probe(path, arguments.verify, arguments.patience)
    lies = found.lies()
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print(_render(found))
    for lie in lies:
        report(f"vhost-vdpa: {path} advertises what it does not do: {lie}")
    return 1 if lies else 0


def _print_look(told: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(told, indent=2))
        return
    device = told["device"]
    rows = [[key, str(device[key] or "-")] for key in ("name", "chardev", "driver", "mgmtdev", "mac")]
    rows.append(["holders", ", ".join(f"pid {h['pid']} ({h['name']})" for h in device["holders"]) or "none"])
    rows += [[key, str(told[key] or "-")] for key in ("virtio_id", "vqs_count", "vring_num", "negotiated_features")]
    rows.append(["link", _link(device["link_up"])])
    print(table(["not opened", ""], rows))
    if device["unknown"]:
        print(f"\nunknown: management device, type, MAC and link: {device['unknown']}")
    if told["unserved"]:
        print(f"\n{device['name']}: {told['unserved']}")
    print("\nBackend features, groups and address spaces are known only once the device is opened.")


def _render(found: Probe) -> str:
    return "\n\n".join(
        [_verdict(found), _facts(found), _features(found), _backend(found), _enables(found), _next(found)]
    )


def _facts(found: Probe) -> str:
    config = found.config
    first, last = found.iova_range
    sizes = f"at most {found.vring_num}" if found.vring_sizes is None else " ".join(map(str, found.vring_sizes))
    rows = [
        ["device", f"{found.device.name} {found.device.chardev}"],
        ["parent", f"{found.parent.module or 'unknown'}, {found.parent.memory}"],
        ["virtio id", str(found.virtio_id)],
        ["status after opening", names(found.status)],
        ["MAC, MTU, link", f"{config.mac or '-'}, {config.mtu or '-'}, {_link(config.link_up)}"],
        ["virtqueues", f"{found.vqs_count}, control queue {_or_none(found.control_queue)}; ring size {sizes}"],
        ["groups", f"{found.group_num}; by queue: {_or_none(found.vring_groups)}"],
        ["descriptor groups", _or_none(found.vring_desc_groups)],
        ["address spaces", f"{found.as_num}; IOVA {first:#x}-{last:#x}"],
        ["IOTLB entries", f"at most {found.parent.max_iotlb_entries or '?'} per address space"],
    ]
    return "\n".join(f"{name:<21} {text}" for name, text in rows)


def _link(up: bool | None) -> str:
    return "-" if up is None else "up" if up else "down"


def _or_none(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)


def _features(found: Probe) -> str:
    lines = [f"{'device features':<21} {found.features:#x} {names(found.features)}"]
    if refused := found.features & ~found.accepted:
        lines.append(f"{'not accepted':<21} {names(refused)}")
    return "\n".join(lines)


def _backend(found: Probe) -> str:
    backend = found.backend
    rows = []
    for feature in BackendFeature:
        name = feature.name or ""
        usable = feature in backend.usable
        proved = "-" if backend.proved is None or not usable else "yes" if feature in backend.proved else "NO"
        advertised = feature in backend.advertised
        rows.append([name, _yes(advertised), _yes(usable), proved, backend.why.get(name, "")])
    return table(["BACKEND FEATURE", "ADVERTISED", "USABLE", "PROVED", "WHY"], rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _enables(found: Probe) -> str:
    rows = [[name, _yes(answer.yes), answer.why] for name, answer in found.enables().items()]
    return table(["FOR A MIGRATION", "", "WHY"], rows)


def _verdict(found: Probe) -> str:
    blockers, lies = found.blockers(), found.lies()
    name = f"{found.device.chardev} ({found.device.name})"
    if blockers:
        return "\n".join([f"A guest on {name} cannot be migrated:", *(f"  - {each}" for each in blockers)])
    by = (
        "by what it advertises; nothing was tried"
        if found.backend.proved is None
        else "and what it advertises was tried"
    )
    if lies:
        by = f"but {len(lies)} of the features it advertises do not work"
    return wrap(f"A guest on {name} can be migrated, {by}.", "", "", columns())


def _next(found: Probe) -> str:
    if found.blockers():
        return "next: vhost-vdpa help hardware (what a device needs)"
    if found.backend.proved is None:
        return f"next: vhost-vdpa probe {found.device.chardev} --verify"
    return f"next: vhost-vdpa bench map {found.device.chardev}, or vhost-vdpa migrate {found.device.chardev} OTHER"
