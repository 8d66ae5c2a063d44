"""`vhost-vdpa list` on a machine that has devices."""

from __future__ import annotations

import json
import subprocess

import hwsim
import lab
from hw_guest import HwGuest

from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.host import mgmt
from pyvhostvdpa.net.features import CONTROL, SUPPORTED


def test_list_prints_names_drivers_and_addresses(fresh: tuple[str, str]) -> None:
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
            "link_up": True,
            "holders_known": True,
            "unknown": None,
        }
        for number, (device, mac) in enumerate(zip(fresh, lab.MACS, strict=True))
    ]


def test_the_table_shows_the_same(devices: tuple[str, str]) -> None:
    table = subprocess.run(["vhost-vdpa", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert table[0].split() == ["NAME", "CHARDEV", "DRIVER", "MGMTDEV", "VIRTIO-ID", "MAC", "LINK", "HOLDER"]
    assert [line.split()[1] for line in table[1:]] == list(devices)


def test_the_statistics_of_all_queues_are_the_devices_own() -> None:
    sim = hwsim.add("hw0", 2)
    try:
        guest = HwGuest(sim, 2, SUPPORTED | CONTROL, BackendFeature(0))
        try:
            guest.start()
            guest.use_all_pairs()
            guest.traffic.run()
            guest.receives(50)
            guest.settle()
            told = mgmt.vendor_statistics(sim.chardev, range(4))
            stats = sim.read("stats")
        finally:
            guest.close()
        assert [told[queue]["packets"] for queue in range(4)] == [int(stats[f"vq{n}.packets"]) for n in range(4)]
        assert mgmt.vendor_statistics(sim.chardev, [0]) == {}, "none before FEATURES_OK"
    finally:
        hwsim.remove("hw0")
