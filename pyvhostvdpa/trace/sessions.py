# SPDX-License-Identifier: MIT
"""One device's life, followed call by call: when it was opened, started, stopped and closed, and with whose rings.

Nothing but the calls is known. Whether a start is one with shadow rings is derived: the device then reads its rings
from a map of their own, while a guest's rings lie in the guest's memory. What cannot be derived is ``None``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ..base.uapi import Status
from .recorder import Event
from .spans import GUEST_MEMORY_MIN, Maps

_SUSPEND, _RESUME, _STATUS = "VHOST_VDPA_SUSPEND", "VHOST_VDPA_RESUME", "VHOST_VDPA_SET_STATUS"
_ENABLE = "VHOST_VDPA_SET_VRING_ENABLE"
_STOPPING = frozenset(
    {
        _SUSPEND,
        "VHOST_GET_VRING_BASE",
        "VHOST_VDPA_GET_STATUS",
        "IOTLB_INVALIDATE",
        "IOTLB_BATCH_BEGIN",
        "IOTLB_BATCH_END",
    }
)
_BUILDING = frozenset(
    {
        "VHOST_SET_FEATURES",
        "VHOST_SET_VRING_NUM",
        "VHOST_SET_VRING_ADDR",
        "VHOST_SET_VRING_BASE",
        _RESUME,
        "VHOST_VDPA_SET_GROUP_ASID",
        "IOTLB_UPDATE",
    }
)
_CONFIG_CALL = "VHOST_VDPA_SET_CONFIG_CALL"
IDLE_NS = 1_000_000_000
"""A call that follows its predecessor after longer than this does not belong to the same stop or start."""


class What(enum.StrEnum):
    """What happened to a device."""

    START = "start"
    STOP = "stop"


@dataclass(slots=True)
class Episode:
    """A start or a stop: places of its first and last call among the device's events, and their times in ns."""

    what: What
    first: int
    last: int
    t_first: int
    t_last: int
    running: int = 0
    """Of a start: when the device began to run."""
    shadow: bool | None = None
    """Of a start: whether its rings are shadow rings. Of a stop: those of the start before."""
    queues: frozenset[int] = frozenset()
    """The queues that are enabled."""
    closed: bool = False
    """Of a stop: whether the device was only closed."""

    @property
    def ms(self) -> float:
        """Its length."""
        return (self.t_last - self.t_first) / 1e6


@dataclass(slots=True)
class DeviceSession:
    """From open to close. ``t_open`` is ``None`` if the device was open before the recording began."""

    device: str
    t_open: int | None = None
    t_close: int | None = None
    pid: int | None = None
    comm: str = ""
    first: int = 0
    last: int = 0
    device_id: int | None = None
    offered: int | None = None
    acknowledged: int | None = None
    backend_offered: int | None = None
    backend_acknowledged: int | None = None
    vqs: int | None = None
    episodes: list[Episode] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether the device runs at the end of what is known."""
        return bool(self.episodes) and self.episodes[-1].what is What.START


class RingLocations:
    """Where a device's rings lie."""

    def __init__(self) -> None:
        self.maps = Maps()
        self.addresses: dict[int, int] = {}
        self._groups: dict[int, int] = {}
        self._asids: dict[int, int] = {}
        self._offsets: dict[tuple[int, int], int] = {}
        """uaddr minus IOVA by address space and IOVA."""
        self._guest_offsets: set[int] = set()

    def apply(self, event: Event) -> None:
        """Follow one successful event."""
        fields = event.fields
        self.maps.apply(event)
        if event.event == "IOTLB_UPDATE":
            offset = int(fields["uaddr"]) - int(fields["iova"])
            self._offsets[int(fields["asid"]), int(fields["iova"])] = offset
            if int(fields["size"]) >= GUEST_MEMORY_MIN:
                self._guest_offsets.add(offset)
        elif event.event == "VHOST_SET_VRING_ADDR":
            self.addresses[int(fields["index"])] = int(fields["desc"])
        elif event.event == "VHOST_VDPA_GET_VRING_DESC_GROUP" and "num" in fields:
            self._groups[int(fields["index"])] = int(fields["num"])
        elif event.event == "VHOST_VDPA_GET_VRING_GROUP" and "num" in fields:
            self._groups.setdefault(int(fields["index"]), int(fields["num"]))
        elif event.event == "VHOST_VDPA_SET_GROUP_ASID":
            self._asids[int(fields["index"])] = int(fields["num"])
        elif event.event == _STATUS and not int(fields["status"]):
            self._asids.clear()

    def shadowed(self, index: int) -> bool | None:
        """Whether a queue's ring lies in a map of its own; None if its map is not known."""
        found = self._holding(index)
        if found is None:
            return None
        _, size, offset = found
        return size < GUEST_MEMORY_MIN and offset not in self._guest_offsets

    def ring_memory(self, index: int) -> tuple[int, int] | None:
        """Return the process's memory that a shadowed queue's descriptors lie in: address and size; None if unknown."""
        found = self._holding(index)
        if found is None or not self.shadowed(index):
            return None
        iova, size, offset = found
        return iova + offset, size

    def _holding(self, index: int) -> tuple[int, int, int] | None:
        """Return the map that a queue's descriptors lie in: IOVA, size, and uaddr minus IOVA."""
        desc = self.addresses.get(index)
        if desc is None:
            return None
        asid = self._asids.get(self._groups.get(index, -1), 0)
        for space in (asid, *(each for each in self.maps.spaces if each != asid)):
            for iova, size in self.maps.spaces.get(space, {}).items():
                if iova <= desc < iova + size:
                    return iova, size, self._offsets.get((space, iova), 0)
        return None


class Follower:
    """Follows one device. ``session`` is the current one, or the last; ``sessions`` are all."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.sessions: list[DeviceSession] = []
        self.locations = RingLocations()
        self._count = 0
        self._status = 0
        self._suspended = False
        self._enabled: set[int] = set()
        self._wanted: frozenset[int] | None = None
        self._building: int | None = None
        self._t_building = 0
        self._t_last = 0
        self._batch: int | None = None
        self._t_batch = 0
        self._stopping = False

    @property
    def session(self) -> DeviceSession:
        """The session that an event belongs to: without an open, it was there before."""
        if not self.sessions:
            self.sessions.append(DeviceSession(self.device, first=self._count))
        return self.sessions[-1]

    @property
    def running(self) -> bool:
        """Whether the device processes descriptors, judged by the calls."""
        return bool(self._status & Status.DRIVER_OK) and not self._suspended

    @property
    def stopping(self) -> bool:
        """Whether a stop is under way: nothing has been set up for the next start."""
        return self._stopping

    def feed(self, event: Event) -> Episode | None:
        """Follow an event; return the episode that it began or continued."""
        place, self._count = self._count, self._count + 1
        if event.result is None or event.result < 0:
            if self.sessions:
                self.session.last = place
            return None
        if event.event == "open":
            self._open(event, place)
            return None
        session = self.session
        session.last = place
        self.locations.apply(event)
        _learn(session, event)
        found = self._close(event, place) if event.event == "close" else self._follow(event, place)
        self._t_last = event.t_end
        return found

    def _open(self, event: Event, place: int) -> None:
        pid = event.fields.get("pid")
        self.sessions.append(
            DeviceSession(
                self.device,
                t_open=event.t_begin,
                pid=int(pid) if pid is not None else None,
                comm=str(event.fields.get("comm", "")),
                first=place,
                last=place,
            )
        )
        self.locations = RingLocations()
        self._reset()
        self._building, self._wanted, self._stopping = None, None, False

    def _reset(self) -> None:
        self._status, self._suspended = 0, False
        self._enabled.clear()

    def _close(self, event: Event, place: int) -> Episode | None:
        found = self._stopped(event, place) if self.running else None
        if found is not None:
            found.closed = True
        self._reset()
        self._stopping = False
        self.session.t_close = event.t_end
        self.locations = RingLocations()
        return found

    def _follow(self, event: Event, place: int) -> Episode | None:
        ran = self.running
        wanted = frozenset(self._enabled)
        self._apply(event)
        if ran and not self.running:
            self._wanted = wanted
            return self._stopped(event, place)
        if not ran and self.running:
            return self._started(event, place)
        if self.running:
            return self._more_enabled(event, place)
        return self._between(event, place)

    def _apply(self, event: Event) -> None:
        if event.event == _STATUS:
            self._status = int(event.fields["status"])
            if not self._status:
                self._reset()
        elif event.event in (_SUSPEND, _RESUME):
            self._suspended = event.event == _SUSPEND and bool(self._status & Status.DRIVER_OK)
        elif event.event == _ENABLE:
            change = self._enabled.add if int(event.fields["num"]) else self._enabled.discard
            change(int(event.fields["index"]))

    def _stopped(self, event: Event, place: int) -> Episode:
        before = self.session.episodes[-1] if self.session.episodes else None
        shadow = before.shadow if before is not None else self._shadow()
        found = Episode(
            What.STOP, place, place, event.t_begin, event.t_end, shadow=shadow, queues=self._wanted or frozenset()
        )
        self.session.episodes.append(found)
        self._building, self._stopping = None, True
        return found

    def _started(self, event: Event, place: int) -> Episode:
        first, t_first = (place, event.t_begin) if self._building is None else (self._building, self._t_building)
        found = Episode(
            What.START, first, place, t_first, event.t_end, event.t_end, self._shadow(), frozenset(self._enabled)
        )
        self.session.episodes.append(found)
        self._building, self._stopping = None, False
        return found

    def _more_enabled(self, event: Event, place: int) -> Episode | None:
        """A start ends with the last queue that it makes ready: all that were, or, the first time, while they come."""
        found = self.session.episodes[-1] if self.session.episodes else None
        if found is None or found.what is not What.START:
            return None
        if event.event == _CONFIG_CALL and found.last == place - 1 and event.t_begin - self._t_last < IDLE_NS:
            found.last, found.t_last = place, event.t_end
            return found
        if event.event != _ENABLE or not int(event.fields["num"]):
            return None
        index = int(event.fields["index"])
        # the first time the set is unknown; later, a new one is the guest's wish
        if event.t_begin - self._t_last > IDLE_NS or (self._wanted and index not in self._wanted):
            return None
        found.queues |= {index}
        found.last, found.t_last = place, event.t_end
        return found

    def _between(self, event: Event, place: int) -> Episode | None:
        """Between a stop and a start: which of both a call belongs to."""
        if event.event == "IOTLB_BATCH_BEGIN":
            self._batch, self._t_batch = place, event.t_begin
        if event.t_begin - self._t_last > IDLE_NS or resets(event):
            # what was set up a while ago, or before a reset, is not part of the start that comes
            self._building = None
        if builds(event) and self._building is None:
            of_batch = self._batch is not None and event.event.startswith("IOTLB_")
            self._building, self._t_building = (
                (self._batch, self._t_batch) if of_batch and self._batch is not None else (place, event.t_begin)
            )
        if builds(event) and not _greets(event):
            self._stopping = False
        if event.event == "IOTLB_BATCH_END":
            self._batch = None
        if not self._stopping:
            return None
        found = self.session.episodes[-1]
        if event.t_begin - self._t_last > IDLE_NS:
            self._stopping = False
            return None
        if _stops(event) and event.event != "IOTLB_BATCH_BEGIN":
            found.last, found.t_last = place, event.t_end
            self._building = None
            return found
        return None

    def _shadow(self) -> bool | None:
        """Whether the first queue is shadowed: the last may be a control queue, which is so in passthrough as well."""
        indices = sorted(self.locations.addresses)
        return self.locations.shadowed(indices[0]) if indices else None


def resets(event: Event) -> bool:
    """Whether a call resets the device."""
    return event.event == _STATUS and not int(event.fields["status"])


def builds(event: Event) -> bool:
    """Whether a call sets something up for a start."""
    if event.event == _STATUS:
        return bool(int(event.fields["status"]))
    return event.event in _BUILDING


def _greets(event: Event) -> bool:
    """Whether a call only acknowledges the device: QEMU does so at the end of a stop, and unmaps more behind it."""
    return event.event == _STATUS and not int(event.fields["status"]) & ~(Status.ACKNOWLEDGE | Status.DRIVER)


def changes(event: Event) -> bool:
    """Whether a call changes a device's state."""
    return event.result is not None and event.result >= 0 and "_GET_" not in event.event


def _stops(event: Event) -> bool:
    if event.event == _ENABLE:
        return not int(event.fields["num"])
    return resets(event) or event.event in _STOPPING


class Followers:
    """One follower per device."""

    def __init__(self) -> None:
        self.of: dict[str, Follower] = {}

    def feed(self, event: Event) -> tuple[Follower, Episode | None]:
        """Follow an event; return its device's follower, and the episode that it began or continued."""
        follower = self.of.get(event.device)
        if follower is None:
            follower = self.of[event.device] = Follower(event.device)
        return follower, follower.feed(event)


_LEARNT: dict[str, tuple[str, str]] = {
    "VHOST_GET_FEATURES": ("offered", "features"),
    "VHOST_SET_FEATURES": ("acknowledged", "features"),
    "VHOST_GET_BACKEND_FEATURES": ("backend_offered", "backend_features"),
    "VHOST_SET_BACKEND_FEATURES": ("backend_acknowledged", "backend_features"),
    "VHOST_VDPA_GET_DEVICE_ID": ("device_id", "device_id"),
    "VHOST_VDPA_GET_VQS_COUNT": ("vqs", "vqs_count"),
}


def _learn(session: DeviceSession, event: Event) -> None:
    name = _LEARNT.get(event.event)
    if name is not None and name[1] in event.fields:
        setattr(session, name[0], int(event.fields[name[1]]))
