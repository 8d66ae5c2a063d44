# SPDX-License-Identifier: MIT
"""``vhost-vdpa dev``."""

from __future__ import annotations

from ..base.errors import MissingFeature
from ..host import mgmt
from .list import report_no_device
from .options import DEVICE, add_json, add_seconds
from .table import table

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

SCHEMA = "pyvhostvdpa/dev/1"
_ADD = "vhost-vdpa dev add name NAME mgmtdev MGMTDEV [mac MAC] [mtu MTU] [max_vqp N] [device_features BITS]"
EPILOG = """\
examples:
  vdpa mgmtdev show
  vhost-vdpa dev add name vdpa0 mgmtdev pci/0000:01:00.2 mac 52:54:91:a1:b2:c1 max_vqp 4
  vhost-vdpa dev show vdpa0
  vhost-vdpa dev del /dev/vhost-vdpa-0

exit status: 0; 1 if it was not done, with iproute2's words for why; 2 for wrong words"""
DESCRIPTION = (
    "The words of iproute2's 'vdpa dev', which does the work. Deleting a device that is open would "
    "hang every vdpa command; here it is refused, and the process that holds it is named."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser(
        "add",
        help="create a device",
        usage=f"{_ADD.replace(' [mac', chr(10) + ' ' * 8 + '[mac')}\n        [--timeout SECONDS]",
        epilog=EPILOG,
    )
    add.add_argument("words", nargs="+", metavar="WORD VALUE", help="as of iproute2's 'vdpa dev add'; in any order")
    _add_timeout(add)
    add.set_defaults(run=_add, parser=add)
    delete = actions.add_parser("del", help="delete a device that no process has open", epilog=EPILOG)
    delete.add_argument("name", metavar="DEV", help=DEVICE)
    _add_timeout(delete)
    delete.set_defaults(run=_delete, parser=delete)
    show = actions.add_parser("show", help="a device's management side: parent, queues, configuration", epilog=EPILOG)
    show.add_argument("name", metavar="DEV", nargs="?", help=f"{DEVICE} (default: all)")
    add_json(show, f"print JSON, schema {SCHEMA}")
    show.set_defaults(run=_show, parser=show)


def _add_timeout(parser: argparse.ArgumentParser) -> None:
    add_seconds(parser, "--timeout", mgmt.CHANGE_SECONDS, "how long the driver may take")


def _add(arguments: argparse.Namespace) -> int:
    words, wrong = arguments.words, arguments.parser.error
    keys, values = words[::2], words[1::2]
    missing = [key for key in ("name", "mgmtdev") if key not in keys]
    if missing:
        wrong(f"a device needs a name and a management device; no {missing[0]} here")
    if len(keys) > len(values):
        wrong(f"{keys[-1]} has no value")
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        wrong(f"{twice[0]} was given twice")
    given = dict(zip(keys, values, strict=True))
    rest = [word for pair in given.items() if pair[0] not in ("name", "mgmtdev") for word in pair]
    mgmt.add_device(given["name"], given["mgmtdev"], *rest, seconds=arguments.timeout)
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    # only this action opens a device, and the door takes long to load
    from ..chardev.door import can_be_opened  # noqa: PLC0415

    mgmt.delete_device(mgmt.vdpa_name(arguments.name), can_be_opened, arguments.timeout)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from ..host.machine import gather  # noqa: PLC0415

    machine = gather(device=arguments.name)
    if arguments.name is not None and not machine.devices:
        raise MissingFeature(f"no vDPA device {arguments.name}", hint="vhost-vdpa list")
    shown = [{**device.to_dict(), "config": dict(machine.net.get(device.name, {}))} for device in machine.devices]
    if arguments.json:
        import json  # noqa: PLC0415

        print(json.dumps({"schema": SCHEMA, "devices": shown}, indent=2))
        return 0
    if shown:
        print("\n\n".join(_render(device) for device in shown))
    else:
        report_no_device()
    return 0


def _render(device: dict[str, Any]) -> str:
    own = {key: value for key, value in device.items() if key not in ("holders", "config", "name")}
    # the management side and the configuration both have the MAC address: once is enough where they agree
    config = {key: value for key, value in device["config"].items() if own.get(key) != value}
    rows = [[key, str(value or "-")] for key, value in own.items()]
    rows += [[key, str(value)] for key, value in config.items()]
    return table([str(device["name"]), ""], rows)
