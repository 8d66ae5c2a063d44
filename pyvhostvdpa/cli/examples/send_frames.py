# SPDX-License-Identifier: MIT
"""Own a pair of queues and send frames through them. They come back on a device that loops back."""

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
    time.sleep(0.5)
    traffic.stop_sending(timeout=5)
    traffic.pause()
    print(nic.counts())
    dev.close()
    nic.close()
