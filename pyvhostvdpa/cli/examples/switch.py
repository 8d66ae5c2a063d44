# SPDX-License-Identifier: MIT
"""Switch a running device to shadow virtqueues and back, under traffic."""

import argparse
import time

from pyvhostvdpa import GuestOptions, State, VdpaNetDevice

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("device", help="such as /dev/vhost-vdpa-0")

with VdpaNetDevice(parser.parse_args().device) as dev:
    guest = GuestOptions(memory=64 << 20).create([dev])
    dev.attach(guest.memory)
    guest.start(0, dev)
    guest.run()
    for mode in (State.SHADOW, State.PASSTHROUGH):
        time.sleep(1)
        dev.stop()
        guest.start(0, dev, mode)
        print(dev.state.value, guest.counts())
    time.sleep(1)
    guest.drain(seconds=5)
    guest.pause()
    print(guest.counts())
    dev.close()
    guest.close()
