# SPDX-License-Identifier: MIT
"""Where in a device's address space things can go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NewType

from ..base.errors import MapRejected
from .pinned import PAGE_SIZE

Iova = NewType("Iova", int)
"""Address as the device sees it, in one address space."""


class IovaAllocator:
    """First fit in the holes of one address space.

    ``first`` and ``last`` are the device's IOVA range, both inclusive;
    ``taken`` the ranges (start, size) that are never given out; nor is page 0.
    """

    def __init__(self, first: int, last: int, taken: Iterable[tuple[int, int]] = ()) -> None:
        self._first = max(-(-first // PAGE_SIZE) * PAGE_SIZE, PAGE_SIZE)
        self._last = last
        self._reserved = list(taken)
        self._given: dict[int, int] = {}

    def allocate(self, size: int) -> Iova:
        """Return a free page-aligned range of ``size`` bytes, rounded up to pages; MapRejected without one."""
        need = -(-size // PAGE_SIZE) * PAGE_SIZE
        at = self._first
        for start, length in sorted((*self._reserved, *self._given.items())):
            if start >= at + need:
                break
            at = max(at, -(-(start + length) // PAGE_SIZE) * PAGE_SIZE)
        if at + need - 1 > self._last:
            raise MapRejected(f"no hole of {need:#x} bytes in the device's IOVA range up to {self._last:#x}")
        self._given[at] = need
        return Iova(at)

    def free(self, iova: int) -> None:
        """Give a range back by its start."""
        del self._given[iova]

    def reserve(self, start: int, size: int) -> None:
        """Give nothing out of a range from now on; what was given out of it stays given."""
        self._reserved.append((start, size))

    def release(self, start: int, size: int) -> None:
        """Let a reserved range be given out again."""
        self._reserved.remove((start, size))
