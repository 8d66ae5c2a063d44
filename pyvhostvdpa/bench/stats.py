# SPDX-License-Identifier: MIT
"""Medians, spreads, percentiles, and the curve behind a row of measurements."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_FAR = 3.0
"""Spreads from the median at which a repetition is called an outlier."""
_FEW = 4
"""With no more repetitions than that, no outliers are named: there is no spread to compare with."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Repetitions of one thing, in ns: the median, the distance of the quartiles, and what lies far off."""

    median: float
    spread: float
    outliers: tuple[int, ...]
    repeated: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, in ns."""
        return {
            "median": round(self.median),
            "spread": round(self.spread),
            "outliers": list(self.outliers),
            "repeated": self.repeated,
        }

    def scaled(self, divisor: float) -> tuple[float, float]:
        """Return median and spread of a part, such as one message of many."""
        return self.median / divisor, self.spread / divisor


def summarize(values: Sequence[int]) -> Distribution:
    """Return the summary of at least one repetition."""
    median = statistics.median(values)
    spread = percentile(values, 75) - percentile(values, 25)
    # a spread of nothing, as in virtual time, must not make everything an outlier
    far = max(_FAR * spread, 0.05 * median)
    odd = tuple(v for v in values if abs(v - median) > far) if len(values) > _FEW else ()
    return Distribution(median, spread, odd, len(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which ``percent`` of the values lie, interpolated."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


_WORTH = 0.5
"""By how much a further coefficient has to bring the squared error down."""


@dataclass(frozen=True, slots=True)
class Fit:
    """``constant + linear * n + quadratic * n * n``, in ns; ``worst`` is the largest relative error over the points."""

    constant: float
    linear: float
    quadratic: float
    worst: float

    def at(self, n: float) -> float:
        """Return the curve's value."""
        return self.constant + self.linear * n + self.quadratic * n * n

    def in_words(self) -> str:
        """Return the formula for people, in microseconds."""
        terms = ((self.constant, "us"), (self.linear, "us n"), (self.quadratic, "us n²"))
        return " + ".join(f"{value / 1e3:.3g} {unit}" for value, unit in terms if value) or "0"

    def to_dict(self) -> dict[str, float]:
        """Return the fields for JSON, in ns."""
        return {
            "constant_ns": round(self.constant, 1),
            "linear_ns": round(self.linear, 3),
            "quadratic_ns": round(self.quadratic, 6),
            "worst_relative_error": round(self.worst, 4),
        }


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """Return the curve that is least wrong relative to each point; None with fewer than three different n.

    No coefficient is negative, since nothing gets cheaper by being done more.
    There are fewer coefficients than points, so that the error says
    something, and one more has to halve it.
    """
    distinct = len({n for n, _ in points})
    if distinct < 3 or any(t <= 0 for _, t in points):
        return None
    best: tuple[float, tuple[float, ...], int] | None = None
    for size in range(1, min(3, distinct - 1) + 1):
        for powers in itertools.combinations(range(3), size):
            found = _least_squares(points, powers)
            if found is not None and (best is None or found[0] < best[0] * (0.999 if size == best[2] else _WORTH)):
                best = (*found, size)
    if best is None:
        return None
    constant, linear, quadratic = best[1]
    curve = Fit(constant, linear, quadratic, 0.0)
    worst = max(abs(curve.at(n) / t - 1) for n, t in points)
    return Fit(constant, linear, quadratic, worst)


def _least_squares(
    points: Sequence[tuple[float, float]], powers: Sequence[int]
) -> tuple[float, tuple[float, ...]] | None:
    """Return the squared relative error and all three coefficients; None if one came out negative."""
    rows = [[n**power / t for power in powers] for n, t in points]
    size = len(powers)
    matrix = [[sum(r[i] * r[j] for r in rows) for j in range(size)] + [sum(r[i] for r in rows)] for i in range(size)]
    solved = _solve(matrix)
    if solved is None or any(c < 0 for c in solved):
        return None
    error = sum((sum(c * x for c, x in zip(solved, row, strict=True)) - 1) ** 2 for row in rows)
    coefficients = [0.0, 0.0, 0.0]
    for power, value in zip(powers, solved, strict=True):
        coefficients[power] = value
    return error, tuple(coefficients)


def _solve(matrix: list[list[float]]) -> list[float] | None:
    """Return the solution of a small linear system (Gauss-Jordan with pivoting), None if it has none."""
    size = len(matrix)
    # columns differ by the magnitude of n and n squared
    scale = [math.sqrt(matrix[i][i]) or 1.0 for i in range(size)]
    m = [[matrix[i][j] / scale[i] / scale[j] for j in range(size)] + [matrix[i][size] / scale[i]] for i in range(size)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(m[row][column]))
        if abs(m[pivot][column]) < 1e-12:
            return None
        m[column], m[pivot] = m[pivot], m[column]
        for row in range(size):
            if row != column:
                factor = m[row][column] / m[column][column]
                m[row] = [a - factor * b for a, b in zip(m[row], m[column], strict=True)]
    return [m[i][size] / m[i][i] / scale[i] for i in range(size)]
