# SPDX-License-Identifier: MIT
"""The record of system calls and everything that reads it: phases, downtimes, spans, exports."""

from .recorder import DeviceTrace, Event, Trace

__all__ = ["DeviceTrace", "Event", "Trace"]
