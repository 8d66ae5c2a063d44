# SPDX-License-Identifier: MIT
"""Eventfds, several at once or none: a limit on open files may be met at any of them. And how they are closed."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def open_eventfds(count: int) -> list[int]:
    """Return so many new eventfds, non-blocking and closed at exec. If one fails with OSError none stays open."""
    made: list[int] = []
    try:
        for _ in range(count):
            made.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    except OSError:
        close_all(made)
        raise
    return made


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors; negative ones are none.

    Who owned them must have forgotten them before this is called. Ctrl-C raises between any two lines: a descriptor
    that is closed and still known is closed again on the way out, which fails, or hits another file of that number.
    """
    for fd in fds:
        if fd >= 0:
            os.close(fd)
