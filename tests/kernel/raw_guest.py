"""The least that a migration can move: memory and rings. No NIC driver, no control queue, no CPU to pause."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from pyvhostvdpa.base.errors import MigrationRefused, StreamCorrupt
from pyvhostvdpa.guest.codec import Reader, Writer
from pyvhostvdpa.guest.protocol import DeviceSection, Guest, Section
from pyvhostvdpa.guest.shape import BadState, DeviceShape, check_shapes
from pyvhostvdpa.memory.guest import GuestMemory
from pyvhostvdpa.net.features import Feature
from pyvhostvdpa.virtqueue.layout import GuestQueue, indices

Sections, Shapes = Sequence[DeviceSection], Sequence[DeviceShape]

RINGS, NOTHING = 200, 201
"""Kinds of sections, its own."""


@dataclass(frozen=True)
class Nothing:
    """What is not on a device: nothing, so it is a head without fields."""

    def encode(self) -> bytes:
        return Writer().section(NOTHING, 1)


@dataclass(frozen=True)
class Rings:
    """Where the rings of a device lie, and the indices that they have."""

    features: int
    places: tuple[tuple[int, int, int, int], ...]
    """Size, and GPA of descriptors, avail and used ring, by queue index."""
    at: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> DeviceShape:
        return DeviceShape(self.features, len(self.places) // 2, max(num for num, *_ in self.places), None)

    def encode(self) -> bytes:
        w = Writer()
        w.put("Q", self.features)
        w.each(self.places, lambda place: w.put("HQQQ", *place))
        w.each(self.at, lambda at: w.put("HH", *at))
        return w.section(RINGS, 1)


def eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


class RawGuest(Guest):
    """Memory, and the rings on each device; the program that works on them pauses itself, and clears ``running``."""

    kind = "raw"
    can_pause = False

    def __init__(self, memory: GuestMemory, features: Feature, devices: Sequence[Sequence[GuestQueue]]) -> None:
        self.memory, self.features, self.devices = memory, features, devices
        self.running = False

    def queues(self, number: int) -> Sequence[GuestQueue]:
        return self.devices[number]

    def pause(self) -> None:
        if self.running:
            raise MigrationRefused("the guest runs, and only its owner can pause it", hint="pause it there")

    def shapes(self) -> tuple[DeviceShape, ...]:
        return tuple(rings.shape for rings in self._rings())

    def state(self) -> tuple[Section, Sequence[DeviceSection]]:
        return Nothing(), self._rings()

    def _rings(self) -> list[Rings]:
        return [
            Rings(
                int(self.features),
                tuple((queue.num, queue.desc, queue.avail, queue.used) for queue in queues),
                tuple(indices(queue, self.memory) for queue in queues),
            )
            for queues in self.devices
        ]

    def close(self) -> None:
        for queue in (queue for queues in self.devices for queue in queues):
            os.close(queue.kick)
            os.close(queue.call)
        self.devices = ()
        self.memory.close()

    # -- its kind ----------------------------------------------------------------------

    @classmethod
    def decode_guest(cls, data: bytes) -> Nothing:
        Reader(data, NOTHING, 1, "raw guest").end()
        return Nothing()

    @classmethod
    def decode_device(cls, data: bytes) -> Rings:
        r = Reader(data, RINGS, 1, "rings")
        features = r.get("Q")
        rings = Rings(
            features,
            r.each("places", 64, lambda: r.get("HQQQ")),
            r.each("indices", 64, lambda: r.get("HH")),
        )
        r.end()
        if not rings.places or len(rings.places) != len(rings.at):
            raise r.bad(f"{len(rings.places)} rings with {len(rings.at)} indices")
        return rings

    @classmethod
    def restore(cls, memory: GuestMemory, guest: Section, devices: Sections, shapes: Shapes) -> RawGuest:
        rings = [device for device in devices if isinstance(device, Rings)]
        queues: list[list[GuestQueue]] = []
        try:
            check_shapes([each.shape for each in rings], shapes)
            for each in rings:
                for number, place in enumerate(each.places):
                    if indices(GuestQueue(number, *place, -1, -1), memory) != each.at[number]:
                        raise BadState(f"virtqueue {number} is not what its indices say")
        except (BadState, ValueError, OverflowError) as e:
            raise StreamCorrupt(f"rings: {e}") from e
        for each in rings:
            queues.append([GuestQueue(n, *place, eventfd(), eventfd()) for n, place in enumerate(each.places)])
        return cls(memory, Feature(rings[0].features), queues)

    @classmethod
    def expect(cls, memory: GuestMemory, outline: Sections, shapes: Shapes) -> RawGuest:
        raise StreamCorrupt("a raw guest has no outline")


KINDS = {RawGuest.kind: RawGuest}
