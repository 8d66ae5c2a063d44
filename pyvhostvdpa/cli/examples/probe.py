# SPDX-License-Identifier: MIT
"""What a device offers. Opening it resets it: use a device that is not in use."""

import argparse

from pyvhostvdpa import VhostVdpa
from pyvhostvdpa.base.uapi import names
from pyvhostvdpa.net.features import Feature

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("device", help="such as /dev/vhost-vdpa-0")
arguments = parser.parse_args()

with VhostVdpa(arguments.device) as dev:
    print("features:", names(Feature(dev.get_features())))
    print("backend features:", names(dev.get_backend_features()))
    print(f"{dev.get_vqs_count()} virtqueues of up to {dev.get_vring_num()}")
    print(f"{dev.get_group_num()} groups, {dev.get_as_num()} address spaces")
    print("IOVA range: {:#x}-{:#x}".format(*dev.get_iova_range()))
