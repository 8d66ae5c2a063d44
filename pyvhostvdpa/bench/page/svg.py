# SPDX-License-Identifier: MIT
"""Drawing: the few shapes that the charts are made of, and a time axis. Numbers go in, markup comes out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

WIDTH = 1000
"""Of every drawing, in its own units; the page scales it."""

_HALF_LABEL = 30
"""A tick's label is less than twice as wide."""


def number(value: float) -> str:
    """Return a coordinate, short: two places, none without need."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def drawing(height: float, label: str, parts: Iterable[str], width: float = WIDTH) -> str:
    """Return an SVG element; ``label`` describes it for screen readers."""
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {number(width)} {number(height)}" role="img" aria-label="{escape(label)}">\n{body}\n</svg>'
    )


def box(kind: str, x: float, y: float, width: float, height: float, title: str) -> str:
    """Return a rectangle of a CSS class; ``title`` appears when the pointer rests on it."""
    return (
        f'<rect class="{kind}" x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}">'
        f"<title>{escape(title)}</title></rect>"
    )


def line(kind: str, begin: tuple[float, float], end: tuple[float, float]) -> str:
    """Return a straight line of a CSS class."""
    (x1, y1), (x2, y2) = begin, end
    return f'<line class="{kind}" x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"/>'


def text_at(text: str, x: float, y: float, kind: str = "", after: tuple[str, str] = ("", "")) -> str:
    """Return text at a baseline; ``after`` is more of it, of another CSS class."""
    chosen = f' class="{kind}"' if kind else ""
    more = f'<tspan class="{after[1]}" xml:space="preserve">{escape(after[0])}</tspan>' if after[0] else ""
    return f'<text{chosen} x="{number(x)}" y="{number(y)}">{escape(text)}{more}</text>'


class TimeAxis:
    """Nanoseconds to coordinates, with ticks at round values."""

    def __init__(self, longest: float, left: float, right: float, ticks: int = 6) -> None:
        self.left = left
        self.right = right
        self._longest = max(longest, 1.0)
        self._step = _round_step(self._longest / ticks)

    def x(self, ns: float) -> float:
        """Return the coordinate of a time."""
        return self.left + (self.right - self.left) * ns / self._longest

    def grid(self, top: float, bottom: float) -> list[str]:
        """Return lines at the ticks, with their labels below."""
        parts = []
        for k in range(math.floor(self._longest / self._step) + 1):
            x = self.x(k * self._step)
            parts.append(line("grid", (x, top), (x, bottom)))
            # the first is not cut where the scale begins at the drawing's edge
            middle = "s m" if x > _HALF_LABEL else "s"
            parts.append(text_at(self._tick(k * self._step), x, bottom + 14, middle))
        return parts

    def scale(self, y: float) -> list[str]:
        """Return ticks below a line, where they cross nothing."""
        return [line("grid", (self.left, y), (self.right, y)), *self.grid(y, y + 4)]

    def _tick(self, ns: float) -> str:
        """A tick's label: all in the unit of the longest, as exact as the step is."""
        if not ns:
            return "0"
        name, unit = _unit(self._longest)
        places = max(0, -math.floor(math.log10(self._step / unit) + 1e-9))
        return f"{ns / unit:.{places}f} {name}"


def _round_step(rough: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(rough))
    return next(magnitude * m for m in (1, 2, 5, 10) if magnitude * m >= rough * 0.999)


_UNITS = (("s", 1e9), ("ms", 1e6), ("µs", 1e3), ("ns", 1.0))


def _unit(ns: float) -> tuple[str, float]:
    return next((each for each in _UNITS if abs(ns) >= each[1]), _UNITS[-1])


def time_label(ns: float) -> str:
    """Return a time for people, in three digits."""
    if not ns:
        return "0"
    name, unit = _unit(ns)
    places = max(0, 2 - math.floor(math.log10(abs(ns / unit))))
    return f"{ns / unit:.{places}f} {name}"
