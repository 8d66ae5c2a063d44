"""What a test must not leave behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """A block behind which this process has as many descriptors and threads as in front of it."""
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert len(os.listdir("/proc/self/fd")) == fds
    assert threading.active_count() == threads
