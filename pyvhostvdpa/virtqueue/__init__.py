# SPDX-License-Identifier: MIT
"""Virtqueues: layout, the guest's side, and the shadow in between.

Python places rings and decides; every access to one is in C (``cdefs/``).
"""

from .serving import Serving
from .shadow import ShadowThreads, ShadowVirtqueue
from .used import used_ring

SHADOWED = Serving(ShadowVirtqueue, ShadowThreads)
"""Every element goes through a ring in this process's memory: see :mod:`~pyvhostvdpa.virtqueue.shadow`."""

__all__ = ["SHADOWED", "used_ring"]
