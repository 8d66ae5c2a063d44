# SPDX-License-Identifier: MIT
"""Two charts of downtimes: bars that say where the time goes, and what happened when."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...trace.recorder import describe
from ...trace.spans import Kind, Span, by_kind
from .svg import WIDTH, TimeAxis, box, drawing, duration, line, words

CLASSES = {kind: f"k{number}" for number, kind in enumerate(Kind.__members__.values())}
"""The CSS class of each kind of span."""

_LABELS = 300
"""Where the labels of bars end."""
_VALUES = 76
"""Room for a bar's value, at the right."""
_BAR, _GAP = 22, 12
_LANE_LABELS = 150
_PHASE, _SPANS = 16, 26
_LANE = _PHASE + _SPANS + 12
_NARROW = 0.25
"""Nothing between two calls is drawn that is narrower: it would only be blur."""
_WIDE = 4
"""Spans that are wider get an edge, so that equal ones beside each other can be told apart."""
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


def stacked(bars: Sequence[Bar], label: str, classes: Mapping[Any, str] = CLASSES) -> str:
    """Return a chart of bars on one scale; what was published is marked on it. ``classes`` are CSS classes by kind."""
    published = [bar.published[1] for bar in bars if bar.published and not bar.absent]
    longest = max([*published, *(bar.total for bar in bars), 1])
    axis = TimeAxis(longest, _LABELS + 12, WIDTH - _VALUES)
    bottom = len(bars) * (_BAR + _GAP)
    parts = axis.grid(0, bottom)
    for place, bar in enumerate(bars):
        y = place * (_BAR + _GAP) + _GAP / 2
        parts.append(words(bar.label, _LABELS, y + 15, "e"))
        parts += _segments(bar, axis, y, classes)
        parts += _published(bar, axis, y)
    return drawing(bottom + 22, label, parts)


def _segments(bar: Bar, axis: TimeAxis, y: float, classes: Mapping[Any, str]) -> list[str]:
    if bar.absent:
        return [words(bar.absent, axis.left + 6, y + 15, "s")]
    parts = []
    at = 0
    for kind, ns in bar.parts.items():
        title = f"{bar.label}\n{kind.value}: {duration(ns)}, {100 * ns / bar.total:.1f} % of {duration(bar.total)}"
        parts.append(box(classes[kind], axis.x(at), y, axis.x(at + ns) - axis.x(at), _BAR, title))
        at += ns
    return [*parts, words(duration(bar.total), WIDTH, y + 15, "v e")]


def _published(bar: Bar, axis: TimeAxis, y: float) -> list[str]:
    """A tick for what was published, a bracket for a range."""
    if bar.published is None or bar.absent:
        return []
    low, high = (axis.x(ns) for ns in bar.published)
    ends = [line("mark", (x, y - 4), (x, y + _BAR + 4)) for x in dict.fromkeys((low, high))]
    between = [line("mark", (low, y - 4), (high, y - 4))] if high > low else []
    return ends + between


def timeline(lanes: Mapping[str, Sequence[Span]], label: str) -> str:
    """Return what each device did when, all from the begin of their own first span, on one scale."""
    longest = max((pieces[-1].t_end - pieces[0].t_begin for pieces in lanes.values() if pieces), default=1)
    axis = TimeAxis(longest, _LANE_LABELS, WIDTH - 12)
    bottom = len(lanes) * _LANE
    parts = axis.grid(0, bottom)
    for place, (device, pieces) in enumerate(lanes.items()):
        y = place * _LANE + 4
        parts.append(words(device.rpartition("/")[2], 0, y + _PHASE + 12))
        parts.append(words(duration(pieces[-1].t_end - pieces[0].t_begin), 0, y + _PHASE + 27, "s"))
        parts += _phases(pieces, axis, y)
        parts += _spans(pieces, axis, y + _PHASE)
    return drawing(bottom + 22, label, parts)


def _phases(pieces: Sequence[Span], axis: TimeAxis, y: float) -> list[str]:
    parts = []
    origin = pieces[0].t_begin
    for phase, group in itertools.groupby(pieces, key=lambda piece: piece.phase):
        of_phase = list(group)
        left, right = axis.x(of_phase[0].t_begin - origin), axis.x(of_phase[-1].t_end - origin)
        took = duration(of_phase[-1].t_end - of_phase[0].t_begin)
        parts.append(box("phase", left, y, right - left, _PHASE - 2, f"{phase}: {took}"))
        if right - left > _LETTER * (len(phase) + 1):
            parts.append(words(phase, left + 4, y + 11, "s"))
    return parts


def _spans(pieces: Sequence[Span], axis: TimeAxis, y: float) -> list[str]:
    parts = []
    origin = pieces[0].t_begin
    for piece in pieces:
        left, right = axis.x(piece.t_begin - origin), axis.x(piece.t_end - origin)
        if not piece.event and right - left < _NARROW:
            continue
        call = f"{piece.event} {describe(piece.fields)}".strip() or piece.kind.value
        title = f"{call}\n{piece.kind.value}, {duration(piece.ns)} at {duration(piece.t_begin - origin)}"
        edge = " edge" if right - left > _WIDE else ""
        parts.append(box(CLASSES[piece.kind] + edge, left, y, max(right - left, 0.3), _SPANS, title))
    return parts


def sums(devices: Mapping[str, Sequence[Span]], worst: bool) -> dict[Kind, int]:
    """Return ns by kind of the device that took longest, or of all devices together."""
    of_devices = [list(pieces) for pieces in devices.values()]
    if worst:
        of_devices = [max(of_devices, key=lambda pieces: sum(piece.ns for piece in pieces), default=[])]
    return by_kind(itertools.chain.from_iterable(of_devices))
