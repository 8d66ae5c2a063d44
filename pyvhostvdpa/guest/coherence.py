# SPDX-License-Identifier: MIT
"""Whether a state is that of a guest in this memory: rings as they are described, and nothing twice or outside."""

from __future__ import annotations

from collections.abc import Sequence

from .._cdefs import ffi, lib
from ..base.errors import MissingFeature, StreamCorrupt
from ..memory.guest import PAGE_SIZE, GuestMemory
from ..virtqueue.layout import GuestQueue, map_queue
from .nic import check_nic
from .nic_state import MAX_INDEX, Extent, check_disjoint, check_memory, queue_at_rest
from .shape import BadState, DeviceShape, check_shapes
from .state import DeviceState, GuestState, QueueState
from .writer import MAX_RATE


def queue_state(queue: GuestQueue, memory: GuestMemory) -> QueueState:
    """Return what a ring in guest memory is like; MissingFeature if its indices differ by over a ring."""
    ring, heads = ffi.new("struct vring *"), ffi.new("uint16_t[]", queue.num)
    map_queue(ring, queue, memory)
    avail, used = ffi.new("uint16_t *"), ffi.new("uint16_t *")
    lib.vring_indices(ring, avail, used)
    count: int = lib.vring_open_heads(ring, heads)
    if count < 0:
        raise MissingFeature(f"virtqueue {queue.index}: avail {avail[0]} and used {used[0]} differ by over a ring")
    return QueueState(queue.index, int(used[0]), int(avail[0]), tuple(ffi.unpack(heads, count)))


def check_guest(
    memory: GuestMemory, state: GuestState, devices: Sequence[DeviceState], shapes: Sequence[DeviceShape] | None
) -> list[Extent]:
    """Raise :class:`~pyvhostvdpa.StreamCorrupt` unless this is a guest in ``memory``; return what it uses there."""
    what = "state of the guest"
    extents: list[Extent] = []
    try:
        if shapes is not None:
            check_shapes([device.shape for device in devices], shapes)
        for number, device in enumerate(devices):
            what = f"state of device {number}"
            extents += check_nic(memory, device.nic)
            _compare(device, memory)
        what = "state of the guest"
        if state.writer_pages:
            extents.append(check_writer(memory, state))
        check_disjoint(extents)
    except BadState as e:
        raise StreamCorrupt(f"{what}: {e}") from e
    return extents


def check_writer(memory: GuestMemory, state: GuestState) -> Extent:
    """Return what the guest's CPU writes to; :class:`~pyvhostvdpa.guest.shape.BadState` if that cannot be."""
    area = ("writer_gpa", state.writer_gpa, state.writer_pages * PAGE_SIZE)
    check_memory(memory, *area)
    if state.writer_gpa % PAGE_SIZE:
        raise BadState(f"writer_gpa {state.writer_gpa:#x} is not the start of a page")
    if state.writer_rate > MAX_RATE:
        raise BadState(f"writer_rate {state.writer_rate} pages per second, at most {MAX_RATE} are possible")
    return area


def _compare(device: DeviceState, memory: GuestMemory) -> None:
    """Raise if rings in memory differ from their description."""
    places = [place for pair in device.nic.pairs for place in (pair.rx, pair.tx)]
    if [queue.index for queue in device.queues] != [place.index for place in places]:
        raise BadState("queues: they are not those of its NIC")
    for told, place in zip(device.queues, places, strict=True):
        try:
            found = queue_state(queue_at_rest(place), memory)
        except MissingFeature as e:
            raise BadState(str(e)) from e
        if found != told:
            differs = "" if found.heads == told.heads else " and other heads"
            raise BadState(
                f"virtqueue {place.index} has used {found.used}, avail {found.avail} in memory; "
                f"the source left used {told.used}, avail {told.avail}{differs}"
            )
    for pair, rx, tx in zip(device.nic.pairs, device.queues[::2], device.queues[1::2], strict=True):
        _compare_driver("rx", rx, pair.rx_avail, pair.rx_used)
        _compare_driver("tx", tx, pair.tx_avail, pair.tx_used)


def _compare_driver(side: str, ring: QueueState, avail: int, used: int) -> None:
    """Raise unless a driver with these indices has published what it has added, and its device used no more."""
    done, added = (ring.used - used) & MAX_INDEX, (avail - used) & MAX_INDEX
    if avail != ring.avail or done > added:
        raise BadState(
            f"virtqueue {ring.index} has used {ring.used}, avail {ring.avail}; "
            f"its driver has {side}_used {used}, {side}_avail {avail}"
        )
