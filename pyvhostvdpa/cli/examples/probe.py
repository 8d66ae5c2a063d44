# SPDX-License-Identifier: MIT
"""What a device offers. Opening it resets it: use a device that nobody needs."""

import sys

from pyvhostvdpa import VhostVdpa
from pyvhostvdpa.base.uapi import names
from pyvhostvdpa.net.features import Feature

with VhostVdpa(sys.argv[1]) as dev:
    print("features:", names(Feature(dev.get_features())))
    print("backend features:", names(dev.get_backend_features()))
    print(f"{dev.get_vqs_count()} virtqueues of up to {dev.get_vring_num()}")
    print(f"{dev.get_group_num()} groups, {dev.get_as_num()} address spaces")
    print("IOVA range: {:#x}-{:#x}".format(*dev.get_iova_range()))
