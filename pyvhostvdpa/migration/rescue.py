# SPDX-License-Identifier: MIT
"""Saving a paused guest that exists nowhere else: the process does not end before that is done."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .common import warn, words_of

T = TypeVar("T")

RETRY_SECONDS = 2.0
"""How long until saving is tried again."""
_REMIND_SECONDS = 60.0


def rescue(save: Callable[[], T], folder: Path, size: int) -> T:
    """Save a guest of ``size`` bytes in ``folder`` by ``save``, however long that takes, and return what that returns.

    If it cannot be saved the guest stays in this process, which logs why and
    what to free, and tries again every :data:`RETRY_SECONDS`. Nothing but
    SIGKILL should end that: the guest would end with the process.
    """
    told, since = "", 0.0
    while True:
        try:
            return save()
        except Exception as e:
            why, limited = words_of(e), _errno(e) in (errno.EMFILE, errno.ENFILE)
        if why != told or time.monotonic() - since > _REMIND_SECONDS:
            told, since = why, time.monotonic()
            warn(_kept(why, folder, size, limited))
        time.sleep(RETRY_SECONDS)


def _kept(why: str, folder: Path, size: int, limited: bool) -> str:
    pid = os.getpid()
    need = (
        f"give it more file descriptors (prlimit --pid {pid} --nofile=1024)"
        if limited
        else f"free {size >> 20} MiB in {folder} and make it writable{_room(folder)}"
    )
    return (
        f"{why}. The guest is stopped and exists in this process only, which keeps it and tries again every "
        f"{RETRY_SECONDS:g} s: {need}. kill -9 {pid} ends the process, and the guest with it"
    )


def _errno(error: BaseException | None) -> int | None:
    """Return the errno of an error, or of the one that it came from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return None if error is None else error.errno


def _room(folder: Path) -> str:
    try:
        found = os.statvfs(folder)
    except OSError:
        return ""
    return f" ({found.f_bavail * found.f_frsize >> 20} MiB are free)"
