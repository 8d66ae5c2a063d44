# SPDX-License-Identifier: MIT
"""Map a guest's memory in one batch and see what each system call took."""

import sys

from pyvhostvdpa import GuestMemory, Trace, VdpaNetDevice
from pyvhostvdpa.memory.guest import DEFAULT_GPA

trace = Trace()
with VdpaNetDevice(sys.argv[1], trace) as dev, GuestMemory([(DEFAULT_GPA, 64 << 20)]) as memory:
    dev.attach(memory)
    for event in trace.events:
        if event.event.startswith("IOTLB_"):
            print(f"{(event.t_end - event.t_begin) / 1000:8.1f} us  {event.event}  {event.arguments}")
    dev.close()
