# SPDX-License-Identifier: MIT
"""What a downtime is made of: a list of spans without a gap, whose sum it is.

Each span is a system call, or the time between two of them; each is of a
:class:`Kind`, so that one can say where the time goes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..base.uapi import Status
from .phases import DT1, DT2
from .recorder import Event, Fields, Trace, describe

SCHEMA = "pyvhostvdpa/spans/1"
GUEST_MEMORY_MIN = 4 << 20
"""An address space with a map of this many bytes holds guest memory: the largest shadow ring takes 0.8 MiB."""


class Kind(enum.StrEnum):
    """What a span of time was spent on."""

    SUSPEND = "suspend"
    BASES = "bases"
    RESET = "reset"
    GUEST_MEMORY = "maps with guest memory"
    RINGS = "maps of rings only"
    DRIVER_OK = "DRIVER_OK"
    REPLAY = "control queue replay"
    ENABLE = "enable"
    OTHER = "other calls"
    BETWEEN = "between calls"


_OF_CALL = {
    "VHOST_VDPA_SUSPEND": Kind.SUSPEND,
    "VHOST_VDPA_RESUME": Kind.SUSPEND,
    "VHOST_GET_VRING_BASE": Kind.BASES,
    "VHOST_VDPA_SET_VRING_ENABLE": Kind.ENABLE,
}
_REPLAY = "vhost_vdpa_net_load_"


class Span(NamedTuple):
    """A piece of a downtime. Times are CLOCK_MONOTONIC in nanoseconds; ``event`` is "" between calls."""

    t_begin: int
    t_end: int
    device: str
    phase: str
    kind: Kind
    event: str
    fields: Fields

    @property
    def ns(self) -> int:
        """Its length."""
        return self.t_end - self.t_begin

    def to_dict(self, origin: int) -> dict[str, Any]:
        """Return the fields for JSON, with times in milliseconds from ``origin``."""
        return {
            "at_ms": (self.t_begin - origin) / 1e6,
            "ms": self.ns / 1e6,
            "phase": self.phase,
            "kind": self.kind.value,
            "event": self.event,
            "arguments": describe(self.fields),
        }


class Maps:
    """One device's maps by address space, followed through its events as the kernel keeps them.

    A reset leaves them; INVALIDATE takes every map that it touches, whole
    (drivers/vhost/vdpa.c:vhost_vdpa_unmap); open and close start again from nothing.
    """

    def __init__(self) -> None:
        self.spaces: dict[int, dict[int, int]] = {}
        """Size by IOVA, by address space."""
        self._large: dict[int, int] = {}
        self._bytes: dict[int, int] = {}

    def apply(self, event: Event) -> None:
        """Follow one event."""
        if (event.result or 0) < 0:
            return
        if event.event in ("open", "close"):
            self.spaces.clear()
            self._large.clear()
            self._bytes.clear()
        if event.event not in ("IOTLB_UPDATE", "IOTLB_INVALIDATE"):
            return
        asid, iova, size = (int(event.fields[name]) for name in ("asid", "iova", "size"))
        space = self.spaces.setdefault(asid, {})
        if event.event == "IOTLB_UPDATE":
            self._unmapped(asid, iova)
            space[iova] = size
            self._count(asid, size, 1)
        elif space.get(iova) == size:
            # maps do not overlap, so it is the only one: there may be a hundred thousand
            self._unmapped(asid, iova)
        else:
            for at in [at for at, length in space.items() if at < iova + size and iova < at + length]:
                self._unmapped(asid, at)

    def _unmapped(self, asid: int, iova: int) -> None:
        size = self.spaces[asid].pop(iova, None)
        if size is not None:
            self._count(asid, size, -1)

    def _count(self, asid: int, size: int, number: int) -> None:
        self._bytes[asid] = self._bytes.get(asid, 0) + number * size
        if size >= GUEST_MEMORY_MIN:
            self._large[asid] = self._large.get(asid, 0) + number

    def bytes(self, asid: int) -> int:
        """Return how many bytes are mapped in an address space."""
        return self._bytes.get(asid, 0)

    def with_guest_memory(self, asid: int) -> bool:
        """Return whether an address space holds guest memory, or maps that large."""
        return self._large.get(asid, 0) > 0


def kinds(events: Sequence[Event]) -> list[Kind]:
    """Return the kind of each event of one device, all from its opening on."""
    maps = Maps()
    found: list[Kind] = []
    batch: list[int] = []
    for place, event in enumerate(events):
        before = _guest_memory(maps, event)
        maps.apply(event)
        found.append(_kind(event, before or _guest_memory(maps, event)))
        if event.event == "IOTLB_BATCH_BEGIN":
            batch = [place]
        elif batch and event.event.startswith("IOTLB_"):
            batch.append(place)
            if event.event == "IOTLB_BATCH_END":
                _settle(found, batch)
                batch = []
    return found


def _settle(found: list[Kind], batch: list[int]) -> None:
    """What one message of a batch brings in or takes out is rebuilt at its end, so all are of one kind."""
    if any(found[place] is Kind.GUEST_MEMORY for place in batch):
        for place in batch:
            found[place] = Kind.GUEST_MEMORY


def _guest_memory(maps: Maps, event: Event) -> bool:
    return event.event.startswith("IOTLB_") and maps.with_guest_memory(int(event.fields["asid"]))


def _kind(event: Event, guest_memory: bool) -> Kind:
    if event.event.startswith("IOTLB_"):
        return Kind.GUEST_MEMORY if guest_memory else Kind.RINGS
    if event.event == "VHOST_VDPA_SET_STATUS":
        status = int(event.fields["status"])
        return Kind.RESET if not status else Kind.DRIVER_OK if status & Status.DRIVER_OK else Kind.OTHER
    return _OF_CALL.get(event.event, Kind.OTHER)


def spans(trace: Trace, device: str, phases: Sequence[str]) -> list[Span]:
    """Return what a device's phases were spent on, in order and without a gap between the spans.

    Their sum is :func:`~pyvhostvdpa.trace.downtime.interval`'s length.
    Where calls of several threads overlap, the earlier one is charged.
    """
    events = [event for event in trace.events if event.device == device]
    chosen = sorted(
        ((event, kind) for event, kind in zip(events, kinds(events), strict=True) if event.phase in phases),
        key=lambda pair: (pair[0].t_begin, pair[0].t_end),
    )
    found: list[Span] = []
    previous: Event | None = None
    at = chosen[0][0].t_begin if chosen else 0
    for event, kind in chosen:
        if event.t_begin > at:
            _append_gap(found, Span(at, event.t_begin, device, event.phase, _between(previous, event), "", {}))
            at = event.t_begin
        if event.t_end > at:
            found.append(Span(at, event.t_end, device, event.phase, kind, event.event, event.fields))
            at = event.t_end
        previous = event
    return found


def _between(previous: Event | None, event: Event) -> Kind:
    replay = previous is not None and previous.event.startswith(_REPLAY) and event.event.startswith(_REPLAY)
    return Kind.REPLAY if replay else Kind.BETWEEN


def _append_gap(found: list[Span], gap: Span) -> None:
    """Notes end a gap and take no time: what lies on both sides of one is one gap."""
    last = found[-1] if found else None
    if last is not None and not last.event and (last.kind, last.phase) == (gap.kind, gap.phase):
        found[-1] = last._replace(t_end=gap.t_end)
    else:
        found.append(gap)


def by_kind(pieces: Iterable[Span]) -> dict[Kind, int]:
    """Return nanoseconds by kind, in the order of :class:`Kind`, those that did not occur left out."""
    sums: dict[Kind, int] = dict.fromkeys(Kind.__members__.values(), 0)
    for span in pieces:
        sums[span.kind] += span.ns
    return {kind: ns for kind, ns in sums.items() if ns}


def downtimes(trace: Trace) -> dict[str, dict[str, list[Span]]]:
    """Return the spans of DT1 and DT2 (keys ``dt1`` and ``dt2``) by device; devices without are left out."""
    result: dict[str, dict[str, list[Span]]] = {}
    for name, phases in (("dt1", DT1), ("dt2", DT2)):
        of_device = {device: spans(trace, device, phases) for device in trace.devices()}
        result[name] = {device: pieces for device, pieces in of_device.items() if pieces}
    return result


def to_dict(trace: Trace) -> dict[str, list[dict[str, Any]]]:
    """Return the spans of DT1 and DT2 for JSON: a list of devices each, with ``ms``, sums by kind, and the spans."""
    return {
        name: [
            {
                "device": device,
                "ms": sum(span.ns for span in pieces) / 1e6,
                "by_kind": {kind.value: ns / 1e6 for kind, ns in by_kind(pieces).items()},
                "spans": [span.to_dict(pieces[0].t_begin) for span in pieces],
            }
            for device, pieces in devices.items()
        ]
        for name, devices in downtimes(trace).items()
    }
