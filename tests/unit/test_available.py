"""How much memory there is, by a machine that is made for the test: MemAvailable, cgroups, the pool of huge pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyvhostvdpa.base.errors import MissingFeature
from pyvhostvdpa.memory import available
from pyvhostvdpa.memory.available import from_pool, ordinary, pool_left

MIB = 1 << 20
GIB = 1 << 30
V2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = (
    "31 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "32 23 0:28 / /sys/fs/cgroup/hugetlb rw - cgroup cgroup rw,hugetlb\n"
)
Put = Callable[..., None]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    def write(path: str, text: object) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    write("proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB")
    return write


def huge(put: Put, free: int, reserved: int = 0, advice: str = "never") -> None:
    put("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", free)
    put("sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", reserved)
    put("sys/kernel/mm/transparent_hugepage/shmem_enabled", f"always [{advice}]")


def v2(put: Put, path: str = "/pod/guest") -> None:
    put("proc/self/mountinfo", V2)
    put("proc/self/cgroup", f"0::{path}")


def test_ordinary_memory_without_cgroups_is_the_machines(put: Put, tmp_path: Path) -> None:
    assert ordinary(tmp_path).free == 8 * GIB
    assert not from_pool(8 * GIB, root=tmp_path)
    with pytest.raises(MissingFeature, match=r"8192 MiB available \(MemAvailable of the machine\)"):
        from_pool(8 * GIB + MIB, root=tmp_path)


def test_from_pool_refuses_nothing_if_the_limits_are_unknown(tmp_path: Path) -> None:
    assert not from_pool(1 << 50, root=tmp_path)


@pytest.mark.parametrize("where", ["pod/guest", "pod"])
def test_memory_max_of_a_cgroup_or_one_above_is_the_limit(put: Put, tmp_path: Path, where: str) -> None:
    v2(put)
    put("sys/fs/cgroup/pod/guest/memory.max", "max")
    put("sys/fs/cgroup/pod/memory.max", "max")
    put(f"sys/fs/cgroup/{where}/memory.max", 512 * MIB)
    put(f"sys/fs/cgroup/{where}/memory.current", 200 * MIB)
    put(f"sys/fs/cgroup/{where}/memory.stat", f"anon 1\ninactive_file {40 * MIB}\nactive_file {10 * MIB}\nshmem {MIB}")
    assert ordinary(tmp_path).free == 362 * MIB
    with pytest.raises(MissingFeature) as refused:
        from_pool(GIB, root=tmp_path)
    assert f"memory.max of cgroup {tmp_path}/sys/fs/cgroup/{where} is 512 MiB" in str(refused.value)
    assert "1024 MiB of guest memory asked for, 362 MiB available" in str(refused.value)
    assert "raise that limit" in refused.value.hint
    with pytest.raises(MissingFeature, match="asked for 2 times"):
        from_pool(200 * MIB, 2, tmp_path)
    assert not from_pool(200 * MIB, 1, tmp_path)


def test_memory_limit_of_cgroup_v1_is_the_limit(put: Put, tmp_path: Path) -> None:
    put("proc/self/mountinfo", V1)
    put("proc/self/cgroup", "4:memory:/docker/1\n3:hugetlb:/docker/1")
    put("sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", 512 * MIB)
    put("sys/fs/cgroup/memory/docker/1/memory.usage_in_bytes", 100 * MIB)
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", 9223372036854771712)
    assert ordinary(tmp_path).free == 412 * MIB
    assert "memory.limit_in_bytes" in ordinary(tmp_path).source


def test_a_container_that_sees_its_own_part_of_the_tree_reads_its_limit_there(put: Put, tmp_path: Path) -> None:
    put("proc/self/mountinfo", V1.replace("0:27 / ", "0:27 /docker/1 "))
    put("proc/self/cgroup", "4:memory:/docker/1")
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", 256 * MIB)
    assert ordinary(tmp_path).free == 256 * MIB


# -- the pool of huge pages ---------------------------------------------------------------


def test_from_pool_where_the_memory_lies_in_the_pool_takes_it(put: Put, tmp_path: Path) -> None:
    """The whole memory of a host for guests is there, and MemAvailable is near 0; advice would do otherwise."""
    put("proc/meminfo", "MemAvailable: 20480 kB")
    huge(put, 600, reserved=50, advice="advise")
    assert pool_left(tmp_path).free == 1100 * MIB
    assert from_pool(GIB, root=tmp_path)
    with pytest.raises(MissingFeature, match=r"20 MiB available .*in huge pages 1100 MiB available"):
        from_pool(GIB, 2, tmp_path)
    with pytest.raises(MissingFeature):
        from_pool(GIB + 4096, root=tmp_path)


def test_from_pool_prefers_memory_that_becomes_contiguous_on_advice(put: Put, tmp_path: Path) -> None:
    huge(put, 600, advice="advise")
    assert not from_pool(GIB, root=tmp_path)
    huge(put, 600, advice="never")
    assert from_pool(GIB, root=tmp_path)
    assert not from_pool(2 * GIB, root=tmp_path), "the pool is too small, the machine is not"


@pytest.mark.parametrize("file", ["hugetlb.2MB", "hugetlb.2MB.rsvd"])
def test_hugetlb_limit_of_a_cgroup_keeps_memory_out_of_the_pool(put: Put, tmp_path: Path, file: str) -> None:
    v2(put)
    huge(put, 600)
    put(f"sys/fs/cgroup/pod/{file}.max", 64 * MIB)
    put(f"sys/fs/cgroup/pod/{file}.current", 2 * MIB)
    put("sys/fs/cgroup/pod/guest/memory.max", "max")
    assert pool_left(tmp_path).free == 62 * MIB
    assert not from_pool(GIB, root=tmp_path)
    put("proc/meminfo", "MemAvailable: 20480 kB")
    with pytest.raises(MissingFeature, match=rf"{file}.max of cgroup .*pod is 64 MiB"):
        from_pool(GIB, root=tmp_path)


def test_check_ordinary_leaves_the_pool_out(put: Put, tmp_path: Path) -> None:
    put("proc/meminfo", "MemAvailable: 20480 kB")
    huge(put, 600)
    with pytest.raises(MissingFeature, match="20 MiB available"):
        available.check_ordinary(GIB, root=tmp_path)
