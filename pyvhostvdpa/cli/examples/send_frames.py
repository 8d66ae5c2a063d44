# SPDX-License-Identifier: MIT
"""Own a pair of queues and send frames through them. They come back on a device that loops back."""

import sys
import time

from pyvhostvdpa import GuestMemory, VdpaNetDevice
from pyvhostvdpa.guest.nic import GuestNic
from pyvhostvdpa.guest.traffic import Traffic
from pyvhostvdpa.memory.guest import DEFAULT_GPA

with VdpaNetDevice(sys.argv[1]) as dev, GuestMemory([(DEFAULT_GPA, 64 << 20)]) as memory:
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
