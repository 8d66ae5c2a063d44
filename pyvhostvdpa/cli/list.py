# SPDX-License-Identifier: MIT
"""``vhost-vdpa list``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..host.mgmt import SYSFS_DEVICES, VdpaDevice, list_devices
from ..host.parents import parent_of, unserved
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
            "-" if device.link_up is None else "up" if device.link_up else "down",
            ", ".join(str(holder) for holder in device.holders) or ("-" if device.holders_known else "unknown"),
        ]
        for device in devices
    ]
    print(table(["NAME", "CHARDEV", "DRIVER", "MGMTDEV", "VIRTIO-ID", "MAC", "LINK", "HOLDER"], rows))
    _explain(devices)
    return 0


def _explain(devices: Sequence[VdpaDevice]) -> None:
    """Say why fields are unknown, and which device nothing answers for."""
    for why in dict.fromkeys(device.unknown for device in devices if device.unknown):
        concerned = ", ".join(device.name for device in devices if device.unknown == why)
        print(f"{concerned}: management device, type, MAC and link are unknown: {why}", file=sys.stderr)
    if not all(device.holders or device.holders_known for device in devices):
        print("holders are unknown: not every process can be seen from here; run as root on the host", file=sys.stderr)
    for device in devices:
        if device.chardev and (wrong := unserved(device.name, parent_of(device.chardev))):
            print(f"{device.name}: {wrong[0]}; next: {wrong[1]}", file=sys.stderr)


def _explain_empty() -> None:
    if SYSFS_DEVICES.is_dir():
        print("no vDPA device; next: vdpa mgmtdev show, then vdpa dev add name vdpa0 mgmtdev NAME", file=sys.stderr)
    else:
        print("this kernel has no vDPA bus loaded; next: modprobe vhost_vdpa", file=sys.stderr)
