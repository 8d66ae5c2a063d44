# SPDX-License-Identifier: MIT
"""Two charts of downtimes: bars that say where the time goes, and what happened when."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...trace.recorder import describe
from ...trace.spans import Kind, Span, by_kind
from .svg import WIDTH, TimeAxis, box, drawing, line, text_at, time_label

CLASSES = {kind: f"k{number}" for number, kind in enumerate(Kind.__members__.values())}
"""The CSS class of each kind of span."""

_LABEL, _BAR, _GAP = 18, 22, 10
"""Heights: a bar's name and value above it, the bar, and room for the mark below it."""
_END = 26
"""Room for the half of a tick's label at the right end of the scale."""
_LANE_LABELS = 150
_PHASE, _SPANS = 16, 26
_LANE = _PHASE + _SPANS + 12
_NARROW = 0.25
"""Nothing between two calls is drawn that is narrower: it would only be blur."""
_WIDE = 4
"""Spans that are wider get an edge, which separates equal ones beside each other."""
_LETTER = 6.2
"""About the width of a letter."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: ns by kind, and the range in ns that was published. ``absent`` says why there is no bar."""

    label: str
    parts: Mapping[Any, int]
    """By kind: members of :class:`Kind`, or of another enumeration of strings that has CSS classes."""
    published: tuple[float, float] | None = None
    absent: str = ""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


def stacked(bars: Sequence[Bar], label: str, classes: Mapping[Any, str] = CLASSES, width: float = WIDTH) -> str:
    """Return a chart of bars on one scale; what was published is marked on it. ``classes`` are CSS classes by kind.

    A bar's name and value are above it, from the left: there they cross nothing, and are in sight on a narrow screen.
    """
    published = [bar.published[1] for bar in bars if bar.published and not bar.absent]
    longest = max([*published, *(bar.total for bar in bars), 1])
    axis = TimeAxis(longest, 1, width - _END)
    bottom = len(bars) * (_LABEL + _BAR + _GAP)
    parts = []
    for place, bar in enumerate(bars):
        top = place * (_LABEL + _BAR + _GAP)
        parts.append(_name(bar, top + 13))
        parts += _segments(bar, axis, top + _LABEL, classes)
        parts += _published(bar, axis, top + _LABEL)
    return drawing(bottom + 22, label, [*axis.scale(bottom), *parts], width)


def _name(bar: Bar, baseline: float) -> str:
    value = bar.absent or time_label(bar.total)
    kind = "s" if bar.absent else "v"
    return text_at(bar.label, 0, baseline, after=(f"  {value}", kind))


def _segments(bar: Bar, axis: TimeAxis, y: float, classes: Mapping[Any, str]) -> list[str]:
    parts = []
    at = 0
    for kind, ns in bar.parts.items():
        title = f"{bar.label}\n{kind.value}: {time_label(ns)}, {100 * ns / bar.total:.1f} % of {time_label(bar.total)}"
        parts.append(box(classes[kind], axis.x(at), y, axis.x(at + ns) - axis.x(at), _BAR, title))
        at += ns
    return parts


def _published(bar: Bar, axis: TimeAxis, y: float) -> list[str]:
    """A tick for what was published, a bracket for a range, below the bar."""
    if bar.published is None or bar.absent:
        return []
    low, high = (axis.x(ns) for ns in bar.published)
    bottom = y + _BAR + 5
    ends = [line("mark", (x, y), (x, bottom)) for x in dict.fromkeys((low, high))]
    between = [line("mark", (low, bottom), (high, bottom))] if high > low else []
    return ends + between


def timeline(lanes: Mapping[str, Sequence[Span]], label: str) -> str:
    """Return what each device did when, all from the begin of their own first span, on one scale."""
    longest = max((pieces[-1].t_end - pieces[0].t_begin for pieces in lanes.values() if pieces), default=1)
    axis = TimeAxis(longest, _LANE_LABELS, WIDTH - 12)
    bottom = len(lanes) * _LANE
    parts = axis.grid(0, bottom)
    for place, (device, pieces) in enumerate(lanes.items()):
        y = place * _LANE + 4
        recording, _, name = device.rpartition(":")
        # each host has a /dev/vhost-vdpa-0
        parts += [text_at(_fitting(recording), 0, y + _PHASE - 3, "s")] if recording else []
        parts.append(text_at(name.rpartition("/")[2], 0, y + _PHASE + 12))
        parts.append(text_at(time_label(pieces[-1].t_end - pieces[0].t_begin), 0, y + _PHASE + 27, "s"))
        parts += _phases(pieces, axis, y)
        parts += _spans(pieces, axis, y + _PHASE)
    return drawing(bottom + 22, label, parts)


def _fitting(text: str) -> str:
    """Return the end of a text that is too long for the labels of lanes."""
    letters = int(_LANE_LABELS / _LETTER) - 1
    return text if len(text) <= letters else f"…{text[1 - letters :]}"


def _phases(pieces: Sequence[Span], axis: TimeAxis, y: float) -> list[str]:
    parts = []
    origin = pieces[0].t_begin
    for phase, group in itertools.groupby(pieces, key=lambda piece: piece.phase):
        of_phase = list(group)
        left, right = axis.x(of_phase[0].t_begin - origin), axis.x(of_phase[-1].t_end - origin)
        took = time_label(of_phase[-1].t_end - of_phase[0].t_begin)
        parts.append(box("phase", left, y, right - left, _PHASE - 2, f"{phase}: {took}"))
        if right - left > _LETTER * (len(phase) + 1):
            parts.append(text_at(phase, left + 4, y + 11, "s"))
    return parts


def _spans(pieces: Sequence[Span], axis: TimeAxis, y: float) -> list[str]:
    parts = []
    origin = pieces[0].t_begin
    for piece in pieces:
        left, right = axis.x(piece.t_begin - origin), axis.x(piece.t_end - origin)
        if not piece.event and right - left < _NARROW:
            continue
        call = f"{piece.event} {describe(piece.fields)}".strip() or piece.kind.value
        title = f"{call}\n{piece.kind.value}, {time_label(piece.ns)} at {time_label(piece.t_begin - origin)}"
        edge = " edge" if right - left > _WIDE else ""
        parts.append(box(CLASSES[piece.kind] + edge, left, y, max(right - left, 0.3), _SPANS, title))
    return parts


def sums(devices: Mapping[str, Sequence[Span]], worst: bool) -> dict[Kind, int]:
    """Return ns by kind of the device that took longest, or of all devices together."""
    of_devices = [list(pieces) for pieces in devices.values()]
    if worst:
        of_devices = [max(of_devices, key=lambda pieces: sum(piece.ns for piece in pieces), default=[])]
    return by_kind(itertools.chain.from_iterable(of_devices))
