"""Machines on which the lab does not work, and what of the host is handed to the tree.

Not being root, another processor and another distribution are stood in for: the message is what is tested.
"""

import os
import platform
import shutil

import pytest

from labkit import host
from labkit.errors import LabError
from labkit.progress import Progress


@pytest.fixture
def good(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.usefixtures("good")
def test_good_machine():
    host.check_machine()


@pytest.mark.usefixtures("good")
def test_not_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match="root") as caught:
        host.check_machine("demo")
    assert caught.value.next_step == "sudo tools/lab demo"


@pytest.mark.usefixtures("good")
def test_not_debian(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(LabError, match="not a Debian system"):
        host.check_machine()


@pytest.mark.usefixtures("good")
def test_not_x86_64(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(LabError, match="aarch64"):
        host.check_machine()


def test_missing_packages_are_found_by_what_they_bring(tmp_path):
    (tmp_path / "there").write_text("")
    needed = ((str(tmp_path / "there"), "here"), (str(tmp_path / "gone"), "away"))
    assert host.missing_packages(needed) == ["away"]


def test_what_is_missing_is_said_before_it_is_installed(cache, monkeypatch, capsys):
    calls = []
    left = [["qemu-system-x86"], []]
    monkeypatch.setattr(host, "missing_packages", lambda: left.pop(0))
    monkeypatch.setattr(Progress, "call", lambda _self, title, argv, *_: calls.append((title, argv)))
    host.ensure_packages(cache, Progress())
    assert "installing the Debian packages: qemu-system-x86" in capsys.readouterr().err
    assert calls[-1][1][-2:] == ["--no-install-recommends", "qemu-system-x86"]


def test_apt_settings_that_are_handed_on():
    dump = (
        'Acquire "";\nAcquire::http::Proxy "http://proxy:3142";\nAcquire::https::Proxy "";\n'
        'Acquire::Check-Valid-Until "false";\nAcquire::http::Proxy::deb.debian.org "DIRECT";\n'
        'APT::Architecture "amd64";\n'
    )
    assert host.select_acquire(dump) == [
        'Acquire::http::Proxy "http://proxy:3142";',
        'Acquire::Check-Valid-Until "false";',
        'Acquire::http::Proxy::deb.debian.org "DIRECT";',
    ]


def test_environment_that_is_handed_on(tmp_path):
    bundle = tmp_path / "ca.crt"
    bundle.write_text("x")
    environ = {"https_proxy": "http://p", "PIP_INDEX_URL": "http://i", "PIP_FIND_LINKS": "/x", "PIP_CERT": str(bundle)}
    assert host.network_environment(environ) == {"https_proxy": "http://p"}
    assert host.pip_environment(environ) == {"PIP_INDEX_URL": "http://i"}
    assert host.ca_bundle(environ) == bundle
