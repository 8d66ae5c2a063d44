# SPDX-License-Identifier: MIT
"""Memory that a device may reach: allocated here, its pages, pinning, and IOVA allocation."""

from .guest import DEFAULT_GPA, FileMemory, FileRegion, GuestMemory, SharedMemory
from .log import SharedLog

__all__ = ["DEFAULT_GPA", "FileMemory", "FileRegion", "GuestMemory", "SharedLog", "SharedMemory"]
