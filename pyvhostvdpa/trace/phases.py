# SPDX-License-Identifier: MIT
"""The names of the phases that are measured: code that drives a device stamps one of them on its calls."""

from __future__ import annotations

DEST_PREMAP = "dest.premap"
"""Guest memory is mapped on the destination, before the guest stops."""
DEST_STAND_BY = "dest.stand_by"
"""The destination's device is made ready for the guest, before the guest stops."""
DT1_STOP = "dt1.stop"
"""The device is stopped in passthrough, to be started with shadow virtqueues."""
DT1_START = "dt1.start"
"""It is started with shadow virtqueues."""
DT2_STOP = "dt2.stop"
"""The device is stopped on the source, for good."""
DEST_START = "dest.start"
"""The destination's device is started in passthrough."""
CANCEL_START = "cancel.start"
"""The source's device goes back to passthrough, since the guest stays."""

DT1 = (DT1_STOP, DT1_START)
"""Downtime #1 of the series: from the first call of the one to the last of the other."""
DT2 = (DT2_STOP,)
"""Downtime #2 of the series."""
DEST = (DEST_START,)
"""The destination start, which is in neither downtime."""
PHASES = (DEST_PREMAP, DEST_STAND_BY, *DT1, *DT2, DEST_START, CANCEL_START)
"""All of them, in the order in which a migration goes through them."""
