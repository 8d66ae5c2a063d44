# SPDX-License-Identifier: MIT
"""Memory that a device may reach: allocated here, its pages, pinning, and IOVA allocation."""

from .guest import DEFAULT_GPA, GuestMemory, SharedMemory

__all__ = ["DEFAULT_GPA", "GuestMemory", "SharedMemory"]
