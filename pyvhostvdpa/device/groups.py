# SPDX-License-Identifier: MIT
"""Which queue belongs to which group, and what can have an address space of its own.

The answer may depend on the negotiated features (the control queue's index
does), so it is asked for after FEATURES_OK, which takes a reset afterwards:
at attach, never on a device that runs.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..base.errors import KernelError
from ..base.uapi import Status
from ..chardev.door import VhostVdpa


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of a device. None where the parent has no such thing; ``max_pairs`` is a net device's.

    ``control`` is the control queue's group if no data queue shares it,
    ``descriptors`` the group of all data queues' rings if it is not the
    buffers' own. ``config`` is the configuration space as a driver with
    these features reads it.
    """

    max_pairs: int
    control_index: int | None
    control: int | None
    descriptors: int | None
    config: bytes = b""


def ask_groups(
    chardev: VhostVdpa, features: int, data: Sequence[int], control_index: int | None, max_pairs: int = 1
) -> Groups:
    """Ask for the groups of the queues ``data`` and of the control queue under ``features``; the device is reset."""
    chardev.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
    try:
        chardev.set_features(features)
        chardev.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        buffers = {_group(chardev.get_vring_group, index) for index in data}
        rings = {_group(chardev.get_vring_desc_group, index) for index in data}
        control = None if control_index is None else _group(chardev.get_vring_group, control_index)
        # before features are set the parent takes this for a legacy driver
        config = chardev.get_config(0, chardev.get_config_size())
    finally:
        chardev.set_status(Status(0))
    # QEMU looks at queue 0 alone; a parent may well group queues differently
    descriptors = rings.pop() if len(rings) == 1 else None
    return Groups(
        max_pairs=max_pairs,
        control_index=control_index,
        control=None if control in buffers else control,
        descriptors=None if descriptors in buffers else descriptors,
        config=config,
    )


def ring_sizes(chardev: VhostVdpa, vqs_count: int) -> tuple[int, ...]:
    """Return the largest ring of each queue: what the parent says of that queue, else what it says of all.

    Rounded down to a power of two, as a split ring has to be (virtio 1.3, 2.7).
    """
    most = chardev.get_vring_num()
    try:
        sizes = [chardev.get_vring_size(index) or most for index in range(vqs_count)]
    except KernelError as e:
        # no get_vq_size in the parent, or a kernel before 6.10
        if e.errno not in (errno.EOPNOTSUPP, errno.ENOTTY):
            raise
        sizes = [most] * vqs_count
    return tuple(1 << (min(size, most).bit_length() - 1) for size in sizes)


def _group(ask: Callable[[int], int], index: int) -> int | None:
    try:
        return ask(index)
    except KernelError as e:
        if e.errno == errno.EOPNOTSUPP:
            return None
        raise
