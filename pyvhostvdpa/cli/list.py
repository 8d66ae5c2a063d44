# SPDX-License-Identifier: MIT
"""``vhost-vdpa list``."""

from __future__ import annotations

import os

from ..host.mgmt import SYSFS_DEVICES, list_devices
from ..host.parents import parent_of, unserved
from .failure import report
from .options import add_json
from .table import table

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ..host.mgmt import VdpaDevice

SCHEMA = "pyvhostvdpa/list/1"
EPILOG = """\
examples:
  vhost-vdpa list             a table; '-' where something is not known
  vhost-vdpa list -j | jq -r '.devices[].chardev'

exit status: 0, also if there is no device"""
DESCRIPTION = "List vDPA devices: name, node, driver, and the process that has it open. Opens none of them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_json(parser, f"print JSON, schema {SCHEMA}")


def run(arguments: argparse.Namespace) -> int:
    """Print the devices."""
    devices = list_devices()
    if arguments.json:
        import json  # noqa: PLC0415

        print(json.dumps({"schema": SCHEMA, "devices": [device.to_dict() for device in devices]}, indent=2))
        return 0
    if not devices:
        report_no_device()
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
        report(f"{concerned}: management device, type, MAC and link are unknown: {why}")
    if not all(device.holders or device.holders_known for device in devices):
        report("holders are unknown: not every process can be seen from here; run as root on the host")
    for device in devices:
        if device.chardev and (wrong := unserved(device.name, parent_of(device.chardev))):
            report(f"{device.name}: {wrong[0]}; next: {wrong[1]}")


def report_no_device() -> None:
    """Report that there is no device, why, and the next command."""
    if os.path.isdir(SYSFS_DEVICES):
        report("no vDPA device; next: vdpa mgmtdev show, then vdpa dev add name vdpa0 mgmtdev NAME")
    else:
        report("this kernel has no vDPA bus loaded; next: modprobe vhost_vdpa")
