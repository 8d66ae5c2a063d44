# SPDX-License-Identifier: MIT
"""Sizes of pages, and what this process has pinned: known without the C library."""

from __future__ import annotations

import os
from pathlib import Path

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
HUGE_PAGE = 2 << 20


def pinned_bytes() -> int:
    """Return what this process has pinned (VmPin), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmPin:"):
            return int(line.split()[1]) * 1024
    return 0
