"""Real virtual machines on vDPA devices: runs inside the lab's VM, below `tools/lab vm`.

A stock QEMU runs a tiny Linux guest on one device and moves it to a second QEMU on a second device, while numbered
frames and a numbered byte stream pass between the guest and the other end of the wire.
"""
