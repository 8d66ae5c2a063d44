"""Machines on which the lab does not work, and what of the host is handed to the tree.

A user other than root, another processor and another distribution are simulated: the message is what is tested.
"""

import os
import platform
import shutil

import pytest

from labkit import host
from labkit.errors import LabError
from labkit.progress import Progress, diagnose


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


AUDIT = """The following packages are only half configured, probably due to problems
configuring them the first time.  The configuration should be retried using
dpkg --configure <package> or the configure menu option in dselect:
 man-db               tools for reading manual pages
 libc-bin             GNU C Library: Binaries
"""
SIMULATION = """NOTE: This is only a simulation!
Inst libext2fs2 [1.47.0-2] (1.47.0-2+b2 Debian:12.12/oldstable [amd64])
Inst e2fsprogs [1.47.0-2] (1.47.0-2+b2 Debian:12.12/oldstable [amd64])
Remv fuse [2.9.9-6+b1]
Inst qemu-system-x86 (1:7.2+dfsg-7+deb12u16 Debian:12.12/oldstable [amd64])
Conf qemu-system-x86 (1:7.2+dfsg-7+deb12u16 Debian:12.12/oldstable [amd64])
"""


@pytest.fixture
def installs(cache, monkeypatch):
    """Stands for a host without QEMU: what is installed on it, and what dpkg and apt would say."""
    calls, said = [], {"dpkg": AUDIT, "apt-get": SIMULATION}
    left = [["qemu-system-x86"], []]
    monkeypatch.setattr(host, "missing_packages", lambda: left.pop(0))
    monkeypatch.setattr(host, "_output", lambda *argv: said[argv[0]])
    monkeypatch.setattr(Progress, "call", lambda _self, title, argv, *_: calls.append(argv))
    return cache, calls, said, left


def test_missing_packages_are_listed_before_they_are_installed(installs, capsys):
    cache, calls, _, _ = installs
    host.ensure_packages(cache, Progress())
    assert "installing the Debian packages: qemu-system-x86" in capsys.readouterr().err
    assert calls[-1][-2:] == ["--no-install-recommends", "qemu-system-x86"]


def test_installation_prints_each_package_it_touches(installs, capsys):
    cache, calls, _, _ = installs
    host.ensure_packages(cache, Progress())
    said = capsys.readouterr().err
    assert "dpkg --configure -a finishes what an earlier installation left: man-db libc-bin" in said
    assert "apt installs 1 packages: qemu-system-x86" in said
    assert "apt upgrades 2 packages: libext2fs2 e2fsprogs" in said
    assert "apt removes 1 packages: fuse" in said
    assert ["dpkg", "--configure", "-a"] in calls


def test_dpkg_configures_nothing_if_no_installation_was_interrupted(installs, capsys):
    cache, calls, said, _ = installs
    said["dpkg"] = ""
    host.ensure_packages(cache, Progress())
    assert ["dpkg", "--configure", "-a"] not in calls
    assert "configure" not in capsys.readouterr().err


def test_ubuntu_without_the_key_of_debian_13_is_reported_where_it_is(installs, monkeypatch):
    cache, _, _, left = installs
    left[:] = [["debian-archive-keyring"], ["debian-archive-keyring"]]
    monkeypatch.setattr(host, "distribution", lambda: "Ubuntu 24.04.3 LTS")
    with pytest.raises(LabError) as caught:
        host.ensure_packages(cache, Progress())
    assert "Ubuntu 24.04.3 LTS has no key of Debian 13" in caught.value.what
    assert caught.value.next_step.startswith("dpkg -i debian-archive-keyring_")


def test_distribution_is_what_it_calls_itself(tmp_path):
    (tmp_path / "os-release").write_text('NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.3 LTS"\n')
    assert host.distribution(tmp_path / "os-release") == "Ubuntu 24.04.3 LTS"
    assert host.distribution(tmp_path / "none") == "this system"


def test_package_that_no_source_has_is_diagnosed():
    found = diagnose("E: Unable to locate package mmdebstrap")
    assert found is not None
    assert "add-apt-repository universe" in found[1]


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
