# SPDX-License-Identifier: MIT
"""``vhost-vdpa list``."""

from __future__ import annotations

from ..host.mgmt import SYSFS_DEVICES, list_devices
from .commands import COMMANDS
from .failure import report
from .options import add_json
from .table import table

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

SCHEMA = "pyvhostvdpa/list/1"
_EPILOG = """\
examples:
  vhost-vdpa list             a table; '-' where something is not known
  vhost-vdpa list -j | jq -r '.devices[].chardev'

exit status: 0, also if there is no device"""


def register(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "list",
        help=COMMANDS["list"],
        description="List vDPA devices: name, node, driver, and the process that has it open. Opens none of them.",
        epilog=_EPILOG,
    )
    add_json(parser, f"print JSON, schema {SCHEMA}")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the devices."""
    devices = list_devices()
    if arguments.json:
        import json  # noqa: PLC0415

        print(json.dumps({"schema": SCHEMA, "devices": [device.to_dict() for device in devices]}, indent=2))
        return 0
    if not devices:
        _explain_empty()
        return 0
    rows = [
        [
            device.name,
            device.chardev or "-",
            device.driver or "-",
            device.mgmtdev or "-",
            "-" if device.virtio_id is None else str(device.virtio_id),
            device.mac or "-",
            ", ".join(str(holder) for holder in device.holders) or "-",
        ]
        for device in devices
    ]
    print(table(["NAME", "CHARDEV", "DRIVER", "MGMTDEV", "VIRTIO-ID", "MAC", "HOLDER"], rows))
    return 0


def _explain_empty() -> None:
    if SYSFS_DEVICES.is_dir():
        report("no vDPA device; next: vdpa mgmtdev show, then vdpa dev add name vdpa0 mgmtdev NAME")
    else:
        report("this kernel has no vDPA bus loaded; next: modprobe vhost_vdpa")
