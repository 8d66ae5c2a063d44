# SPDX-License-Identifier: MIT
"""What a guest needs of a destination, sent before anything moves: its kind, memory and devices.

It is the same for every kind of guest. ``vhost-vdpa help migration`` documents every field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from ..memory.guest import PAGE_SIZE
from ..net.config import MAX_CONFIG
from ..virtqueue.layout import MAX_NUM
from .codec import Reader, Writer

VERSION = 3
"""Of the SHAPE section: 2 added each device's configuration space, 3 the kind of guest. Earlier ones are read too."""
SECTION = 1
"""Its kind of section."""

SYNTHETIC = "synthetic"
"""The kind of guest that every section before version 3 is of."""
ID_BYTES = 16
MAX_DEVICES = 64
MAX_PAIRS = 128
_MAX_REGIONS = 512
_MAX_TEXT = 256
_MAX_KIND = 32
_NONE = 0xFFFF


class BadState(ValueError):
    """State that no guest of this package can have."""


@dataclass(frozen=True, slots=True)
class DeviceShape:
    """What a destination's device must be like: features, pairs, ring size; ``control_index`` None without one.

    ``config`` is the configuration space as the guest's driver knows it, None if that is unknown. It belongs to the
    device below and not to the guest's state, so two shapes are equal without it.
    """

    features: int
    pairs: int
    ring_size: int
    control_index: int | None
    config: bytes | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class GuestShape:
    """What a guest needs of a destination, sent before anything moves.

    ``id`` names this migration on both sides, ``source`` is for people:
    host and devices. ``memory`` is (GPA, bytes) of each region. ``kind`` names
    the decoder of the guest's state (:mod:`pyvhostvdpa.guest.protocol`).
    """

    id: bytes
    source: str
    memory: tuple[tuple[int, int], ...]
    devices: tuple[DeviceShape, ...]
    hashed: bool
    kind: str = SYNTHETIC

    def encode(self) -> bytes:
        """Return the section."""
        w = Writer()
        w.put(f"{ID_BYTES}s", self.id)
        w.text(self.source)
        w.put("I", PAGE_SIZE)
        w.each(self.memory, lambda region: w.put("QQ", *region))
        w.each(self.devices, lambda d: _put_shape(w, d))
        w.put("B", self.hashed)
        for device in self.devices:
            w.optional(device.config)
        w.text(self.kind)
        return w.section(SECTION, VERSION)

    @classmethod
    def decode(cls, data: bytes) -> GuestShape:
        """Return the shape in a section."""
        r = Reader(data, SECTION, VERSION, "shape of the guest", oldest=1)
        number, source = r.get(f"{ID_BYTES}s"), r.text("source", _MAX_TEXT)
        page = r.get("I")
        if page != PAGE_SIZE:
            raise r.bad(f"pages of {page} bytes, this side has {PAGE_SIZE}")
        shape = cls(
            id=number,
            source=source,
            memory=r.each("memory regions", _MAX_REGIONS, lambda: r.get("QQ")),
            devices=r.each("devices", MAX_DEVICES, lambda: _get_shape(r)),
            hashed=r.flag("hashed"),
        )
        _check_memory(r, shape.memory)
        if not shape.devices:
            raise r.bad("no device")
        if r.version > 1:
            devices = [replace(d, config=r.optional("configuration space", MAX_CONFIG)) for d in shape.devices]
            shape = replace(shape, devices=tuple(devices))
        if r.version > 2:
            shape = replace(shape, kind=r.text("kind", _MAX_KIND))
        r.end()
        return shape


def _put_shape(w: Writer, d: DeviceShape) -> None:
    w.put("QIIH", d.features, d.pairs, d.ring_size, _NONE if d.control_index is None else d.control_index)


def _get_shape(r: Reader) -> DeviceShape:
    features, pairs, ring_size, control = r.get("QIIH")
    if not 1 <= pairs <= MAX_PAIRS or not 1 <= ring_size <= MAX_NUM or ring_size & (ring_size - 1):
        raise r.bad(f"a device with {pairs} pairs of rings of {ring_size}")
    return DeviceShape(features, pairs, ring_size, None if control == _NONE else control)


def _check_memory(r: Reader, regions: tuple[tuple[int, int], ...]) -> None:
    end = 0
    for gpa, size in regions:
        if gpa % PAGE_SIZE or size % PAGE_SIZE or not size or gpa < end or gpa + size > 1 << 56:
            raise r.bad(f"memory region {gpa:#x}+{size:#x}")
        end = gpa + size
    if not regions:
        raise r.bad("no memory")


def check_shapes(found: Sequence[DeviceShape], promised: Sequence[DeviceShape]) -> None:
    """Raise BadState naming the field if devices are not like those of a SHAPE section."""
    if len(found) != len(promised):
        raise BadState(f"{len(found)} devices, the SHAPE section has {len(promised)}")
    for number, (device, shape) in enumerate(zip(found, promised, strict=True)):
        for name in (each.name for each in fields(DeviceShape) if each.compare):
            here, there = getattr(device, name), getattr(shape, name)
            if here != there:
                raise BadState(
                    f"device {number} does not match the SHAPE section: {name} {_shown(here)} here, "
                    f"{_shown(there)} there"
                )


def _shown(value: int | None) -> str:
    return "none" if value is None else hex(value) if value > MAX_NUM else str(value)
