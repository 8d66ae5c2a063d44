"""The ladder's page, and that it needs nothing but itself. The report is a sample of shape, not of figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import traces

from pyvhostvdpa.base.errors import VhostVdpaError
from pyvhostvdpa.bench.page import ladder
from pyvhostvdpa.bench.page.charts import Bar, stacked, sums
from pyvhostvdpa.bench.page.svg import time_label
from pyvhostvdpa.trace.downtime import DT1, DT2, milliseconds
from pyvhostvdpa.trace.recorder import Trace
from pyvhostvdpa.trace.spans import Kind, downtimes


def row(name: str, title: str, dt1: float | None, dt2: float | None, **more: Any) -> dict[str, Any]:
    counts = {"dt1": 28, "dt2": 18, "dest": None} if dt1 else {"dt1": None, "dt2": None, "dest": None}
    return {
        "row": name,
        "title": title,
        "dt1_ms": {"worst": dt1},
        "dt2_ms": {"sum": dt2},
        "dest_ms": {"sum": None},
        "messages": counts,
        "ioctls": counts,
        "set_maps": {"dt1": None, "dt2": None, "dest": None},
        "heavy": counts,
        **more,
    }


def report(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": "pyvhostvdpa/ladder/1",
        "regions": 4,
        "devices": 2,
        "pairs": 2,
        "memory_bytes": 1 << 30,
        "charged_bytes": 128 << 30,
        "profile": "series-2023",
        "clock": "virtual",
        "rows": rows,
        "environment": {
            "kernel": "6.12.0-sample",
            "cpus": 1,
            "accelerator": "icount",
            "devices": {"source": {"path": "/dev/vhost-vdpa-0", "features": "MAC MTU", "pinned": True, "limit": None}},
        },
    }


PUBLISHED = {"dt1_s": [20, 30], "dt2_s": 20}
ROWS = (
    row("baseline", "baseline QEMU", 24_000.0, 22_800.0, published=PUBLISHED, dt1_explained=False),
    row("keep", "+ maps kept", None, None, impossible="a reset drops maps", published={"dt1_s": 2, "dt2_s": 5}),
    row("batch", "+ (un)map batching", 1_600.0, 1_520.0, published={"dt1_s": 1.7, "dt2_s": 1.5}, dt1_explained=True),
    row("ours", "own procedure", 1_000.0, 950.0, published=None, left_out={"persist": "IOTLB_PERSIST is not offered"}),
)


@pytest.fixture(scope="module")
def html() -> str:
    return ladder.render(report(*ROWS), {"baseline": traces.migration(), "batch": traces.migration()})


class Page(HTMLParser):
    """Checks that what is opened is closed, and collects the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and data.strip():
            self.texts.append(data.strip())


def table_rows(html: str) -> Iterator[list[str]]:
    for line in re.findall(r"<tr.*?</tr>", html, re.S):
        yield [re.sub(r"<.*?>", "", each) for each in re.findall(r"<t[hd].*?</t[hd]>", line, re.S)]


def test_ladder_page_is_well_formed_and_fetches_nothing(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert not re.search(r"<script|<link|<img|@import|url\(|https?:", html)
    links = {value for name, value in page.attributes if name in ("href", "src")}
    assert all(value and "/" not in value for value in links)


def test_ladder_table_has_measured_beside_published(html: str) -> None:
    rows = list(table_rows(html))
    assert ["baseline QEMU", "24.000 *", "20 to 30", "1.0 x", "22.800", "20", "1.0 x", "-"] in rows
    assert ["+ (un)map batching", "1.600", "1.7", "15.0 x", "1.520", "1.5", "15.0 x", "-"] in rows
    assert ["own procedure", "1.000", "-", "24.0 x", "0.950", "-", "24.0 x", "-"] in rows


def test_ladder_page_marks_figures_that_the_calls_do_not_explain(html: str) -> None:
    assert any(text.startswith("* The calls of these rows do not account") for text in Page(html).texts)
    without = ladder.render(report(*ROWS[1:]), {})
    assert "do not account" not in without


def test_page_gives_the_reason_of_an_impossible_row(html: str) -> None:
    assert ["+ maps kept", "-", "2", "-", "-", "5", "-", "-"] in list(table_rows(html))
    assert "+ maps kept: not possible on these devices: a reset drops maps" in Page(html).texts
    assert "own procedure: ran without persist: IOTLB_PERSIST is not offered" in Page(html).texts


def test_counts_that_the_device_does_not_keep_are_question_marks(html: str) -> None:
    assert ["baseline QEMU", *("28", "28", "?", "28"), *("18", "18", "?", "18"), *("-" * 4)] in list(table_rows(html))
    assert "?: these devices do not count" in Page(html).texts


def test_the_environment_and_the_conditions_are_there(html: str) -> None:
    texts = Page(html).texts
    for text in ("6.12.0-sample", "icount", "virtual", "series-2023", "/dev/vhost-vdpa-0", "yes", "unknown"):
        assert text in texts
    assert any("charged as 128 GiB" in text for text in texts)


def test_every_call_of_a_downtime_can_be_pointed_at(html: str) -> None:
    trace = traces.migration()
    calls = [e for e in trace.events if e.phase.startswith("dt") and e.result is not None]
    one = ladder.render(report(ROWS[0]), {"baseline": trace})
    titles = re.findall(r"<title>((?:VHOST|IOTLB).*?)\n", one)
    assert len(titles) == len(calls)
    assert "VHOST_VDPA_SET_GROUP_ASID index=2 num=1" in titles


def test_the_bars_are_what_the_downtimes_are() -> None:
    trace = traces.migration()
    found = downtimes(trace)
    worst = max(milliseconds(trace, device, DT1) for device in trace.devices())
    assert sum(sums(found["dt1"], worst=True).values()) / 1e6 == worst
    total = sum(milliseconds(trace, device, DT2) for device in trace.devices())
    assert sum(sums(found["dt2"], worst=False).values()) / 1e6 == pytest.approx(total)


def test_ticks_of_an_axis_are_in_one_unit() -> None:
    svg = stacked([Bar("a", {Kind.SUSPEND: 2_000_000_000})], "")
    assert re.findall(r'class="s(?: m)?".*?>(.*?)<', svg) == ["0", "0.5 s", "1.0 s", "1.5 s", "2.0 s"]


def test_the_segments_of_a_bar_are_as_long_as_their_share() -> None:
    svg = stacked([Bar("a", {Kind.SUSPEND: 10, Kind.RESET: 30}), Bar("b", {Kind.RESET: 20})], "")
    widths = [float(width) for width in re.findall(r'class="k\d" .*?width="([\d.]+)"', svg)]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.05)
    assert widths[2] == pytest.approx(2 * widths[0], abs=0.05)


def slower(trace: Trace, times: int) -> Trace:
    result = Trace()
    result.events = [e._replace(t_begin=times * e.t_begin, t_end=times * e.t_end) for e in trace.events]
    return result


def test_rows_that_are_dwarfed_by_others_are_shown_again_larger() -> None:
    fast, slow = traces.migration(), slower(traces.migration(), 20)
    larger = "DT1: the short rows, larger."
    assert larger in Page(ladder.render(report(*ROWS), {"baseline": slow, "batch": fast, "ours": fast})).texts
    assert larger not in Page(ladder.render(report(*ROWS), {"baseline": fast, "batch": fast, "ours": fast})).texts


def test_text_from_outside_is_only_text() -> None:
    hostile = '"><script>alert(1)</script>'
    trace = Trace()
    recorder = traces.Recorder(trace.device(f"/dev/{hostile}"), 0)
    traces.downtime_1(recorder)
    content = report(row("baseline", hostile, 1.0, 1.0, left_out={hostile: hostile}))
    content["environment"]["kernel"] = hostile
    html = ladder.render(content, {"baseline": trace})
    assert "<script" not in html
    assert Page(html).open == []


def test_a_report_without_traces_is_a_page_too() -> None:
    assert Page(ladder.render(report(*ROWS), {})).open == []
    assert Page(ladder.render(report(*ROWS), {"baseline": Trace()})).open == []


def test_the_folder_has_the_page_the_figures_and_the_traces(tmp_path: Path) -> None:
    index = ladder.write(report(*ROWS), {"batch": traces.migration()}, tmp_path / "new" / "folder")
    folder = index.parent
    assert sorted(file.name for file in folder.iterdir()) == [
        "batch.events.jsonl",
        "batch.perfetto.json",
        "index.html",
        "ladder.json",
    ]
    assert json.loads((folder / "ladder.json").read_text())["rows"][0]["row"] == "baseline"
    links = {value for name, value in Page(index.read_text()).attributes if name == "href"}
    assert links == {"ladder.json", "batch.perfetto.json", "batch.events.jsonl"}


def test_report_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for attempt in (lambda: ladder.prepare(file / "folder"), lambda: ladder.write(report(*ROWS), {}, file)):
        with pytest.raises(VhostVdpaError, match="cannot be written") as refused:
            attempt()
        assert "--report" in refused.value.hint


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "0"),
        (7, "7.00 ns"),
        (1_500, "1.50 µs"),
        (12_345_678, "12.3 ms"),
        (999_000_000, "999 ms"),
        (22_800_000_000, "22.8 s"),
    ],
)
def test_times_have_three_digits(ns: int, text: str) -> None:
    assert time_label(ns) == text


def test_stop_to_run_has_a_bar_and_its_floor_in_each_row_that_has_it() -> None:
    measured = row(
        "beyond", "in place", 8.0, 6.0,
        stop_to_run_ms=17.25, stop_to_run_parts_ms={"gap.pause": 0.25, "dt2.stop": 8.0, "dest.start": 9.0},
        floor_ms={"switch": 7.488, "stop_to_run": 7.488}, floor_ratio={"switch": 1.07, "stop_to_run": 2.3},
    )  # fmt: skip
    html = ladder.render(report(*ROWS, measured), {})
    texts = " ".join(Page(html).texts)
    assert "Stop to run" in texts
    assert "17.25" in texts
    assert "2.3 x" in texts
    assert "READY and GO" not in texts
    assert texts.index("Stop to run") < texts.index("DT1 is the time that")


def test_a_report_without_stop_to_run_has_no_section_of_it(html: str) -> None:
    assert "Stop to run" not in html


def test_page_leads_with_the_best_row() -> None:
    stopped = [{**row, "stop_to_run_ms": ms} for row, ms in zip(ROWS, (61_931.1, None, 1_601.2, 8.66), strict=True)]
    shown = ladder.render(report(*stopped), {})
    first = shown[shown.index('<ul class="headline">') :]
    assert re.match(r'<ul class="headline"><li><small>guest stopped, baseline QEMU to own procedure</small>', first)
    assert "61,931 ms → 8.7 ms<small>7,151 x less</small>" in first


def test_page_has_one_name_for_the_start_at_the_destination_and_no_colour_by_name(html: str) -> None:
    assert "destination start" in html
    assert "black mark" not in html
