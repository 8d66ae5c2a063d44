"""Guest memory under a cgroup's limits, and on a machine whose memory lies in the pool of huge pages."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lab
import psutil
import pytest
from test_probe import vhost_vdpa

CGROUPS = Path("/sys/fs/cgroup")
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
MIB = 1 << 20


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup (v2) with a memory limit of 256 MiB and 16 MiB of huge pages."""
    if not (CGROUPS / "cgroup.controllers").exists():
        lab.command("mount", "-t", "cgroup2", "none", str(CGROUPS))
    (CGROUPS / "cgroup.subtree_control").write_text("+memory +hugetlb")
    group = CGROUPS / "small"
    group.mkdir()
    (group / "memory.max").write_text(str(256 * MIB))
    (group / "hugetlb.2MB.max").write_text(str(16 * MIB))
    yield group
    group.rmdir()


def within(group: Path, *words: str) -> subprocess.CompletedProcess[str]:
    prefix = ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
    return vhost_vdpa(*words, prefix=prefix)


def migrate(*more: str) -> tuple[str, ...]:
    return ("migrate", *lab.DEVICES, "--seconds", "1.5", "--downtime", "10000", *more)


@contextmanager
def pool(pages: int) -> Iterator[None]:
    POOL.write_text(str(pages))
    assert int(POOL.read_text()) == pages
    try:
        yield
    finally:
        POOL.write_text("0")


def test_migrate_in_a_cgroup_that_is_too_small_is_refused_with_the_limit_named(
    devices: tuple[str, str], cgroup: Path
) -> None:
    done = within(cgroup, *migrate("--memory", "512M"))
    assert done.returncode == 1, "neither killed nor started"
    assert f"memory.max of cgroup {cgroup} is 256 MiB" in done.stderr
    assert "raise that limit" in done.stderr
    assert "oom_kill 0" in (cgroup / "memory.events").read_text()


def test_migrate_from_the_pool_of_huge_pages_where_the_machine_has_no_other_memory(devices: tuple[str, str]) -> None:
    left = psutil.virtual_memory().available - 440 * MIB
    with pool(left // (2 * MIB)):
        assert psutil.virtual_memory().available < 512 * MIB
        done = vhost_vdpa(*migrate("--memory", "512M"))
    assert done.returncode == 0, done.stderr


def test_migrate_beyond_a_hugetlb_limit_is_refused_with_the_limit_named(devices: tuple[str, str], cgroup: Path) -> None:
    with pool(200):
        done = within(cgroup, *migrate("--memory", "300M"))
    assert done.returncode == 1
    assert f"hugetlb.2MB.max of cgroup {cgroup} is 16 MiB" in done.stderr
    assert "Bad address" not in done.stderr
    assert os.path.exists(devices[0])
