# SPDX-License-Identifier: MIT
"""What the kernel's vDPA parent drivers do, as data: from their sources, not from the devices.

``yes``, ``no``, or what it depends on. A device may differ by firmware; the
opened device is asked by ``vhost-vdpa probe``.
"""

from __future__ import annotations

from ..base.record import Record


class Driver(Record):
    """A parent driver. ``base`` is what GET_VRING_BASE reports, ``iommu`` whether it maps by the platform IOMMU."""

    suspend: str
    resume: str
    persist: str
    desc_asid: str
    asids: int | None
    base: str
    iommu: bool


_PLATFORM = Driver("no", "no", "yes", "no", 1, "the avail index", True)

DRIVERS: dict[str, Driver] = {
    "vdpa_sim": Driver("yes", "yes", "yes", "no", 2, "the avail index", False),
    "mlx5_core": Driver("yes", "by firmware", "yes", "by firmware", 2, "the used index", False),
    "mlx5_vdpa": Driver("yes", "by firmware", "yes", "by firmware", 2, "the used index", False),
    "vduse": Driver("no", "no", "no", "no", None, "what its daemon says", False),
    "snet_vdpa": Driver("yes", "yes", "yes", "no", 1, "the avail index", True),
    "vp_vdpa": _PLATFORM,
    "ifcvf": _PLATFORM,
    "pds_vdpa": _PLATFORM,
    "octep_vdpa": _PLATFORM,
    "eni_vdpa": _PLATFORM,
}
"""By module name, from Linux 6.12 and 7.2 (drivers/vdpa/*)."""

NICS: dict[str, tuple[str, str]] = {
    "15b3:101d": ("ConnectX-6 Dx", "mlx5_vdpa"),
    "15b3:101e": ("ConnectX virtual function", "mlx5_vdpa"),
    "15b3:101f": ("ConnectX-6 Lx", "mlx5_vdpa"),
    "15b3:1021": ("ConnectX-7", "mlx5_vdpa"),
    "15b3:a2d6": ("BlueField-2", "mlx5_vdpa"),
    "15b3:a2dc": ("BlueField-3", "mlx5_vdpa"),
}
"""PCI ids of network functions with a vDPA driver: name and module."""
