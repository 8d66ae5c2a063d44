# SPDX-License-Identifier: MIT
"""The start of a saved guest: the file is its only copy, and is removed once the guest runs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ..base.errors import MigrationRefused
from ..device.net import VdpaNetDevice
from ..guest.protocol import G, Kinds, kind_of
from ..net.control_queue import DEFAULT_DEADLINE
from ..net.features import Feature
from ..trace.recorder import Trace
from . import paused
from .admission import check_fit, map_memory
from .common import ReportCallback
from .destination import Arrived
from .folder import Claim
from .saved import load_claimed, other_files

STALE = ".stale"
"""The suffix of a file whose guest was started from another one."""


def start_saved(
    path: Path,
    paths: Sequence[str | os.PathLike[str]],
    kinds: Kinds[G],
    trace: Trace | None = None,
    tell: ReportCallback = lambda text: None,
    control_deadline: float = DEFAULT_DEADLINE,
    procedure: str | None = None,
) -> Arrived[G]:
    """Start the guest saved in a file on the devices at ``paths``, and remove the file once it runs.

    ``kinds`` are those that can be started here. The file is claimed
    (:class:`~pyvhostvdpa.migration.folder.Claim`) before it is read, and
    until it is removed. So is every other file of this guest in the same
    folder, which gets the suffix ``.stale`` then. Raises what claiming,
    loading, opening, mapping and starting raise; the files stay then, and the
    guest can be started again.
    """
    trace = trace or Trace()
    with ExitStack() as stack:
        tell(f"loading {path}")
        claim = stack.enter_context(Claim(path))
        saved, memory = load_claimed(claim, kinds)
        stack.callback(memory.close)
        others = [stack.enter_context(_claimed(other)) for other in other_files(claim.path, saved.shape.id)]
        if len(paths) != len(saved.devices):
            raise MigrationRefused(f"the guest in {path} has {len(saved.devices)} devices, {len(paths)} were given")
        devices = []
        for name, shape in zip(paths, saved.shape.devices, strict=True):
            wanted = Feature(shape.features)
            device = stack.enter_context(
                VdpaNetDevice(name, trace, wanted=wanted, procedure=procedure, control_deadline=control_deadline)
            )
            devices.append(device)
            check_fit(device, shape)
        for device in devices:
            tell(f"mapping memory in {device.path}")
            map_memory(device, memory)
        guest = kind_of(saved.shape, kinds).restore(memory, saved.guest, saved.devices, saved.shape.devices)
        stack.callback(guest.close)
        for device in devices:
            stack.callback(device.close)
        # the time in the file is not a gap that a device made
        guest.forget_clock()
        paused.start(guest, devices)
        notes = [_removed(claim), *(_set_aside(other) for other in others)]
        note = "; ".join(text for text in notes if text)
        return Arrived(saved.shape, guest, devices, note=note, resources=stack.pop_all())


def _claimed(other: Path) -> Claim:
    """Claim another file of the guest: it must not be started from there meanwhile."""
    try:
        return Claim(other)
    except MigrationRefused as e:
        raise MigrationRefused(f"both sides have saved this guest: {e}", hint=e.hint) from e


def _set_aside(other: Claim) -> str:
    """Rename another file of a guest that runs; what its owner should know."""
    stale = other.path.with_suffix(STALE)
    try:
        other.path.rename(stale)
    except OSError as e:
        # the claim is held as long as the guest runs
        return (
            f"the guest runs here, but {other.path}, where it was saved as well, could not be renamed ({e.strerror}), "
            f"and must not be started: rm {shlex.quote(str(other.path))}"
        )
    other.close()
    return f"the guest was saved as well in {other.path}, which is out of date now: rm {shlex.quote(str(stale))}"


def _removed(claim: Claim) -> str:
    """Remove the file of a guest that runs; if that fails, what its owner has to do."""
    try:
        claim.remove()
    except OSError as e:
        # the claim is held as long as the guest runs: it cannot be started a second time
        return (
            f"the guest runs here, but its file could not be removed ({e.strerror}), and must not be started again: "
            f"rm {shlex.quote(str(claim.path))}"
        )
    claim.close()
    return ""
