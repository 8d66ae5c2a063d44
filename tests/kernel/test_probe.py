"""`vhost-vdpa probe`: its output is what the device does."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import pytest

from pyvhostvdpa import BackendFeature, DeviceBusy, KernelError, Status, VhostVdpa
from pyvhostvdpa.cli import main
from pyvhostvdpa.probe.probe import Probe, probe

HOLD = (
    "import sys, time; from pyvhostvdpa import VhostVdpa; d = VhostVdpa(sys.argv[1]);"
    "print('held', flush=True); time.sleep(60)"
)


def vhost_vdpa(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command: in this process, or in a new one (slow here) if ``prefix`` changes the user or namespace."""
    if prefix:
        return subprocess.run([*prefix, "vhost-vdpa", *arguments], capture_output=True, text=True, check=False)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(arguments)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def as_json(*arguments: str) -> dict[str, Any]:
    done = vhost_vdpa(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert told["schema"] == "pyvhostvdpa/probe/probe/1"
    return told


@contextmanager
def held(path: str) -> Iterator[int]:
    """Another process has the device; its pid."""
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            yield holder.pid
        finally:
            holder.kill()


def test_a_simulated_device_is_reported_and_proved(devices: tuple[str, str]) -> None:
    told = as_json("probe", devices[0], "--verify")
    features = told["backend_features"]
    assert {name: features[name] for name in ("advertised", "usable", "proved")} == {
        "advertised": "0x17e",
        "usable": "0x17e",
        "proved": "0x17e",
    }
    assert (told["group_num"], told["as_num"]) == (2, 2)
    assert told["vring_groups"] == [0, 0, 1]
    assert told["vring_desc_groups"] is None
    assert told["vring_sizes"] is None
    assert told["control_queue"] == 2
    assert told["config"]["mac"] == "52:54:91:a1:b2:c1"
    assert told["iova_range"] == {"first": "0x0", "last": hex((1 << 64) - 1)}
    assert told["migratable"]
    assert told["blockers"] == []
    assert {name for name, answer in told["enables"].items() if not answer["yes"]} == {"desc_asid"}


def test_a_device_that_pins_is_proved_too(pinned: tuple[str, str]) -> None:
    told = as_json("probe", pinned[0], "--verify")
    assert told["parent"]["pinned"]
    assert told["backend_features"]["proved"] == "0x17e"


def test_a_device_that_maps_piece_by_piece_is_proved_too(unbatched: tuple[str, str]) -> None:
    told = as_json("probe", unbatched[0], "--verify")
    assert told["vring_sizes"] == [256, 256, 256]
    assert told["backend_features"]["proved"] == "0x17e"


def test_probe_of_a_vduse_device_reports_why_it_cannot_be_migrated(vduse: str) -> None:
    told = as_json("probe", vduse, "--verify")
    features = told["backend_features"]
    assert [features[name] for name in ("advertised", "usable", "proved")] == ["0xe", "0x6", "0x6"]
    assert features["why"]["IOTLB_ASID"] == "the device has one address space"
    # a parent without groups reports none, or that all queues are in the first
    assert told["vring_groups"] in (None, [0, 0])
    assert told["vring_desc_groups"] is None
    assert told["control_queue"] is None
    assert told["config"]["link_up"]
    assert not told["migratable"]
    assert told["blockers"] == ["no SUSPEND: its queues cannot be stopped without loss (not advertised)"]
    shown = vhost_vdpa("probe", vduse).stdout
    assert "cannot be migrated:\n  - no SUSPEND" in shown


def test_without_proof_nothing_is_called_proved(devices: tuple[str, str]) -> None:
    told = as_json("probe", "vdpa0")
    assert told["backend_features"]["proved"] is None
    assert told["device"]["chardev"] == devices[0]


def test_the_device_is_left_reset(devices: tuple[str, str]) -> None:
    for verify in (False, True):
        probe(devices[0], verify)
        with VhostVdpa(devices[0]) as dev:
            assert dev.get_status() == Status(0)
            dev.set_owner()
            assert dev.get_vring_base(0) == 0


def test_busy_device_is_refused_with_its_holder_and_listed_unopened(devices: tuple[str, str]) -> None:
    with held(devices[0]) as pid:
        done = vhost_vdpa("probe", devices[0], "--verify")
        assert done.returncode == 1
        assert done.stdout == ""
        assert f"held by pid {pid} (python" in done.stderr
        assert "--no-open" in done.stderr
        with pytest.raises(DeviceBusy):
            probe(devices[0])
        told = as_json("probe", devices[0], "--no-open")
    assert told["opened"] is False
    assert told["device"]["holders"][0]["pid"] == pid
    assert told["vqs_count"] == 3


def test_which_device_is_asked_for_when_there_are_several(devices: tuple[str, str]) -> None:
    assert len(devices) == 2
    done = vhost_vdpa("probe")
    assert done.returncode == 1
    assert "which device? None was named; this machine has:" in done.stderr
    assert "vdpa1 (/dev/vhost-vdpa-1)" in done.stderr


def test_user_without_rights_gets_the_udev_rule(devices: tuple[str, str]) -> None:
    done = vhost_vdpa("probe", devices[0], prefix=("setpriv", "--reuid=1000", "--clear-groups"))
    assert done.returncode == 1
    assert "the node belongs to root" in done.stderr
    assert "udev rule" in done.stderr


# -- devices that do not do what they say -------------------------------------------


class Liar(VhostVdpa):
    """A real device behind a door that leaves out the call named in ``leave_out``."""

    leave_out = ""

    def _ioctl(self, name: str, argument: bytearray | None = None, text: str = "") -> int:
        if name == self.leave_out:
            return 0
        return super()._ioctl(name, argument, text)


def lying(monkeypatch: pytest.MonkeyPatch, path: str, request: str) -> Probe:
    monkeypatch.setattr(Liar, "leave_out", request)
    monkeypatch.setattr("pyvhostvdpa.probe.probe.VhostVdpa", Liar)
    return probe(path, verify=True)


@pytest.mark.parametrize(
    ("request_left_out", "not_proved"),
    [
        ("VHOST_VDPA_SUSPEND", BackendFeature.SUSPEND | BackendFeature.RESUME),
        ("VHOST_VDPA_RESUME", BackendFeature.RESUME),
        ("VHOST_VDPA_SET_GROUP_ASID", BackendFeature.IOTLB_ASID),
    ],
)
def test_a_request_that_succeeds_and_does_nothing_is_caught(
    devices: tuple[str, str], monkeypatch: pytest.MonkeyPatch, request_left_out: str, not_proved: BackendFeature
) -> None:
    found = lying(monkeypatch, devices[0], request_left_out)
    assert found.backend.proved is not None
    assert found.backend.usable & ~found.backend.proved == not_proved
    assert len(found.lies()) == len(list(not_proved))
    if BackendFeature.SUSPEND in not_proved:
        assert any("no SUSPEND" in blocker for blocker in found.blockers())


def test_a_device_that_forgets_its_maps_does_not_pass_for_one_that_keeps_them(
    devices: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PERSIST is not acknowledged: the kernel has the device forget, as a lying one would."""
    found = lying(monkeypatch, devices[0], "VHOST_SET_BACKEND_FEATURES")
    assert found.backend.proved is not None
    assert BackendFeature.IOTLB_PERSIST in found.backend.usable
    assert BackendFeature.IOTLB_PERSIST not in found.backend.proved


def test_a_refused_request_is_reported_in_the_proof(devices: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(VhostVdpa):
        def suspend(self) -> None:
            raise KernelError(errno.EIO, "VHOST_VDPA_SUSPEND")

    monkeypatch.setattr("pyvhostvdpa.probe.probe.VhostVdpa", Refuses)
    found = probe(devices[0], verify=True)
    assert "VHOST_VDPA_SUSPEND: EIO" in found.backend.why["SUSPEND"]
