# SPDX-License-Identifier: MIT
"""``vhost-vdpa list``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..host.mgmt import SYSFS_DEVICES, list_devices
from .table import table

SCHEMA = "pyvhostvdpa/list/1"


def register(commands: Any) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "list", help="the vDPA devices of this machine", description="List vDPA devices. Opens none of them."
    )
    parser.add_argument("--json", "-j", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the devices."""
    devices = list_devices()
    if arguments.json:
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
        print("no vDPA device; next: vdpa mgmtdev show, then vdpa dev add name vdpa0 mgmtdev NAME", file=sys.stderr)
    else:
        print("this kernel has no vDPA bus loaded; next: modprobe vhost_vdpa", file=sys.stderr)
