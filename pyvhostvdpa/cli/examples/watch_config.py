# SPDX-License-Identifier: MIT
"""Watch a device's configuration for some seconds: link, announcements, MAC address. Resets the device."""

import os
import select
import sys

from pyvhostvdpa import Status, VhostVdpa
from pyvhostvdpa.net.config import NetConfig
from pyvhostvdpa.net.features import Feature, negotiate

seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
with VhostVdpa(sys.argv[1]) as dev:
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
        if not select.select([eventfd], [], [], seconds)[0]:
            break
        os.eventfd_read(eventfd)
os.close(eventfd)
