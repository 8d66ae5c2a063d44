"""Draw the picture of the page on recordings: what each part of a move consists of, from a recording.

python3 tools/bench/watch_picture.py RECORDING.jsonl OUT.svg
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from pyvhostvdpa.bench import page
from pyvhostvdpa.bench.page.charts import CLASSES, Bar, stacked
from pyvhostvdpa.bench.page.svg import box, text_at
from pyvhostvdpa.trace import records
from pyvhostvdpa.trace.infer import pieces
from pyvhostvdpa.trace.spans import Kind
from pyvhostvdpa.trace.summary import summarize

WIDTH, MARGIN = 540, 8
"""In the picture's units. A phone shows it at three quarters."""
LEGEND_TOP = 16
COLUMN = 178
LINE = 18


def style() -> str:
    """Return the page's colours by day and by night, for a picture that stands alone."""
    css = (resources.files(page) / "page.css").read_text()
    day, night = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in css.split("* {")[0].split("@media"))
    shape = (
        "text { font: 12px sans-serif } text.s { font-size: 11px } .v { font-weight: 600 } .m { text-anchor: middle }"
    )
    return "\n".join([shape, *_colours(day), "@media (prefers-color-scheme: dark) {", *_colours(night), "}"])


def _colours(of: Mapping[str, str]) -> list[str]:
    rules = [f".{name} {{ fill: {of[name]} }}" for name in CLASSES.values()]
    plain = f"text {{ fill: {of['ink']} }} text.s {{ fill: {of['soft']} }} .paper {{ fill: {of['paper']} }}"
    return [plain, f".grid {{ stroke: {of['rule']} }}", *rules]


def bars(path: Path) -> list[Bar]:
    """Return one bar for each part of the recording's last move, and one for the whole stop to run."""
    with path.open(encoding="utf-8") as file:
        trace, about = records.read_recording(file)
    summary = summarize(trace, about)
    migration = summary.found.migrations[-1]
    gap = pieces(migration)
    if gap is None or migration.destination is None:
        raise SystemExit(f"{path} has no move from one device to another")
    source, destination = migration.source.device, migration.destination.device
    between = {Kind.BETWEEN: int(gap.by_phase().get("between", 0.0) * 1e6)}
    stop, start = summary.kinds(source, "dt2"), summary.kinds(destination, "dest")
    whole = {kind: sum(part.get(kind, 0) for part in (stop, between, start)) for kind in Kind}
    return [
        Bar("switch to shadow rings (DT1)", summary.kinds(source, "dt1")),
        Bar("stop on the source (DT2)", stop),
        Bar("between the two processes", between),
        Bar("destination start", start),
        Bar("stop to run", {kind: ns for kind, ns in whole.items() if ns}),
    ]


def main(recording: str, out: str) -> None:
    """Draw it."""
    found = bars(Path(recording))
    kinds = [kind for kind in Kind if any(bar.parts.get(kind) for bar in found)]
    chart = stacked(found, "where the time of a move goes, by kind of call", width=WIDTH)
    height = float(re.search(r'viewBox="0 0 \d+ ([\d.]+)"', chart).group(1))  # type: ignore[union-attr]
    across = WIDTH // COLUMN
    legend = []
    for place, kind in enumerate(kinds):
        x, y = place % across * COLUMN, height + LEGEND_TOP + place // across * LINE
        legend += [box(CLASSES[kind], x, y, 12, 12, kind.value), text_at(kind.value, x + 18, y + 10)]
    total = height + LEGEND_TOP + -(-len(kinds) // across) * LINE + 2 * MARGIN
    wide = WIDTH + 2 * MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {total:g}" width="{wide}" height="{total:g}">'
    inner = chart.partition("\n")[2].rpartition("\n")[0]
    body = [head, f"<style>{style()}</style>", '<rect class="paper" width="100%" height="100%"/>']
    body += [f'<g transform="translate({MARGIN} {MARGIN})">', inner, *legend, "</g>"]
    Path(out).write_text("\n".join([*body, "</svg>", ""]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
