"""The command line of ``vhost-vdpa serve``: what it prints, which peers it accepts, what it refuses."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from door_double import OFFERED, DoorDouble
from vhost_front_end import FrontEnd

from pyvhostvdpa.base.errors import VhostVdpaError
from pyvhostvdpa.cli import serve as module
from pyvhostvdpa.cli.commands import run
from pyvhostvdpa.host import mgmt

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def device(doors: list[DoorDouble], monkeypatch: pytest.MonkeyPatch) -> str:
    """A device double that the command line finds."""
    doors.append(DoorDouble(OFFERED))
    monkeypatch.setattr(mgmt, "chardev_of", lambda name: f"/dev/{name}")
    return "vdpa0"


def test_print_capabilities_and_print_descriptor_describe_the_backend(capsys: Capture) -> None:
    assert run(["serve", "--print-capabilities"]) == 0
    assert json.loads(capsys.readouterr().out) == {"type": "net"}
    assert run(["serve", "--print-descriptor"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["type"] == "net"
    assert os.path.isabs(found["binary"])


def test_explain_gives_the_reason_for_each_feature(device: str, doors: list[DoorDouble], capsys: Capture) -> None:
    assert run(["serve", device, "--explain", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["devices"]
    offered = {each["name"]: each["offered"] for each in found["features"]}
    assert offered["VERSION_1"]
    assert not offered["RING_RESET"]
    assert all(each["why"] for each in found["features"] + found["protocol_features"])
    doors.append(DoorDouble(OFFERED))
    assert run(["serve", device, "--explain"]) == 0
    assert "RING_RESET" in capsys.readouterr().out


def test_a_feature_is_left_out_by_its_name(device: str, capsys: Capture) -> None:
    assert run(["serve", device, "--explain", "--json", "--without", "mq"]) == 0
    [found] = json.loads(capsys.readouterr().out)["devices"]
    [mq] = [each for each in found["features"] if each["name"] == "MQ"]
    assert not mq["offered"]
    assert found["pairs"] == 1


def test_user_mode_linux_is_offered_the_devices_configuration_and_no_control_queue(
    device: str, capsys: Capture
) -> None:
    assert run(["serve", device, "--explain", "--json", "--front-end", "uml"]) == 0
    [found] = json.loads(capsys.readouterr().out)["devices"]
    offered, spoken = (
        {each["name"] for each in found[kind] if each["offered"]} for kind in ("features", "protocol_features")
    )
    assert {"MAC", "VERSION_1"} <= offered
    assert not {"CTRL_VQ", "MQ", "GUEST_ANNOUNCE", "STATUS"} & offered
    assert {"CONFIG", "BACKEND_REQ"} <= spoken
    assert found["pairs"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "DEV is missing"),
        (["vdpa0"], "--socket-path is missing"),
        (["vdpa0", "vdpa1", "--socket-path", "/run/a"], "1 of --socket-path for 2 devices"),
        (["vdpa0", "--client"], "--client needs --socket-path"),
        (["vdpa0", "--fd", "3", "--fd", "4"], "2 sockets for 1 devices"),
        (["vdpa0", "--socket-path", "/run/a", "--without", "nothing"], "--without nothing: one of"),
    ],
)
def test_wrong_usage_is_reported(device: str, words: list[str], said: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["serve", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_template_names_a_socket_for_each_device() -> None:
    arguments = SimpleNamespace(devices=["vdpa0", "/dev/vhost-vdpa-1"], socket_path=["/run/{}.sock"], client=False)
    doors = module._doors(arguments)  # type: ignore[arg-type]
    assert [path for _, path in doors] == ["/run/vdpa0.sock", "/run/vhost-vdpa-1.sock"]


def test_descriptor_that_is_not_a_socket_is_refused(device: str, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(VhostVdpaError, match="is not a socket"):
        run(["serve", device, "--fd", str(file.fileno())])


def test_status_without_a_server_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(VhostVdpaError, match="no server answers"):
        run(["serve", "--status", str(tmp_path / "s")])


def test_sockets_of_systemd_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "2")
    assert module._systemd_fds() == [3, 4]
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    assert module._systemd_fds() == []


def test_serve_runs_until_sigterm_and_notifies_systemd(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    path, notify = str(tmp_path / "net.sock"), str(tmp_path / "notify")
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(notify)
    told.settimeout(10)
    monkeypatch.setenv("NOTIFY_SOCKET", notify)
    status: list[dict[str, Any]] = []
    frozen: list[int] = []

    def front_end() -> None:
        assert told.recv(100) == b"READY=1"
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        connection.connect(path)
        front = FrontEnd(connection)
        front.connect()
        front.start()
        status.append(module._ask_status(path))
        frozen.append(gc.get_freeze_count())
        front.close()
        while module._ask_status(path)["front_end"]:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=front_end)
    thread.start()
    assert run(["serve", device, "--socket-path", path, "--json"]) == 0
    thread.join()
    told.close()
    assert status[0]["state"] == "passthrough"
    assert status[0]["schema"] == "pyvhostvdpa/serve/1"
    events = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert events[0] == "serving"
    assert {"connected", "running", "disconnected"} <= set(events)
    assert not os.path.exists(path)
    assert not os.path.exists(path + ".status")
    # what the modules are made of is not looked at while a guest waits
    assert frozen[0] > 10_000
    assert gc.get_freeze_count() == 0


FAILING: list[tuple[str, dict[str, Any]]] = [
    ("connected", {"pid": 7}),
    ("device-failed", {"error": "3520 entries, 2048 are allowed"}),
    ("refused", {"request": "SET_STATUS"}),
    ("disconnected", {"why": "SET_STATUS"}),
]


def told(capsys: Capture) -> list[str]:
    return [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]


def test_a_front_end_that_fails_each_second_is_told_once(capsys: Capture) -> None:
    tell = module._Teller(as_json=True).of("vdpa0")
    for _ in range(5):
        for event, fields in FAILING:
            tell(event, fields)
    assert told(capsys) == [event for event, _ in FAILING]
    # the device can be started now
    tell("connected", {"pid": 7})
    tell("running", {"mode": "passthrough"})
    tell("disconnected", {"why": "SET_STATUS"})
    assert told(capsys) == ["failed-again", "connected", "running", "disconnected"]
    for event, fields in FAILING:
        tell(event, fields)
    assert told(capsys) == [event for event, _ in FAILING]


def test_another_failure_and_another_front_end_are_told(capsys: Capture) -> None:
    tell = module._Teller(as_json=True).of("vdpa0")
    for event, fields in FAILING:
        tell(event, fields)
    for event, fields in [("connected", {"pid": 8}), *FAILING[1:]]:
        tell(event, fields)
    assert told(capsys) == [event for event, _ in FAILING] * 2
    # one that leaves by itself
    tell("connected", {"pid": 8})
    tell("disconnected", {"why": "the front-end closed the connection"})
    assert told(capsys) == ["connected", "disconnected"]


def test_sessions_that_go_well_are_all_told(capsys: Capture) -> None:
    tell = module._Teller(as_json=False).of("vdpa0")
    for _ in range(3):
        tell("connected", {"pid": 7})
        tell("disconnected", {"why": "left"})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[0].endswith("vdpa0: connected: pid 7")
