# SPDX-License-Identifier: MIT
"""Switch a running device to shadow virtqueues and back, under traffic."""

import argparse
import time

from pyvhostvdpa import DEFAULT_GPA, GuestMemory, VdpaNetDevice
from pyvhostvdpa.guest.nic import GuestNic
from pyvhostvdpa.guest.traffic import Traffic

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("device", help="such as /dev/vhost-vdpa-0")
arguments = parser.parse_args()

with VdpaNetDevice(arguments.device) as dev, GuestMemory([(DEFAULT_GPA, 64 << 20)]) as memory:
    dev.attach(memory)
    nic = GuestNic(memory)
    traffic = Traffic(nic)
    dev.start_passthrough(nic.queues)
    traffic.run()
    for start in (dev.start_shadow, dev.start_passthrough):
        time.sleep(1)
        dev.stop()
        start(nic.queues)
        print(dev.state.value, nic.counts())
    time.sleep(1)
    traffic.stop_sending(timeout=5)
    traffic.pause()
    print(nic.counts())
    dev.close()
    nic.close()
