# SPDX-License-Identifier: MIT
"""Stop to run in the ladder's page: a table and a stacked bar for each row, from the report alone."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ...trace import gap
from .charts import Bar, stacked
from .page import cell, figure, heading, paragraph, wide_table

RowJson = Mapping[str, Any]


class StoppedPart(enum.StrEnum):
    """What the time was spent on in which the guest was paused."""

    PAUSE = "pause of the guest"
    STOP = "stop of the source's devices"
    COLLECT = "collecting dirty pages"
    LAST_ROUND = "last round of memory"
    STATE = "state"
    LOAD = "loading it"
    HAND_OVER = "READY and GO"
    START = "destination start"
    BETWEEN = "between them"


_OF_PHASE = dict(zip((*gap.ORDER, gap.BETWEEN), StoppedPart.__members__.values(), strict=True))
_CLASSES = {part: f"k{number}" for number, part in enumerate(StoppedPart.__members__.values())}
_NOTHING = "-"


def section(rows: Sequence[RowJson]) -> list[str]:
    """Return the section; nothing if no row has the figure."""
    if all(row.get("stop_to_run_ms") is None for row in rows):
        return []
    bars = [_bar(row) for row in rows]
    small = [bar for bar in bars if bar.total and bar.total * 8 < max(each.total for each in bars)]
    parts = [
        heading("Stop to run"),
        paragraph(
            "From the guest's pause to its last data queue running at the destination, over all devices: what the "
            "guest feels. The floor is what the devices take to stop their queues and let them go, side by side, "
            "whatever is done. No memory moves here: the last round of a migration comes on top."
        ),
        _table(rows),
        _legend(bars),
        figure(stacked(bars, "stop to run by row", _CLASSES), "Stop to run; one run of each row."),
    ]
    if len(small) > 1:
        parts.append(figure(stacked(small, "stop to run of the short rows", _CLASSES), "The short rows, larger."))
    return parts


def _bar(row: RowJson) -> Bar:
    of_row = row.get("stop_to_run_parts_ms") or {}
    absent = "" if of_row else "not possible on these devices" if row.get("impossible") else "not measured"
    return Bar(str(row.get("title") or row["row"]), {_OF_PHASE[phase]: int(ms * 1e6) for phase, ms in of_row.items()},
               absent=absent)  # fmt: skip


def _table(rows: Sequence[RowJson]) -> str:
    names = ("stop to run, ms", "floor", "ratio", "switch: DT1, ms", "floor", "ratio")
    head = "<tr><th></th>" + "".join(f'<th class="n">{escape(name)}</th>' for name in names) + "</tr>"
    return wide_table(head, "\n".join(_line(row) for row in rows))


def _line(row: RowJson) -> str:
    floor, ratio = row.get("floor_ms") or {}, row.get("floor_ratio") or {}
    dt1 = (row.get("dt1_ms") or {}).get("worst")
    cells = [
        cell(_ms(row.get("stop_to_run_ms")), "n strong"),
        cell(_ms(floor.get("stop_to_run"))),
        cell(_times(ratio.get("stop_to_run"))),
        cell(_ms(dt1), "n strong"),
        cell(_ms(floor.get("switch"))),
        cell(_times(ratio.get("switch"))),
    ]
    return f"<tr><th>{escape(str(row.get('title') or row['row']))}</th>{''.join(cells)}</tr>"


def _ms(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:,.2f}"


def _times(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:,.1f} x"


def _legend(bars: Sequence[Bar]) -> str:
    used = [part for part in _CLASSES if any(bar.parts.get(part) for bar in bars)]
    return (
        '<ul class="legend">'
        + "".join(f'<li><i class="{_CLASSES[part]}"></i>{escape(part.value)}</li>' for part in used)
        + "</ul>"
    )
