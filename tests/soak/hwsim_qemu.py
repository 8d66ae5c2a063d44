# lab: --devices vdpa_sim_net:2 --devices vdpa_hwsim:0
"""QEMU gives a vdpa_hwsim device to a guest, whose firmware (iPXE) asks a DHCP server at the wire's other end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernel"))

import hwsim
import lab
import pytest

ADDRESS, FIRST, LAST = "10.9.0.1", "10.9.0.50", "10.9.0.60"


def qemu(chardev: str, mac: bytes, shadow: str) -> list[str]:
    return [
        *("prlimit", "--memlock=unlimited", "qemu-system-x86_64", "-nodefaults", "-display", "none"),
        *("-machine", "q35", "-accel", "tcg", "-m", "64"),
        *("-netdev", f"vhost-vdpa,id=net,vhostdev={chardev},x-svq={shadow}"),
        *("-device", f"virtio-net-pci,netdev=net,mac={mac.hex(':')},bootindex=0"),
    ]


@pytest.mark.parametrize("shadow", ["off", "on"])
def test_a_guest_gets_its_address(tmp_path: Path, shadow: str) -> None:
    """iPXE polls and wants no interrupts; shadow virtqueues of QEMU's own want them."""
    leases = tmp_path / "leases"
    sim = hwsim.add("guest", wire="Y")
    try:
        with hwsim.kernel_driver(), hwsim.interface("server", ADDRESS, wire="Y") as server:
            server_argv = server.argv(
                *("dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--user=root", "--pid-file="),
                *(f"--interface={server.name}", "--bind-interfaces", f"--dhcp-range={FIRST},{LAST},1h"),
                *("--dhcp-authoritative", "--no-ping", f"--dhcp-leasefile={leases}"),
            )
            with (
                (tmp_path / "log").open("w+") as log,
                subprocess.Popen(server_argv, stdout=log, stderr=log) as dnsmasq,
                subprocess.Popen(qemu(sim.chardev, sim.mac, shadow), stdout=log, stderr=log) as guest,
            ):
                try:
                    lab.wait_for(
                        lambda: guest.poll() is not None or (leases.exists() and leases.read_text()), "a lease", 300
                    )
                finally:
                    for process in (guest, dnsmasq):
                        process.terminate()
                guest.wait(30)
                log.seek(0)
                said = log.read()
            assert leases.exists(), said
            _, mac, address, *_ = leases.read_text().split()
            assert (mac, address.rsplit(".", 1)[0]) == (sim.mac.hex(":"), ADDRESS.rsplit(".", 1)[0])
            stats = sim.read("stats")
            assert int(stats["vq1.packets"]) >= 2, "DHCPDISCOVER and DHCPREQUEST"
            assert (int(stats["vq1.calls"]) > 0) == (shadow == "on")
            assert [end.read("state")["fault"] for end in (sim, server.sim)] == ["", ""]
            assert sim.read("state")["status"] == "0x00"
    finally:
        hwsim.remove(sim.name)
