# SPDX-License-Identifier: MIT
"""What a device costs: maps, requests, the switch of modes, the shadow.

Every figure is taken between two looks at CLOCK_MONOTONIC in C, on a device
that was seen to do what it was timed for.
"""
