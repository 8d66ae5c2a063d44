# SPDX-License-Identifier: MIT
"""What would shorten a recorded downtime, each with the figure that it had in the recording.

Nothing is estimated: a figure is the time of the calls that the measure is about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.uapi import BackendFeature, name_list
from .infer import Inferred, Migration
from .narrate import amount, duration, short
from .phases import DEST, DT1, DT2
from .recorder import Event
from .sessions import DeviceSession
from .spans import GUEST_MEMORY_MIN, Kind, spans

MEMORY_NOTE = "guest_memory"
"""A note: ``shared`` or ``private`` bytes of guest memory behind a map; ``use_va`` is 1 if the device reaches it as the
process does."""
RINGS_NOTE = "ring_pages"
"""A note: queue ``index`` has shadow rings on ``runs`` physically contiguous runs of ``pages`` pages."""

NOT_ACKNOWLEDGED = "not-acknowledged"
"""The id of the advice on backend features that a program left unused."""

_SAVES = {
    BackendFeature.IOTLB_PERSIST: "keeps guest memory mapped in resets",
    BackendFeature.DESC_ASID: "keeps shadow rings out of guest memory's address space, which then stays as it is",
    BackendFeature.RESUME: "lets a switch do without a reset",
    BackendFeature.IOTLB_BATCH: "makes one map of many",
}


@dataclass(frozen=True, slots=True)
class Advice:
    """One piece of advice. ``ms`` is the time of the calls that it is about, None if it is about none."""

    id: str
    device: str
    text: str
    ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        ms = None if self.ms is None else round(self.ms, 3)
        return {"id": self.id, "device": self.device, "ms": ms, "text": self.text}


def advise(found: Inferred) -> list[Advice]:
    """Return advice for every migration's devices, what took longest first."""
    advice = [each for migration in _last(found) for each in _of_migration(found, migration)]
    advice += _of_notes(found)
    return sorted(advice, key=lambda each: -(each.ms or 0.0))


def _last(found: Inferred) -> list[Migration]:
    return list({migration.source.device: migration for migration in found.migrations}.values())


def _of_migration(found: Inferred, migration: Migration) -> Iterator[Advice]:
    source = migration.source
    for name, phases in (("DT1", DT1), ("DT2", DT2)):
        yield from _mapped_again(found, source.device, name, phases)
        yield from _one_by_one(found, source.device, name, phases)
    if migration.destination is not None:
        yield from _mapped_late(found, migration.destination)
        yield from _one_by_one(found, migration.destination.device, "the destination start", DEST)
    yield from _not_acknowledged(found, migration)


def _events(found: Inferred, device: str, phases: Sequence[str]) -> list[Event]:
    return [e for e in found.trace.events if e.device == device and e.phase in phases and (e.result or 0) >= 0]


def _memory_ns(found: Inferred, device: str, phases: Sequence[str]) -> int:
    return sum(piece.ns for piece in spans(found.trace, device, phases) if piece.kind is Kind.GUEST_MEMORY)


def _guest_bytes(events: Sequence[Event], kind: str) -> int:
    return sum(
        int(e.fields["size"]) for e in events if e.event == kind and GUEST_MEMORY_MIN <= int(e.fields["size"]) < 1 << 60
    )


def _mapped_again(found: Inferred, device: str, name: str, phases: Sequence[str]) -> Iterator[Advice]:
    events = _events(found, device, phases)
    out, back = _guest_bytes(events, "IOTLB_INVALIDATE"), _guest_bytes(events, "IOTLB_UPDATE")
    ns = _memory_ns(found, device, phases)
    if out and ns:
        again = f" and {amount(back)} mapped again" if back else ""
        yield Advice(
            "guest-memory-unmapped",
            device,
            f"{short(device)}: {amount(out)} of guest memory were unmapped{again} inside {name}: {duration(ns)} "
            "of maps that hold guest memory. IOTLB_PERSIST, and rings in an address space of their own (DESC_ASID), "
            "keep them.",
            ns / 1e6,
        )


def _mapped_late(found: Inferred, destination: DeviceSession) -> Iterator[Advice]:
    device = destination.device
    late = _guest_bytes(_events(found, device, DEST), "IOTLB_UPDATE")
    ns = _memory_ns(found, device, DEST)
    if not late or not ns:
        return
    of_device = [e for e in found.trace.events if e.device == device][destination.first : destination.last + 1]
    before = [e for e in of_device if e.phase not in DEST and (e.result or 0) >= 0]
    begin = min((e.t_begin for e in of_device if e.phase in DEST), default=0)
    early = _guest_bytes([e for e in before if e.t_begin < begin], "IOTLB_UPDATE")
    had = f", though {amount(early)} had been mapped before and were unmapped again" if early else ""
    yield Advice(
        "guest-memory-mapped-late",
        device,
        f"{short(device)}: {amount(late)} of guest memory were mapped while the guest was stopped{had}: "
        f"{duration(ns)}. Map it before the stop, and keep it through resets (IOTLB_PERSIST).",
        ns / 1e6,
    )


def _one_by_one(found: Inferred, device: str, name: str, phases: Sequence[str]) -> Iterator[Advice]:
    count = ns = 0
    open_batch = False
    for event in _events(found, device, phases):
        if event.event in ("IOTLB_BATCH_BEGIN", "IOTLB_BATCH_END"):
            open_batch = event.event == "IOTLB_BATCH_BEGIN"
        elif event.event in ("IOTLB_UPDATE", "IOTLB_INVALIDATE") and not open_batch:
            count, ns = count + 1, ns + event.t_end - event.t_begin
    if count > 1:
        yield Advice(
            "one-by-one",
            device,
            f"{short(device)}: {count} maps and unmaps outside a batch inside {name}: {duration(ns)}. A device with "
            "set_map rebuilds its address space for each; one batch (IOTLB_BATCH) makes one of them.",
            ns / 1e6,
        )


def _not_acknowledged(found: Inferred, migration: Migration) -> Iterator[Advice]:
    session = migration.source
    offered, taken = session.backend_offered, session.backend_acknowledged
    if offered is None:
        return
    left = BackendFeature(offered & ~(taken or 0))
    useful = [feature for feature in _SAVES if feature in left]
    if not useful:
        return
    ns = sum(_memory_ns(found, session.device, phases) for phases in (DT1, DT2))
    if migration.destination is not None:
        ns += _memory_ns(found, migration.destination.device, DEST)
    what = "; ".join(f"{feature.name} {_SAVES[feature]}" for feature in useful)
    about = f" Calls with guest memory inside the downtimes: {duration(ns)}." if ns else ""
    yield Advice(
        NOT_ACKNOWLEDGED,
        session.device,
        f"{short(session.device)}: offered by device and kernel, not acknowledged by {session.comm or 'the VMM'}: "
        f"{what}.{about} vhost-vdpa ladder --with RECORDING shows what each row of the series makes of it.",
        ns / 1e6 if ns else None,
    )


def not_acknowledged(session: DeviceSession) -> list[str]:
    """Return the names of the backend features that are offered and were not acknowledged."""
    if session.backend_offered is None:
        return []
    return name_list(BackendFeature(session.backend_offered & ~(session.backend_acknowledged or 0)))


def _of_notes(found: Inferred) -> Iterator[Advice]:
    private: dict[str, int] = {}
    rings: dict[str, list[Event]] = {}
    for event in found.trace.events:
        if event.event == MEMORY_NOTE and event.fields.get("use_va") and event.fields.get("private"):
            private[event.device] = max(private.get(event.device, 0), int(event.fields["private"]))
        elif event.event == RINGS_NOTE and int(event.fields["runs"]) > 1:
            rings.setdefault(event.device, []).append(event)
    for device, size in private.items():
        yield Advice(
            "private-memory",
            device,
            f"{short(device)}: {amount(size)} of guest memory are private to the process, and this device forwards "
            "frames only from shared memory. QEMU: -object memory-backend-memfd,share=on.",
        )
    for device, notes in rings.items():
        runs = sum(int(note.fields["runs"]) for note in notes)
        yield Advice(
            "scattered-rings",
            device,
            f"{short(device)}: the shadow rings of {len(notes)} queues lie on {runs} physically contiguous runs: a "
            "device that needs one entry per run has more to build. Allocate rings from huge pages.",
        )
