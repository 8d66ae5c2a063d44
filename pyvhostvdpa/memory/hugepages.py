# SPDX-License-Identifier: MIT
"""What the kernel has of huge pages: made on advice (transparent huge pages), or kept in a pool (hugetlb)."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/")
_MM = "sys/kernel/mm"
# shmem_enabled says "advise" where the file for private memory says "madvise"
_ADVISABLE = ("always", "within_size", "advise", "madvise", "force")


def choice(name: str, root: Path = _ROOT) -> str | None:
    """Return what a file on transparent huge pages has chosen, such as ``shmem_enabled``; None if it cannot be read."""
    try:
        return (root / _MM / "transparent_hugepage" / name).read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return None


def advisable(chosen: str | None) -> bool:
    """Tell whether memory that asks for huge pages (madvise(2)) gets them where this is chosen."""
    return chosen in _ADVISABLE


def pool(size: int, root: Path = _ROOT) -> Path:
    """Return the folder that tells of the kernel's pool of pages of ``size`` bytes."""
    return root / _MM / f"hugepages/hugepages-{size >> 10}kB"


def free(size: int, root: Path = _ROOT) -> int:
    """Return how many pages of ``size`` bytes are free in their pool, 0 if there is none."""
    try:
        return int((pool(size, root) / "free_hugepages").read_text())
    except OSError:
        return 0
