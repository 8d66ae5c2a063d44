"""What iproute2's vdpa says of a device's queues, as it is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvhostvdpa.base.errors import ManagementFailed
from pyvhostvdpa.host import mgmt
from pyvhostvdpa.host.mgmt import parse_vendor_statistics

SAID = """
0 {"vstats":{"vdpa0":{"queue_type":"rx","packets":12,"overruns":1}}}

1 {"vstats":{"vdpa0":{"queue_type":"tx","packets":7}}}
"""


def test_vendor_statistics_are_parsed_per_queue() -> None:
    assert parse_vendor_statistics(SAID, "vdpa0") == {0: {"packets": 12, "overruns": 1}, 1: {"packets": 7}}


def test_queue_without_statistics_is_left_out() -> None:
    said = SAID.replace('{"vdpa0":{"queue_type":"rx","packets":12,"overruns":1}}', "{}") + "\n2 \n3 not JSON\n"
    assert parse_vendor_statistics(said, "vdpa0") == {1: {"packets": 7}}


def test_another_devices_numbers_are_not_taken() -> None:
    assert parse_vendor_statistics(SAID, "vdpa1") == {}


# -- iproute2 that is slow, missing, or out of netlink's reach -----------------------------


def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = tmp_path / "vdpa"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_add_device_that_takes_too_long_names_the_limit_and_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path, monkeypatch, "exec sleep 30")
    with pytest.raises(ManagementFailed, match=r"no answer within 0\.3 s; the driver is slow") as failed:
        mgmt.add_device("vdpa9", "vdpasim_net", seconds=0.3)
    assert failed.value.hint == "give it more time: vhost-vdpa dev takes --timeout SECONDS"


def test_ask_without_an_answer_gives_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, "echo 'Failed to connect to vdpa Netlink' >&2; exit 1")
    monkeypatch.setattr(mgmt, "SYSFS_DEVICES", str(tmp_path))
    told, why = mgmt.ask("dev", "show")
    assert told == {}
    assert "Failed to connect to vdpa Netlink" in why
    assert "first network namespace" in why
    monkeypatch.setattr(mgmt, "SYSFS_DEVICES", str(tmp_path / "not there"))
    why = mgmt.ask("dev", "show")[1]
    assert "modprobe vdpa" in why
    assert "namespace" not in why
    tool(tmp_path, monkeypatch, "echo no json")
    assert "something else than JSON" in mgmt.ask("dev", "show")[1]
    tool(tmp_path, monkeypatch, "echo '{\"dev\":{}}'")
    assert mgmt.ask("dev", "show") == ({"dev": {}}, "")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "no 'vdpa' command" in mgmt.ask("dev", "show")[1]


def test_net_config_has_keys_without_the_blanks_of_iproute2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, """echo '{"config":{"vdpa0":{"mac":"52:54:00:00:00:0a","link ":"down"}}}'""")
    assert mgmt.net_config("vdpa0") == {"mac": "52:54:00:00:00:0a", "link": "down"}
