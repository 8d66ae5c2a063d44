"""The names that `vhost-vdpa list` prints mean their devices to every command."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import lab
import pytest

from pyvhostvdpa.cli import main
from pyvhostvdpa.host import mgmt

QUICK = ("--memory", "32M", "--downtime", "10000", "--seconds", "1.5")


def vhost_vdpa(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["vhost-vdpa", *words], capture_output=True, text=True, check=False)


def listed() -> list[dict[str, str]]:
    devices: list[dict[str, str]] = json.loads(vhost_vdpa("list", "-j").stdout)["devices"]
    return devices


def names_of(device: dict[str, str]) -> tuple[str, str, str]:
    """Its vDPA name, its node, and the node's last part."""
    return device["name"], device["chardev"], os.path.basename(device["chardev"])


def test_every_name_of_a_device_resolves_to_it(devices: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: a start of the command takes seconds here, and there would be one for each."""
    for device, node in zip(listed(), devices, strict=True):
        for name in names_of(device):
            assert mgmt.chardev_of(name) == node
            assert mgmt.vdpa_name(name) == device["name"]
            capsys.readouterr()
            assert main(["dev", "show", name, "-j"]) == 0
            shown = json.loads(capsys.readouterr().out)["devices"]
            assert [each["name"] for each in shown] == [device["name"]]
            assert main(["probe", name, "--no-open"]) == 0
            main(["doctor", name])
            assert "no vDPA device" not in capsys.readouterr().err


def test_migrate_and_ladder_take_names(devices: tuple[str, str]) -> None:
    assert devices
    source, destination = listed()
    done = vhost_vdpa("migrate", source["name"], os.path.basename(destination["chardev"]), *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["environment"]["devices"]["source"]["path"] == source["chardev"]
    row = ("--rows", "ours", "--pairs", "1", "--memory", "32M", "--json")
    done = vhost_vdpa("ladder", "--on", source["name"], destination["name"], *row)
    assert done.returncode == 0, done.stderr


def test_send_and_receive_take_names(devices: tuple[str, str], tmp_path: Path) -> None:
    assert devices
    source, destination = listed()
    there = f"unix:{tmp_path}/there"
    receiving = ["vhost-vdpa", "receive", destination["name"], "--listen", there, "--seconds", "1", "--json"]
    with subprocess.Popen(receiving, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as other:
        lab.wait_for((tmp_path / "there").exists, "the listener")
        sent = vhost_vdpa("send", os.path.basename(source["chardev"]), "--to", there, *QUICK)
        out, said = other.communicate(timeout=120)
    assert sent.returncode == 0, sent.stderr
    assert other.returncode == 0, said
    assert json.loads(out)["frames"]["lost"] == 0
    assert "to send" in sent.stderr or "not known yet" in sent.stderr


def test_send_without_a_listener_opens_no_device(devices: tuple[str, str], tmp_path: Path) -> None:
    begin = time.monotonic()
    done = vhost_vdpa("send", devices[0], "--to", f"unix:{tmp_path}/none", "--memory", "32M", "--seconds", "60")
    assert done.returncode == 1
    assert time.monotonic() - begin < 30
    assert "traffic" not in done.stderr
    assert "vhost-vdpa receive DEV --listen" in done.stderr


def test_dev_del_takes_the_path_that_dev_show_takes(devices: tuple[str, str]) -> None:
    assert devices
    assert vhost_vdpa("dev", "add", "name", "extra", "mgmtdev", "vdpasim_net").returncode == 0
    path = lab.chardev("extra")
    shown = vhost_vdpa("dev", "show", path)
    assert shown.returncode == 0, shown.stderr
    assert all(line == line.rstrip() for line in shown.stdout.splitlines())
    config = json.loads(vhost_vdpa("dev", "show", path, "-j").stdout)["devices"][0]["config"]
    assert [key for key in config if key != key.strip()] == []
    assert sum(line.startswith("mac") for line in shown.stdout.splitlines()) == 1
    deleted = vhost_vdpa("dev", "del", path)
    assert deleted.returncode == 0, deleted.stderr
    assert [device["name"] for device in listed()] == ["vdpa0", "vdpa1"]


@pytest.mark.parametrize("name", ["a b", "a/b"])
def test_a_name_that_nothing_can_handle_makes_no_device(devices: tuple[str, str], name: str) -> None:
    assert devices
    refused = vhost_vdpa("dev", "add", "name", name, "mgmtdev", "vdpasim_net")
    assert refused.returncode == 1
    assert "not a usable name" in refused.stderr
    assert [device["name"] for device in listed()] == ["vdpa0", "vdpa1"]


def receive_with(limit: str, value: int, device: str, folder: Path) -> tuple[int, str]:
    """Receive a guest under a limit; its status, and what it said. A source comes if it listens."""
    there = folder / f"there-{limit}-{value}"
    with subprocess.Popen(
        [
            "prlimit",
            f"--{limit}={value}:{value}",
            "vhost-vdpa",
            "receive",
            device,
            "--listen",
            f"unix:{there}",
            "--seconds",
            "0.5",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stderr is not None
        for line in other.stderr:
            if "waiting for a source" in line:
                subprocess.run(
                    ["vhost-vdpa", "send", lab.DEVICES[0], "--to", f"unix:{there}", *QUICK[:2], "--seconds", "0.3"],
                    capture_output=True,
                    check=False,
                )
                break
        time.sleep(0.2)
        if there.exists():
            other.terminate()
        return other.wait(60), other.stderr.read()


@pytest.mark.parametrize(
    ("limit", "value"),
    [("nofile", most) for most in (8, 12, 14, 16, 18, 20, 22)]
    + [("as", mebibytes << 20) for mebibytes in (48, 80, 100, 120, 150)],
)
def test_receive_at_its_limits_has_no_traceback(
    devices: tuple[str, str], tmp_path: Path, limit: str, value: int
) -> None:
    status, said = receive_with(limit, value, devices[1], tmp_path)
    assert "Traceback" not in said
    assert status in (0, 1, 130, -15), said
    lab.wait_for(lambda: not any(map(mgmt.holders, devices)), "both sides to close the device")


def test_a_migration_whose_reader_of_progress_left_continues(devices: tuple[str, str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        ["vhost-vdpa", "migrate", *devices, *QUICK, "--json"], stdout=subprocess.PIPE, stderr=write, check=False
    )
    os.close(write)
    assert done.returncode == 0
    assert json.loads(done.stdout)["outcome"] == "migrated"
