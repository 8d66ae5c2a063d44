"""A guest with a control queue on the double of the door, driven by each procedure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from door_double import PAIRS, DoorDouble
from leaks import nothing_left_behind

from pyvhostvdpa import GuestMemory, State
from pyvhostvdpa._cdefs import ffi
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES, BackendFeature
from pyvhostvdpa.bench.ladder.rows import LADDER_ROWS
from pyvhostvdpa.chardev.iotlb import Iotlb, Limits
from pyvhostvdpa.device.net_kind import NET, probe_groups
from pyvhostvdpa.device.procedure.base import Procedure, Target
from pyvhostvdpa.device.procedure.direct import Direct
from pyvhostvdpa.device.procedure.in_place import InPlace
from pyvhostvdpa.device.shadowing import USED, USED_ALL, choose
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.memory.guest import DEFAULT_GPA
from pyvhostvdpa.net.control import ControlModel
from pyvhostvdpa.net.control_queue import NetGuestControl
from pyvhostvdpa.net.features import CONTROL, SUPPORTED, negotiate

MiB = 1 << 20


OFFERED = int(SUPPORTED | CONTROL)


WITHOUT_RESUME = ALL_BACKEND_FEATURES & ~BackendFeature.RESUME


WITHOUT_PERSIST = ALL_BACKEND_FEATURES & ~BackendFeature.IOTLB_PERSIST


WITHOUT_DESC_ASID = ALL_BACKEND_FEATURES & ~BackendFeature.DESC_ASID


Make = Callable[[Target], Procedure]


SERIES: dict[str, Make] = {
    f"series {plan.row}": lambda target, plan=plan: plan.resolve(target, False).make(target)  # type: ignore[misc]
    for plan in LADDER_ROWS.values()
    if plan.procedure is None
}


def shadowing(make: Make, name: str) -> Make:
    """A procedure whose queues are shadowed in that way."""
    return lambda target: make(replace(target, serving=choose(name, NET)))


PROCEDURES: dict[str, tuple[Make, BackendFeature]] = {
    "direct": (Direct, ALL_BACKEND_FEATURES),
    "direct without RESUME": (Direct, WITHOUT_RESUME),
    "direct without PERSIST": (Direct, WITHOUT_PERSIST),
    "direct without DESC_ASID": (Direct, WITHOUT_DESC_ASID),
    "in place": (InPlace, ALL_BACKEND_FEATURES),
    "in place without PERSIST": (InPlace, WITHOUT_PERSIST),
    **{
        f"{name}, {way}": (shadowing(make, way), ALL_BACKEND_FEATURES)
        for name, make in (("direct", Direct), ("in place", InPlace))
        for way in (USED, USED_ALL)
    },
    **{name: (make, ALL_BACKEND_FEATURES) for name, make in SERIES.items()},
}


RELAYED = [name for name in PROCEDURES if not name.endswith(f", {USED}")]
"""Those in which queue 1, which sends, goes through a shadow ring."""


OWN = [name for name in PROCEDURES if not name.startswith("series")]


class Rig:
    """A guest with a control queue on the double, driven by one procedure."""

    def __init__(
        self,
        make: Make,
        advertised: BackendFeature,
        control: bool = True,
        double: type[DoorDouble] = DoorDouble,
        ring_size: int = 8,
        rx_relayed: bool = False,
    ) -> None:
        self.door = double(OFFERED, advertised)
        self.memory = GuestMemory([(DEFAULT_GPA, 2 * MiB)])
        door: DoorDouble = self.door
        features = negotiate(door.get_features(), SUPPORTED | CONTROL)
        door.set_backend_features(advertised)
        limits = Limits(first=0, last=(1 << 48) - 1, as_num=door.as_num, pinned=False, entries=None)
        groups = probe_groups(door, features, door.get_vqs_count())  # type: ignore[arg-type]
        iotlb = Iotlb(door, limits)  # type: ignore[arg-type]
        target = Target(door, iotlb, features, advertised, groups)  # type: ignore[arg-type]
        self.procedure = make(target)
        self.procedure.control_deadline = 5.0
        index = groups.control_index
        self.nic = GuestNic(
            self.memory,
            NicOptions(pairs=PAIRS, ring_size=ring_size, features=features, control_index=index, rx_relayed=rx_relayed),
        )
        assert self.nic.control is not None
        self.control = NetGuestControl(self.nic.control.queue, ControlModel(features)) if control else None
        self.procedure.attach(self.memory)

    def start(self, mode: State) -> None:
        self.procedure.start(mode, self.nic.queues, self.control)

    def stop(self, then: State | None = None) -> None:
        self.procedure.stop(then)

    def close(self) -> None:
        self.procedure.abandon()
        self.door.close()
        self.procedure.release()
        self.nic.close()
        self.memory.close()

    def runs(self) -> bool:
        """Whether the device works on rings that it can reach, every queue enabled."""
        enabled = all(ring.ready for ring in self.door.vrings)
        return self.door.running and enabled and not self.door.unreachable_rings()

    def device_is_off(self) -> bool:
        return not self.door.running


@contextmanager
def rig(name: str, **options: bool) -> Iterator[Rig]:
    """A rig that must leave no descriptor and no thread behind."""
    with nothing_left_behind(), closing(Rig(*PROCEDURES[name], **options)) as made:
        yield made


def disorder(it: Rig, index: int = 0) -> None:
    """Make a queue's ring look as a device leaves it that used the second of two descriptors first."""
    queue = it.nic.queues[index]
    avail = ffi.cast("uint16_t *", it.memory.hva(queue.avail))
    used = ffi.cast("uint16_t *", it.memory.hva(queue.used))
    ids = ffi.cast("uint32_t *", it.memory.hva(queue.used + 4))
    start = used[1]
    avail[1] = (start + 2) & 0xFFFF
    avail[2 + start % queue.num], avail[2 + (start + 1) % queue.num] = 0, 1
    ids[2 * (start % queue.num)] = 1
    used[1] = (start + 1) & 0xFFFF
