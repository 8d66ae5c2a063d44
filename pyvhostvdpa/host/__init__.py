# SPDX-License-Identifier: MIT
"""What this machine has, without opening a device: management, drivers, memory, and ``doctor``."""
