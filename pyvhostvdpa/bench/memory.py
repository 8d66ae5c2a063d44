# SPDX-License-Identifier: MIT
"""Memory for map benchmarks: how large its pages are, and how it lies in physical memory.

A parent that pins gets one entry per physically contiguous run, whatever the
number of messages (drivers/vhost/vdpa.c:vhost_vdpa_pa_map), so runs are what
is chosen here, and measured afterwards.
"""

from __future__ import annotations

import enum
import os
import random
from collections.abc import Callable

from .._cdefs import lib
from ..base.errors import MissingFeature
from ..memory import hugepages
from ..memory.available import check_ordinary
from ..memory.guest import PAGE_SIZE
from ..memory.mapped import MappedMemory

_STEP = 4096
"""Pages allocated between two words of progress."""
_SEED = 4096
"""The order of a scattered allocation is the same in every run."""


class Page(enum.Enum):
    """The size of the pages that memory is made of."""

    SMALL = "4k"
    LARGE = "2M"
    HUGE = "1G"

    @property
    def bytes(self) -> int:
        """The size in bytes."""
        return {Page.SMALL: PAGE_SIZE, Page.LARGE: 2 << 20, Page.HUGE: 1 << 30}[self]


class PhysicalLayout(enum.Enum):
    """How memory lies."""

    CONTIGUOUS = "contiguous"
    """Pages allocated in order, as contiguous as the kernel has them; IOVAs without a hole."""
    SCATTERED = "scattered"
    """Pages allocated in shuffled order, so that neighbours are not adjacent in physical memory."""
    HOLES = "holes"
    """As contiguous, with a hole in the IOVAs after each region."""


class Backing(enum.Enum):
    """What memory is mapped of: a memfd, or private memory, which a parent on user addresses cannot use."""

    SHARED = "shared"
    PRIVATE = "private"


def _huge_flags(page: Page, backing: Backing, size: int) -> int | None:
    """Return memfd's flags for pages of that size, 0 where advice is enough, None where they do not exist."""
    if page is Page.SMALL:
        return 0
    setting = "shmem_enabled" if backing is Backing.SHARED else "enabled"
    if page is Page.LARGE and hugepages.advisable(hugepages.choice(setting)):
        return 0
    if backing is Backing.SHARED and hugepages.free(page.bytes) * page.bytes >= size:
        return os.MFD_HUGETLB | (os.MFD_HUGE_1GB if page is Page.HUGE else os.MFD_HUGE_2MB)
    return None


def unavailable(size: int, page: Page, backing: Backing) -> tuple[str, str]:
    """Return why such memory is unavailable here and what to do, two empty strings if it is available."""
    if size % page.bytes:
        return f"{size} bytes are not whole pages of {page.value}", f"--memory in multiples of {page.value}"
    if _huge_flags(page, backing, size) is None:
        if backing is Backing.PRIVATE:
            return f"no private memory in pages of {page.value} here", "--page 4k, or --backing shared"
        pool = f"{hugepages.pool(page.bytes)}/nr_hugepages"
        pages, free = size // page.bytes, hugepages.free(page.bytes)
        return f"{free} of {pages} pages of {page.value} are free", f"echo {pages} > {pool}"
    try:
        check_ordinary(0 if _huge_flags(page, backing, size) else size)
    except MissingFeature as e:
        return str(e), e.hint
    return "", ""


class BenchMemory(MappedMemory):
    """``size`` bytes of memory of the given kind, every page allocated. Raises :class:`~pyvhostvdpa.MissingFeature`."""

    def __init__(
        self,
        size: int,
        page: Page = Page.SMALL,
        layout: PhysicalLayout = PhysicalLayout.CONTIGUOUS,
        backing: Backing = Backing.SHARED,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        why, hint = unavailable(size, page, backing)
        if why:
            raise MissingFeature(why, hint=hint)
        super().__init__(size)
        self.page, self.layout, self.backing = page, layout, backing
        align = max(page.bytes, Page.LARGE.bytes)
        if backing is Backing.PRIVATE:
            self._map(align)
        else:
            self._map_file("bench", _huge_flags(page, backing, size) or 0, align)
        advise = lib.advise_small if page is Page.SMALL else lib.advise_huge
        # EINVAL: hugetlb, or a kernel without transparent huge pages
        advise(self._address, size)
        try:
            self._populate(progress)
        except BaseException:
            self.close()
            raise

    def _populate(self, progress: Callable[[int], None]) -> None:
        order = list(range(self.size // self.page.bytes))
        if self.layout is PhysicalLayout.SCATTERED:
            random.Random(_SEED).shuffle(order)
        for at in range(0, len(order), _STEP):
            some = order[at : at + _STEP]
            self._check_populated(lib.populate_in_order(self._address, self.page.bytes, some, len(some)))
            progress((at + len(some)) * self.page.bytes)
