# SPDX-License-Identifier: MIT
"""``vhost-vdpa dev``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..base.errors import MissingFeature
from ..chardev.door import can_be_opened
from ..host import mgmt
from ..host.machine import gather
from .table import table
from .units import seconds

SCHEMA = "pyvhostvdpa/dev/1"
_ADD = "vhost-vdpa dev add name NAME mgmtdev MGMTDEV [mac MAC] [mtu MTU] [max_vqp N] [device_features BITS]"


def register(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "dev",
        help="create, delete and show devices",
        description="The words of iproute2's 'vdpa dev', which does the work. Deleting a device that somebody has "
        "open would hang every vdpa command; here it is refused, with the holder named.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="create a device", usage=_ADD)
    add.add_argument("words", nargs="+", metavar="WORD VALUE")
    _add_timeout(add)
    add.set_defaults(run=_add)
    delete = actions.add_parser("del", help="delete a device that nobody has open")
    delete.add_argument("name", metavar="NAME")
    _add_timeout(delete)
    delete.set_defaults(run=_delete)
    show = actions.add_parser("show", help="a device's management side: parent, queues, configuration")
    show.add_argument("name", metavar="NAME", nargs="?")
    show.add_argument("--json", "-j", action="store_true", help="print JSON")
    show.set_defaults(run=_show)


def _add_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=str(mgmt.CHANGE_SECONDS),
        help="how long the driver may take (default %(default)s)",
    )


def _add(arguments: argparse.Namespace) -> int:
    words = arguments.words
    given = dict(zip(words[::2], words[1::2], strict=False))
    if len(words) % 2 or not {"name", "mgmtdev"} <= given.keys():
        raise MissingFeature("dev add: a device needs a name and a management device", hint=_ADD)
    rest = [word for pair in given.items() if pair[0] not in ("name", "mgmtdev") for word in pair]
    mgmt.add_device(given["name"], given["mgmtdev"], *rest, seconds=arguments.timeout)
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    mgmt.delete_device(arguments.name, can_be_opened, arguments.timeout)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    machine = gather(device=arguments.name)
    if arguments.name is not None and not machine.devices:
        raise MissingFeature(f"no vDPA device {arguments.name}", hint="vhost-vdpa list")
    shown = [{**device.to_dict(), "config": dict(machine.net.get(device.name, {}))} for device in machine.devices]
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, "devices": shown}, indent=2))
        return 0
    for device in shown:
        rows = [[key, str(value or "-")] for key, value in device.items() if key not in ("holders", "config", "name")]
        rows += [[key.strip(), str(value)] for key, value in device["config"].items()]
        print(table([str(device["name"]), ""], rows))
    return 0
