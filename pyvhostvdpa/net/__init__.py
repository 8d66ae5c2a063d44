# SPDX-License-Identifier: MIT
"""virtio-net on the device's side: features, configuration, the control queue's model and its replay."""
