# SPDX-License-Identifier: MIT
"""``/dev/vhost-vdpa-N``: the only place that issues a request, the IOTLB mirror, why a map was refused."""

from .door import VhostVdpa

__all__ = ["VhostVdpa"]
