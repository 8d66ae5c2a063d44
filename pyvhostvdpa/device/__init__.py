# SPDX-License-Identifier: MIT
"""One opened device: its groups, and the procedures that start, stop and switch it."""

from .net import State, VdpaNetDevice

__all__ = ["State", "VdpaNetDevice"]
