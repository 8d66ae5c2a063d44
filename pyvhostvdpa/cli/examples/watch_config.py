# SPDX-License-Identifier: MIT
"""Watch a device's configuration for some seconds: link, announcements, MAC address. Resets the device."""

import argparse
import os
import select

from pyvhostvdpa import Status, VhostVdpa
from pyvhostvdpa.net.config import NetConfig
from pyvhostvdpa.net.features import Feature, negotiate

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("device", help="such as /dev/vhost-vdpa-0")
parser.add_argument("seconds", nargs="?", type=float, default=1.0, help="seconds without a change until it ends")
arguments = parser.parse_args()

eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
with VhostVdpa(arguments.device) as dev:
    features = negotiate(dev.get_features())
    dev.set_config_call(eventfd)
    status = Status(0)
    for step in (Status.ACKNOWLEDGE | Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK):
        if step is Status.FEATURES_OK:
            dev.set_features(int(features))
        status |= step
        dev.set_status(status)
    while True:
        config = NetConfig.parse(dev.get_config(0, dev.get_config_size()), Feature(features))
        print(f"MAC {config.mac}, MTU {config.mtu}, link {'up' if config.link_up else 'down'}", flush=True)
        if not select.select([eventfd], [], [], arguments.seconds)[0]:
            break
        os.eventfd_read(eventfd)
os.close(eventfd)
