"""The kernel's own virtio_net on two wired devices: frames cross, and what the driver sets is the device's state."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import hwsim
import lab
import pytest
from hwsim import Interface

SECONDS = int(os.environ.get("PYVHOSTVDPA_IPERF_SECONDS", "5"))
PAIRS = 4
NEAR, FAR = "10.9.0.1", "10.9.0.2"


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[Interface, Interface]]:
    with (
        hwsim.kernel_driver(),
        hwsim.interface("near", NEAR, PAIRS, wire="Y") as near,
        hwsim.interface("far", FAR, PAIRS, wire="Y") as far,
    ):
        assert near.sim.read("state")["peer"] == "far"
        yield near, far


@pytest.fixture
def near(ends: tuple[Interface, Interface]) -> Iterator[Interface]:
    """The end that a test changes. Whatever it did, no device saw a fault and the wire works."""
    near = ends[0]
    yield near
    assert [end.sim.read("state")["fault"] for end in ends] == ["", ""]
    assert ping(near) == 5


def ping(near: Interface, *options: str) -> int:
    """How many of 5 answers arrived."""
    output = near.run("ping", "-c", "5", "-i", "0.05", "-W", "10", *options, FAR)
    return int(output.split(" received")[0].rsplit(" ", 1)[1])


def carried(end: Interface) -> list[int]:
    """Packets transmitted by each pair in the device's own account."""
    stats = end.sim.read("stats")
    return [int(stats[f"vq{2 * pair + 1}.packets"]) for pair in range(PAIRS)]


def filtered(end: Interface) -> int:
    """Frames that arrived and were not for the driver."""
    stats = end.sim.read("stats")
    return sum(int(stats[f"vq{2 * pair}.filtered"]) for pair in range(PAIRS))


def vlans(end: Interface) -> set[int]:
    """The tags that the device lets through."""
    return {int(tag) for tag in end.sim.read("state")["vlans"].split(",") if tag}


@pytest.mark.smoke
def test_answers_come_through_the_devices(ends: tuple[Interface, Interface], near: Interface) -> None:
    before = [sum(carried(end)) for end in ends]
    assert ping(near) == 5
    assert [sum(carried(end)) - count >= 5 for end, count in zip(ends, before, strict=True)] == [True, True]


def test_the_largest_frames_fit(near: Interface) -> None:
    assert ping(near, "-s", "1472", "-M", "do") == 5


def test_bulk_traffic_both_ways_on_all_pairs(ends: tuple[Interface, Interface], near: Interface) -> None:
    """TCP checks what arrives, and iperf3 ends with an error if the connection does."""
    for end in ends:
        end.run("ethtool", "-L", "DEV", "combined", str(PAIRS))
    before = carried(near)
    with subprocess.Popen(ends[1].argv("iperf3", "-s", "-1"), stdout=subprocess.DEVNULL) as server:
        try:
            lab.wait_for(lambda: ":5201" in ends[1].run("ss", "-ltn"), "iperf3's server", 60)
            report = json.loads(near.run("iperf3", "-c", FAR, "-t", str(SECONDS), "-P", "4", "--bidir", "--json"))
            server.wait(60)
        finally:
            server.kill()
    for way in ("sum_received", "sum_received_bidir_reverse"):
        print(f"{way}: {report['end'][way]['bytes'] >> 20} MiB in {report['end'][way]['seconds']:.0f} s")
        assert report["end"][way]["seconds"] >= SECONDS
    assert [stream["receiver"]["bytes"] > 0 for stream in report["end"]["streams"]] == [True] * 8
    assert sum(count > old for count, old in zip(carried(near), before, strict=True)) > 1


@pytest.mark.parametrize("count", [3, 1, PAIRS])
def test_ethtool_sets_the_number_of_pairs(near: Interface, count: int) -> None:
    near.run("ethtool", "-L", "DEV", "combined", str(count))
    assert near.sim.read("state")["pairs"] == str(count)


def test_a_vlan_is_added_and_goes(ends: tuple[Interface, Interface], near: Interface) -> None:
    for end, address in zip(ends, ("10.9.5.1/24", "10.9.5.2/24"), strict=True):
        end.run("ip", "link", "add", "link", "DEV", "name", "tagged", "type", "vlan", "id", "5")
        end.run("ip", "address", "add", address, "dev", "tagged")
        end.run("ip", "link", "set", "tagged", "up")
    assert [5 in vlans(end) for end in ends] == [True, True]
    near.run("ping", "-c", "3", "-i", "0.05", "-W", "10", "10.9.5.2")
    before = filtered(ends[1])
    ends[1].run("ip", "link", "del", "tagged")
    assert 5 not in vlans(ends[1])
    # the far device has never heard of the tag any more: its filter takes the frames
    subprocess.run(near.argv("ping", "-c", "2", "-i", "0.05", "-W", "1", "10.9.5.2"), capture_output=True, check=False)
    assert filtered(ends[1]) > before
    near.run("ip", "link", "del", "tagged")
    assert 5 not in vlans(near)


def test_a_mac_address_is_set(near: Interface) -> None:
    near.run("ip", "link", "set", "DEV", "address", "52:54:91:00:00:77")
    assert near.sim.read("state")["mac"] == "52:54:91:00:00:77"


def test_the_carrier_follows_the_link(near: Interface) -> None:
    def carrier() -> str:
        return near.run("cat", f"/sys/class/net/{near.name}/carrier").strip()

    for link in "010":
        near.sim.write("link", link)
        lab.wait_for(lambda link=link: carrier() == link, f"carrier {link}")
    near.sim.write("link", 1)
    lab.wait_for(lambda: carrier() == "1", "carrier 1")
