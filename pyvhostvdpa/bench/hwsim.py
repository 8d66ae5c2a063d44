# SPDX-License-Identifier: MIT
"""vdpa_hwsim, the device without hardware: its parameters, and the counters that it keeps of itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..base.errors import MissingFeature

MODULE = "vdpa_hwsim"
MAX_SCALE = 4096
"""The largest ``mem_scale``."""
_PARAMETERS = Path("/sys/module") / MODULE / "parameters"
_DEBUGFS = Path("/sys/kernel/debug") / MODULE


def loaded() -> bool:
    """Whether the module is there."""
    return _PARAMETERS.is_dir()


def not_loaded() -> MissingFeature:
    """Return the error for a machine without the module."""
    return MissingFeature(
        f"{MODULE} is not loaded",
        hint="vhost-vdpa ladder --on SRC DST; in the source tree: tools/lab ladder",
    )


@contextmanager
def parameters(values: Mapping[str, object]) -> Iterator[None]:
    """Set parameters for devices made within the block; MissingFeature if the module is not there or refuses."""
    if not loaded():
        raise not_loaded()
    before = {name: (_PARAMETERS / name).read_text().strip() for name in values}
    try:
        for name, value in values.items():
            _set(name, str(value))
        yield
    finally:
        for name, value in before.items():
            _set(name, value)


def _set(name: str, value: str) -> None:
    try:
        (_PARAMETERS / name).write_text(value)
    except OSError as e:
        raise MissingFeature(
            f"{MODULE} does not take {name}={value}: {os.strerror(e.errno or 0)}",
            hint=f"modinfo {MODULE} lists the parameters; root may write them",
        ) from e


def counters(device: str | None) -> dict[str, int] | None:
    """Return what a device, by its vDPA name, has counted; None if it is not a vdpa_hwsim device.

    MissingFeature if it is one and debugfs cannot be read.
    """
    if device is None or not loaded():
        return None
    if (Path("/sys/bus/vdpa/devices") / device).resolve().parent.name != MODULE:
        return None
    try:
        lines = (_DEBUGFS / device / "stats").read_text().splitlines()
    except OSError as e:
        raise MissingFeature(
            f"the counters of {device} cannot be read: {os.strerror(e.errno or 0)}",
            hint="as root: mount -t debugfs debugfs /sys/kernel/debug",
        ) from e
    return {key: int(value) for key, _, value in (line.partition("=") for line in lines)}


def stop_and_go_ms(device: str | None, pairs: int) -> float | None:
    """Return what a device takes to suspend and resume ``pairs`` pairs, by its own table of costs, in ms.

    Nothing that stops the queues of such a device and releases them takes
    less. None if it is not a vdpa_hwsim device.
    """
    if counters(device) is None:
        return None
    costs = _DEBUGFS / str(device) / "cost"
    try:
        once = sum(int((costs / name).read_text()) for name in ("suspend_ns", "resume_ns"))
        each = sum(int((costs / name).read_text()) for name in ("suspend_vq_ns", "resume_vq_ns"))
    except OSError as e:
        raise MissingFeature(
            f"the costs of {device} cannot be read: {os.strerror(e.errno or 0)}",
            hint="as root: mount -t debugfs debugfs /sys/kernel/debug",
        ) from e
    return (once + 2 * pairs * each) / 1e6
