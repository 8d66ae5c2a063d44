# SPDX-License-Identifier: MIT
"""Map a guest's memory in one batch and see what each system call took."""

import argparse

from pyvhostvdpa import DEFAULT_GPA, GuestMemory, Trace, VdpaNetDevice

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("device", help="such as /dev/vhost-vdpa-0")
arguments = parser.parse_args()

trace = Trace()
with VdpaNetDevice(arguments.device, trace) as dev, GuestMemory([(DEFAULT_GPA, 64 << 20)]) as memory:
    dev.attach(memory)
    for event in trace.events:
        if event.event.startswith("IOTLB_"):
            print(f"{(event.t_end - event.t_begin) / 1000:8.1f} us  {event.event}  {event.arguments}")
    dev.close()
