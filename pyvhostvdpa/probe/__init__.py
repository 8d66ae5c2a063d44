# SPDX-License-Identifier: MIT
"""What a device does, tried on it: the probe and the proofs of each feature."""

from .probe import Probe

__all__ = ["Probe"]
