# SPDX-License-Identifier: MIT
"""A trace as a file that ui.perfetto.dev opens: Chrome's trace event format, as JSON.

A device is a process. Its threads are tracks: each downtime with what it is
made of, the device's own calls, each address space, each queue. Slices
nest: phase, batch, call. They are pairs of begin and end, so that rounding to
the format's microseconds cannot push a call out of its phase.

Source: "Trace Event Format" of the Chromium project.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from .recorder import Event, Fields, Trace, describe
from .spans import Maps, downtimes

_DEVICE = ("", 0)
"""The track of calls that concern neither a queue nor an address space."""


@dataclass
class _Slice:
    name: str
    t_begin: int
    t_end: int
    category: str
    fields: Fields = field(default_factory=dict)
    children: list[_Slice] = field(default_factory=list)


def write(trace: Trace, file: TextIO) -> None:
    """Write the file. Times are in microseconds from the first event; ``otherData`` has that one's own time."""
    json.dump(to_dict(trace), file)
    file.write("\n")


def to_dict(trace: Trace) -> dict[str, Any]:
    """Return the file's content."""
    origin = min((event.t_begin for event in trace.events), default=0)
    found: list[dict[str, Any]] = []
    for process, device in enumerate(trace.devices(), 1):
        found += _Process(trace, device, process, origin).events()
    return {
        "traceEvents": found,
        "displayTimeUnit": "ms",
        "otherData": {"clock": "CLOCK_MONOTONIC", "origin_ns": origin, "dropped_events": trace.dropped},
    }


class _Process:
    """One device's tracks."""

    def __init__(self, trace: Trace, device: str, process: int, origin: int) -> None:
        self._trace = trace
        self._device = device
        self._process = process
        self._origin = origin
        self._thread = 0
        self._all = [event for event in trace.events if event.device == device]

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield everything of this device: names first, then track by track."""
        yield self._name("process_name", 0, name=self._device)
        yield self._name("process_sort_index", 0, sort_index=self._process)
        for name, slices in self._downtimes().items():
            yield from self._track(name, [slices])
        notes = [event for event in self._all if event.result is None]
        calls = sorted((e for e in self._all if e.result is not None), key=lambda e: (e.t_begin, e.t_end))
        for kind, of_track in itertools.groupby(sorted(calls, key=_track), key=_track):
            for lane, events in enumerate(_lanes(list(of_track))):
                title = f"{kind[0]} {kind[1]}" if kind[0] else "device"
                yield from self._track(title + (f" ({lane + 1})" if lane else ""), _phases(events))
        if notes:
            yield from self._track("decisions", [])
            for event in notes:
                yield self._event("i", event.t_begin, event.event, "note", event.fields) | {"s": "t"}
        yield from self._mapped()

    def _downtimes(self) -> dict[str, _Slice]:
        slices = {}
        for name, devices in downtimes(self._trace).items():
            pieces = devices.get(self._device)
            if pieces:
                inner = [
                    _Slice(p.kind.value, p.t_begin, p.t_end, "span", {**p.fields, "call": p.event}) for p in pieces
                ]
                whole = _Slice(name.upper(), pieces[0].t_begin, pieces[-1].t_end, "downtime", {}, inner)
                slices[f"what {whole.name} is made of"] = whole
        return slices

    def _track(self, title: str, slices: Sequence[_Slice]) -> Iterator[dict[str, Any]]:
        """Begin the next track, with these slices on it."""
        self._thread += 1
        yield self._name("thread_name", self._thread, name=title)
        yield self._name("thread_sort_index", self._thread, sort_index=self._thread)
        for each in slices:
            yield from self._nested(each)

    def _nested(self, each: _Slice) -> Iterator[dict[str, Any]]:
        yield self._event("B", each.t_begin, each.name, each.category, each.fields)
        for child in each.children:
            yield from self._nested(child)
        yield self._event("E", each.t_end, each.name, each.category, {})

    def _mapped(self) -> Iterator[dict[str, Any]]:
        """Bytes mapped in each address space, as a counter."""
        maps = Maps()
        for event in self._all:
            maps.apply(event)
            if event.event in ("IOTLB_UPDATE", "IOTLB_INVALIDATE"):
                asid = int(event.fields["asid"])
                mapped = {"bytes": maps.bytes(asid)}
                yield self._event("C", event.t_end, f"mapped in address space {asid}", "maps", mapped)

    def _name(self, kind: str, thread: int, **arguments: str | int) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": self._process, "tid": thread, "args": arguments}

    def _event(self, ph: str, t: int, name: str, category: str, fields: Fields) -> dict[str, Any]:
        return {
            "ph": ph,
            "ts": (t - self._origin) / 1000,
            "pid": self._process,
            "tid": self._thread,
            "name": name,
            "cat": category,
            "args": dict(fields),
        }


def _track(event: Event) -> tuple[str, int]:
    if event.event.startswith("IOTLB_"):
        return ("address space", int(event.fields["asid"]))
    if "VRING" in event.event and "index" in event.fields:
        return ("queue", int(event.fields["index"]))
    return _DEVICE


def _lanes(events: list[Event]) -> list[list[Event]]:
    """Spread events, in order of their begin, so that within a lane none overlaps the next."""
    lanes: list[list[Event]] = []
    for event in events:
        free = next((lane for lane in lanes if lane[-1].t_end <= event.t_begin), None)
        if free is None:
            lanes.append([event])
        else:
            free.append(event)
    return lanes


def _phases(events: Sequence[Event]) -> list[_Slice]:
    slices: list[_Slice] = []
    for phase, of_phase in itertools.groupby(events, key=lambda event: event.phase):
        inner = _batches(list(of_phase))
        slices += [_around(phase, "phase", inner)] if phase else inner
    return slices


def _batches(events: Sequence[Event]) -> list[_Slice]:
    """Calls as slices; the messages of a batch in one slice around them."""
    slices: list[_Slice] = []
    batch: list[_Slice] | None = None
    for event in events:
        if event.event == "IOTLB_BATCH_BEGIN" and batch is None:
            batch = []
        (slices if batch is None else batch).append(_call(event))
        if event.event == "IOTLB_BATCH_END" and batch is not None:
            slices.append(_around("batch", "batch", batch))
            batch = None
    return slices + (batch or [])


def _call(event: Event) -> _Slice:
    fields = {**event.fields, "text": describe(event.fields), "result": event.result or 0}
    return _Slice(event.event, event.t_begin, event.t_end, "call", fields)


def _around(name: str, category: str, inner: list[_Slice]) -> _Slice:
    return _Slice(name, inner[0].t_begin, inner[-1].t_end, category, {}, inner)
