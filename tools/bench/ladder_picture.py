"""Draw how long each row of the ladder stops a guest, from what `vhost-vdpa ladder --json` printed.

python3 tools/bench/ladder_picture.py LADDER.json OUT.svg
"""

from __future__ import annotations

import json
import math
import sys
from html import escape
from pathlib import Path
from typing import Any

WIDTH, VALUES, STEP, BAR, TEXT = 520, 76, 38, 14, 13
"""In the picture's units. A phone shows it at three quarters: each bar has its name above it, not beside it."""
STYLE = """text{font:13px system-ui,sans-serif;fill:#24292f}.b{fill:#fff}
.q{fill:#8c959f}.o{fill:#1f6feb}.g{stroke:#d0d7de}.s{fill:#57606a}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.b{fill:#0d1117}.g{stroke:#3d444d}.s{fill:#9198a1}.q{fill:#656c76}
.o{fill:#4493f8}}"""
TITLE = (
    "How long the guest is stopped, on a logarithmic scale:",
    "QEMU's patches row by row (grey), this package (blue)",
)
LEFT = 8


def label(ms: float) -> str:
    """Return a time in words."""
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms"


def tick(ms: int) -> str:
    """Return a power of ten for the scale."""
    return f"{ms // 1000} s" if ms >= 1000 else f"{ms} ms"


def picture(rows: list[dict[str, Any]]) -> str:
    """Return the drawing: bars on a logarithmic scale, this package's rows in another colour."""
    shown = [row for row in rows if row.get("stop_to_run_ms")]
    last = math.ceil(math.log10(max(row["stop_to_run_ms"] for row in shown)))
    right = WIDTH - VALUES

    def x(ms: float) -> float:
        return LEFT + (right - LEFT) * math.log10(max(ms, 1)) / last

    top = 18 * len(TITLE) + 8
    bottom = top + STEP * len(shown) + 4
    parts = [f'<rect class="b" width="{WIDTH}" height="{bottom + 24}"/>']
    parts += [f'<text x="{LEFT}" y="{18 * (i + 1)}">{escape(line)}</text>' for i, line in enumerate(TITLE)]
    for number, row in enumerate(shown):
        y, ms = top + number * STEP, row["stop_to_run_ms"]
        own = row["published"] is None
        parts.append(f'<text x="{LEFT}" y="{y + TEXT}">{escape(row["title"])}</text>')
        size = f'x="{LEFT}" y="{y + TEXT + 5}" width="{x(ms) - LEFT:.1f}" height="{BAR}"'
        parts.append(f'<rect class="{"o" if own else "q"}" {size} rx="2"/>')
        parts.append(f'<text x="{x(ms) + 6:.1f}" y="{y + TEXT + 5 + BAR - 2}">{label(ms)}</text>')
    # a scale below the bars: lines through the picture would cross the names
    parts.append(f'<line class="g" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for power in range(last + 1):
        at = x(10**power)
        parts.append(f'<line class="g" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        anchor = "middle" if power else "start"
        parts.append(f'<text class="s" x="{at:.1f}" y="{bottom + 18}" text-anchor="{anchor}">{tick(10**power)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 24}" width="{WIDTH}" role="img">'
    return "\n".join([head, f"<title>{escape(' '.join(TITLE))}</title><style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(picture(json.loads(Path(sys.argv[1]).read_text())["rows"]))
