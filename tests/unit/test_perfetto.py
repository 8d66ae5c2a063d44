"""The file for ui.perfetto.dev is what the trace event format says, and shows what the trace has."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from typing import Any

import pytest
import traces
from hypothesis import given
from hypothesis import strategies as st
from traces import A, B

from pyvhostvdpa.trace import perfetto
from pyvhostvdpa.trace.downtime import DT1, milliseconds
from pyvhostvdpa.trace.recorder import Trace

METADATA = {
    "process_name": {"name": str},
    "thread_name": {"name": str},
    "process_sort_index": {"sort_index": int},
    "thread_sort_index": {"sort_index": int},
}
Track = tuple[int, int]


def written(trace: Trace) -> dict[str, Any]:
    file = io.StringIO()
    perfetto.write(trace, file)
    result: dict[str, Any] = json.loads(file.getvalue())
    return result


def check(content: dict[str, Any]) -> dict[Track, list[tuple[int, str, float, float]]]:
    """Hold a file against the format; its slices by track: depth, name, begin and end in us."""
    assert set(content) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert content["displayTimeUnit"] in ("ms", "ns")
    open_slices: dict[Track, list[tuple[str, float]]] = defaultdict(list)
    last: dict[Track, float] = defaultdict(float)
    slices: dict[Track, list[tuple[int, str, float, float]]] = defaultdict(list)
    named: set[Track] = set()
    for event in content["traceEvents"]:
        assert isinstance(event["name"], str)
        assert event["name"]
        assert type(event["pid"]) is int
        assert type(event["tid"]) is int
        track = (event["pid"], event["tid"])
        if event["ph"] == "M":
            assert set(event) == {"ph", "name", "pid", "tid", "args"}
            assert {key: type(value) for key, value in event["args"].items()} == METADATA[event["name"]]
            named.add(track)
            continue
        assert event["ph"] in ("B", "E", "i", "C")
        assert set(event) == {"ph", "ts", "pid", "tid", "name", "cat", "args"} | (
            {"s"} if event["ph"] == "i" else set()
        )
        assert event["ts"] >= 0
        if event["ph"] == "i":
            assert event["s"] == "t"
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
            continue
        assert track in named
        if event["ph"] == "i":
            continue
        assert event["ts"] >= last[track]
        last[track] = event["ts"]
        if event["ph"] == "B":
            open_slices[track].append((event["name"], event["ts"]))
        else:
            name, begin = open_slices[track].pop()
            assert name == event["name"]
            slices[track].append((len(open_slices[track]), name, begin, event["ts"]))
    assert not any(open_slices.values())
    return slices


def names(content: dict[str, Any], kind: str) -> dict[Track, str]:
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in content["traceEvents"] if e["name"] == kind}


def test_the_file_keeps_to_the_format() -> None:
    assert check(written(traces.migration()))


CALLS = st.lists(
    st.tuples(
        st.integers(0, 50_000),
        st.integers(0, 20_000),
        st.sampled_from(["", "dt1.stop", "dt2.stop"]),
        st.sampled_from(
            ["IOTLB_BATCH_BEGIN", "IOTLB_BATCH_END", "IOTLB_UPDATE", "VHOST_GET_VRING_BASE", "open", "note"]
        ),
    )
)


@given(CALLS)
def test_perfetto_slices_nest_with_any_overlap(calls: list[tuple[int, int, str, str]]) -> None:
    trace = Trace()
    device = trace.device(A)
    for begin, length, phase, event in calls:
        fields: dict[str, int | str] = {"asid": 0, "iova": 0, "size": 1, "uaddr": 0, "perm": 3, "index": 1}
        with device.in_phase(phase):
            device.record(begin, begin + length, event, fields, None if event == "note" else 0)
    slices = check(written(trace))
    calls_in = sum(name == event for of_track in slices.values() for _, name, *_ in of_track for *_, event in calls[:1])
    assert calls_in == (sum(event == calls[0][3] for *_, event in calls) if calls and calls[0][3] != "note" else 0)


def test_devices_are_processes_and_queues_and_address_spaces_are_tracks() -> None:
    content = written(traces.migration())
    assert set(names(content, "process_name").values()) == {A, B}
    of_first = [name for (pid, _), name in names(content, "thread_name").items() if pid == 1]
    assert of_first == [
        "what DT1 is made of",
        "what DT2 is made of",
        "device",
        "address space 0",
        "address space 1",
        "queue 0",
        "queue 1",
        "queue 2",
        "decisions",
    ]


def test_every_call_is_there_once_with_its_time() -> None:
    trace = traces.migration()
    content = written(trace)
    titles = names(content, "thread_name")
    origin = content["otherData"]["origin_ns"]
    found = sorted(
        (name, round(begin * 1000) + origin, round(end * 1000) + origin)
        for track, slices in check(content).items()
        for _, name, begin, end in slices
        if not titles[track].startswith("what") and name.startswith(("VHOST", "IOTLB", "open"))
    )
    assert found == sorted((e.event, e.t_begin, e.t_end) for e in trace.events if e.result is not None)


def test_calls_lie_in_their_phase_and_messages_in_their_batch() -> None:
    content = written(traces.migration())
    titles = names(content, "thread_name")
    slices = check(content)
    space = next(of_track for track, of_track in slices.items() if titles[track] == "address space 0")
    assert [(depth, name) for depth, name, *_ in space if depth == 0] == [
        *((0, name) for name in ("batch", "dt1.stop", "dt1.start")),
    ]
    inner = [(depth, name) for depth, name, *_ in space if depth]
    assert (1, "batch") in inner
    assert (2, "IOTLB_INVALIDATE") in inner


def test_a_downtime_has_a_track_with_the_kinds_of_its_spans() -> None:
    trace = traces.migration()
    content = written(trace)
    titles = names(content, "thread_name")
    track = next(of_track for key, of_track in check(content).items() if key[0] == 1 and "DT1" in titles[key])
    [(name, took)] = [(name, end - begin) for depth, name, begin, end in track if depth == 0]
    assert name == "DT1"
    assert took / 1000 == pytest.approx(milliseconds(trace, A, DT1))
    assert {"suspend", "reset", "maps with guest memory", "between calls"} <= {
        name for depth, name, *_ in track if depth
    }


def test_the_counter_follows_the_maps() -> None:
    counters = [e for e in written(traces.migration())["traceEvents"] if e["ph"] == "C" and e["pid"] == 1]
    guest = [e["args"]["bytes"] for e in counters if e["name"] == "mapped in address space 0"]
    assert guest[:4] == [traces.GUEST, traces.GUEST + 0x1000, 0x1000, 0]


def test_an_empty_trace_is_a_file_too() -> None:
    assert check(written(Trace())) == {}
