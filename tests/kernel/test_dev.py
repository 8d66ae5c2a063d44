"""`vhost-vdpa dev`: devices are added and deleted, but never one that a process has open."""

from __future__ import annotations

import json

import lab
from test_doctor import AS_USER
from test_probe import held, vhost_vdpa


def names() -> list[str]:
    return [device["name"] for device in json.loads(vhost_vdpa("list", "--json").stdout)["devices"]]


def test_a_device_is_made_shown_and_deleted(devices: tuple[str, str]) -> None:
    made = vhost_vdpa(
        "dev", "add", "name", "extra", "mgmtdev", "vdpasim_net", "mac", "52:54:91:a1:b2:cc", "mtu", "9000"
    )
    assert made.returncode == 0, made.stderr
    lab.chardev("extra")
    [shown] = json.loads(vhost_vdpa("dev", "show", "extra", "--json").stdout)["devices"]
    assert shown["mac"] == "52:54:91:a1:b2:cc"
    assert shown["config"]["mtu"] == 9000
    assert "9000" in vhost_vdpa("dev", "show", "extra").stdout
    deleted = vhost_vdpa("dev", "del", "extra")
    assert deleted.returncode == 0, deleted.stderr
    assert names() == ["vdpa0", "vdpa1"]
    assert devices


def test_an_open_device_is_not_deleted_and_its_holder_named(devices: tuple[str, str]) -> None:
    with held(devices[0]) as pid:
        refused = vhost_vdpa("dev", "del", "vdpa0")
        assert refused.returncode == 1
        assert f"held by pid {pid}" in refused.stderr
        assert "hangs every 'vdpa' command" in refused.stderr
        assert "vdpa0" in names()


def test_a_holder_out_of_sight_protects_its_device_too(devices: tuple[str, str]) -> None:
    apart = ("unshare", "--pid", "--fork", "--mount-proc")
    with held(devices[0]):
        refused = vhost_vdpa("dev", "del", "vdpa0", prefix=apart)
        assert refused.returncode == 1
        assert "held by a process that is not visible from here" in refused.stderr
        assert "vdpa0" in names()


def test_dev_refused_by_kernel_names_the_next_step(devices: tuple[str, str]) -> None:
    assert devices
    for words, said, then in (
        (("add", "name", "vdpa0", "mgmtdev", "vdpasim_net"), "exists", "vhost-vdpa list"),
        (("add", "name", "x", "mgmtdev", "nowhere"), "No such device", "vdpa mgmtdev show"),
        (("add", "name", "x", "mgmtdev", "vdpasim_net", "max_vqp", "2"), "not supported", "vdpa mgmtdev show"),
        (("del", "nothing"), "No such device", "vdpa mgmtdev show"),
    ):
        refused = vhost_vdpa("dev", *words)
        assert refused.returncode == 1
        assert said in refused.stderr
        assert then in refused.stderr


def test_another_user_is_reported_what_it_takes(devices: tuple[str, str]) -> None:
    assert devices
    refused = vhost_vdpa("dev", "del", "vdpa1", prefix=AS_USER)
    assert refused.returncode == 1
    assert "next: run as root" in refused.stderr
