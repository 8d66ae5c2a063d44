# SPDX-License-Identifier: MIT
"""virtio-net: features, and a guest with a driver and traffic of its own."""
