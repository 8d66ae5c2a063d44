"""`vhost-vdpa list` on a machine that has devices."""

from __future__ import annotations

import json
import subprocess

import lab


def test_list_tells_names_drivers_and_addresses(devices: tuple[str, str]) -> None:
    done = subprocess.run(["vhost-vdpa", "list", "--json"], capture_output=True, text=True, check=True)
    listed = json.loads(done.stdout)
    assert listed["schema"] == "pyvhostvdpa/list/1"
    assert listed["devices"] == [
        {
            "name": f"vdpa{number}",
            "chardev": device,
            "driver": "vhost_vdpa",
            "mgmtdev": "vdpasim_net",
            "virtio_id": 1,
            "mac": mac,
            "holders": [],
        }
        for number, (device, mac) in enumerate(zip(devices, lab.MACS, strict=True))
    ]


def test_the_table_shows_the_same(devices: tuple[str, str]) -> None:
    table = subprocess.run(["vhost-vdpa", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert table[0].split() == ["NAME", "CHARDEV", "DRIVER", "MGMTDEV", "VIRTIO-ID", "MAC", "HOLDER"]
    assert [line.split()[1] for line in table[1:]] == list(devices)
