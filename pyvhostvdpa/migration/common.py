# SPDX-License-Identifier: MIT
"""What both sides of a migration share: how long each waits, what it hashes, and callbacks that cannot harm it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from ..base.errors import VhostVdpaError
from ..guest.shape import GuestShape
from ..memory.guest import GuestMemory
from .pages import memory_hash

T = TypeVar("T")

log = logging.getLogger(__name__)

PhaseCallback = Callable[[str], None]
"""Called with the name of each phase as it begins."""
ReportCallback = Callable[[str], None]
"""Called with a line of progress for people."""

PATIENCE = 300.0
"""Seconds that a destination may take to prepare; it says that it is at work in between."""
HAND_OVER_SECONDS = 60.0
"""Seconds that a side may take for its answer while the guest is paused."""
_HASHED_PER_SECOND = 50 << 20


def hash_bytes(memory: GuestMemory, c_map: Any = None) -> bytes:
    """Return the hash of guest memory, which must not be written meanwhile, as it goes over the stream.

    ``c_map`` as :func:`memory_hash` takes it.
    """
    return memory_hash(memory, c_map=c_map).to_bytes(8, "big")


def patience(shape: GuestShape) -> float:
    """Return the seconds that either side may take to load or hash a guest while it is paused."""
    hashing = sum(size for _, size in shape.memory) / _HASHED_PER_SECOND if shape.hashed else 0.0
    return HAND_OVER_SECONDS + hashing


def words_of(error: BaseException) -> str:
    """Return an error as part of a sentence; one that is not the package's own with its type."""
    return str(error) if isinstance(error, VhostVdpaError) else f"{type(error).__name__}: {error}"


def harmless(callback: Callable[[str], None]) -> Callable[[str], None]:
    """Return a callback whose errors are logged, the first of them, and survived.

    Progress is not needed to keep a guest alive, so a closed standard error
    or a full disk must not end one. KeyboardInterrupt still passes.
    """
    failed = False

    def call(text: str) -> None:
        nonlocal failed
        try:
            callback(text)
        except Exception as e:
            if not failed:
                failed = True
                warn(f"a progress callback failed at {text!r}, later errors of it are not reported: {words_of(e)}")

    return call


def warn(text: str) -> None:
    """Log a warning; a failure to write it is ignored."""
    with suppress(Exception):
        log.warning("%s", text)


def attempt(action: Callable[[], T], what: str, tell: ReportCallback) -> T | None:
    """Return what ``action`` returns; None if it fails, which is reported as "``what``: why"."""
    try:
        return action()
    except Exception as e:
        tell(f"{what}: {words_of(e)}")
        return None
