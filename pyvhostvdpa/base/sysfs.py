# SPDX-License-Identifier: MIT
"""Small files and folders of the kernel (sysfs, procfs), for commands that start quickly.

Paths are strings: :mod:`pathlib` takes longer to load than ``vhost-vdpa list`` takes to run.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    StrPath = str | os.PathLike[str]


def read(path: StrPath) -> str | None:
    """Return a file's text without blanks around it, None if it cannot be read."""
    try:
        # unbuffered bytes: a text file's layers cost more than the few bytes that are read
        with open(path, "rb", buffering=0) as file:
            return file.read().decode(errors="replace").strip()
    except OSError:
        return None


def entries(folder: StrPath) -> list[str]:
    """Return the sorted names in a folder, none if it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def target(link: StrPath) -> str | None:
    """Return the last part of what a symbolic link leads to, such as a driver's name; None if it leads nowhere."""
    return os.path.basename(os.path.realpath(link)) if os.path.exists(link) else None
