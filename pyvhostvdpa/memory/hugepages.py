# SPDX-License-Identifier: MIT
"""What the kernel has of huge pages: made on advice (transparent huge pages), or kept in a pool (hugetlb)."""

from __future__ import annotations

import os

from ..base import sysfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..base.sysfs import StrPath

_ROOT = "/"
_MM = "sys/kernel/mm"
# shmem_enabled says "advise" where the file for private memory says "madvise"
_ADVISABLE = ("always", "within_size", "advise", "madvise", "force")


def choice(name: str, root: StrPath = _ROOT) -> str | None:
    """Return what a file on transparent huge pages has chosen, such as ``shmem_enabled``; None if it cannot be read."""
    text = sysfs.read(f"{root}/{_MM}/transparent_hugepage/{name}")
    return None if text is None else text.partition("[")[2].partition("]")[0]


def advisable(chosen: str | None) -> bool:
    """Return whether memory that asks for huge pages (madvise(2)) gets them where this is chosen."""
    return chosen in _ADVISABLE


def in_files(root: StrPath = _ROOT) -> bool:
    """Return whether files in memory that ask for them get pages of other sizes, also where the kernel does not say.

    It takes pages out of page tables to join them, and to split what was joined (mm/huge_memory.c:unmap_folio()).
    """
    folder = os.path.join(root, _MM, "transparent_hugepage")
    if not os.path.isdir(folder):
        return False
    sized = (f"{name}/shmem_enabled" for name in os.listdir(folder) if name.startswith("hugepages-"))
    names = ("shmem_enabled", *(name for name in sized if os.path.exists(os.path.join(folder, name))))
    chosen = [choice(name, root) for name in names]
    return any(each is None or advisable(each) for each in chosen)


def pool(size: int, root: StrPath = _ROOT) -> str:
    """Return the sysfs folder of the kernel's pool of pages of ``size`` bytes."""
    return os.path.join(root, _MM, f"hugepages/hugepages-{size >> 10}kB")


def free(size: int, root: StrPath = _ROOT) -> int:
    """Return how many pages of ``size`` bytes are free in their pool, 0 without a pool."""
    return int(sysfs.read(f"{pool(size, root)}/free_hugepages") or 0)
