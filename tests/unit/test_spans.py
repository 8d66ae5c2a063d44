"""The spans of a downtime: without a gap, each of a kind, and their sum is the downtime."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import traces
from hypothesis import given
from hypothesis import strategies as st
from traces import GUEST, IDENTITY, MS, A, B, Recorder

from pyvhostvdpa.trace.downtime import DT1, DT2, interval, milliseconds
from pyvhostvdpa.trace.recorder import Trace
from pyvhostvdpa.trace.spans import Kind, Maps, by_kind, downtimes, spans, to_dict


@pytest.mark.parametrize("device", [A, B])
@pytest.mark.parametrize("phases", [DT1, DT2])
def test_the_sum_of_the_spans_is_the_downtime(device: str, phases: tuple[str, ...]) -> None:
    trace = traces.migration()
    pieces = spans(trace, device, phases)
    assert sum(piece.ns for piece in pieces) / 1e6 == milliseconds(trace, device, phases)
    assert (pieces[0].t_begin, pieces[-1].t_end) == interval(trace, device, phases)
    assert all(earlier.t_end == later.t_begin for earlier, later in pairwise(pieces))


CALLS = st.tuples(st.integers(0, 1000), st.integers(0, 300), st.booleans())


@given(st.lists(CALLS, min_size=1, max_size=40))
def test_spans_sum_to_downtime_with_overlapping_calls_and_notes(calls: list[tuple[int, int, bool]]) -> None:
    trace = Trace()
    device = trace.device(A)
    with device.in_phase("dt2.stop"):
        for begin, length, note in calls:
            end = begin if note else begin + length
            device.record(begin, end, "a_note" if note else "VHOST_VDPA_SUSPEND", {}, None if note else 0)
    pieces = spans(trace, A, DT2)
    assert sum(piece.ns for piece in pieces) / 1e6 == milliseconds(trace, A, DT2)
    assert all(earlier.t_end == later.t_begin for earlier, later in pairwise(pieces))
    assert all(piece.ns > 0 for piece in pieces)


def test_spans_charge_each_call_to_its_kind() -> None:
    dt1 = by_kind(spans(traces.migration(), A, DT1))
    assert dt1[Kind.SUSPEND] == 2.5 * MS
    assert dt1[Kind.BASES] == 0.02 * MS
    assert dt1[Kind.RESET] == 10 * MS
    assert dt1[Kind.GUEST_MEMORY] == pytest.approx((30 + 40 + 5 * 0.01) * MS)
    assert dt1[Kind.RINGS] == 100 * MS
    assert dt1[Kind.DRIVER_OK] == 12 * MS
    assert dt1[Kind.ENABLE] == pytest.approx(1.01 * MS)
    assert dt1[Kind.REPLAY] == pytest.approx(3.02 * MS)
    assert list(dt1) == [kind for kind in Kind if kind in dt1]


def test_a_ring_in_the_address_space_of_guest_memory_is_charged_as_guest_memory() -> None:
    trace = Trace()
    recorder = Recorder(trace.device(A), 0)
    traces.attach(recorder)
    with recorder.device.in_phase("dt2.stop"):
        recorder.message("UPDATE", 0, 0x1000, 0x1000, 75)
        recorder.message("UPDATE", 1, 0x1000, 0x1000, 25)
        recorder.message("INVALIDATE", 0, 0, 1 << 63, 30)
        recorder.message("UPDATE", 0, 0x1000, 0x1000, 25)
    kinds = [piece.kind for piece in spans(trace, A, DT2) if piece.event]
    assert kinds == [Kind.GUEST_MEMORY, Kind.RINGS, Kind.GUEST_MEMORY, Kind.RINGS]


def test_spans_of_a_batch_have_the_kind_of_its_end() -> None:
    trace = Trace()
    recorder = Recorder(trace.device(A), 0)
    with recorder.device.in_phase("dt2.stop"):
        recorder.batch("UPDATE", 0, [(0x1000, 0x1000), (IDENTITY, GUEST)], 40)
    assert {piece.kind for piece in spans(trace, A, DT2) if piece.event} == {Kind.GUEST_MEMORY}


def test_maps_are_followed_as_the_kernel_keeps_them() -> None:
    trace = Trace()
    recorder = Recorder(trace.device(A), 0)
    recorder.message("UPDATE", 0, 0x1000, 0x2000)
    recorder.message("UPDATE", 0, 0x4000, 0x1000)
    recorder.call("IOTLB_UPDATE", result=-14, asid=0, iova=0x9000, size=0x1000, uaddr=0, perm=3)
    recorder.call("VHOST_VDPA_SET_STATUS", status=0)
    recorder.message("INVALIDATE", 0, 0x2000, 0x1000)
    maps = Maps()
    for event in trace.events:
        maps.apply(event)
    assert maps.spaces == {0: {0x4000: 0x1000}}
    recorder.call("close")
    maps.apply(trace.events[-1])
    assert maps.spaces == {}


def test_json_has_devices_with_sums_and_spans() -> None:
    trace = traces.migration()
    result = json.loads(json.dumps(to_dict(trace)))
    assert [device["device"] for device in result["dt1"]] == [A, B]
    first = result["dt1"][0]
    assert first["ms"] == pytest.approx(milliseconds(trace, A, DT1))
    assert sum(first["by_kind"].values()) == pytest.approx(first["ms"])
    assert first["spans"][0] == {
        "at_ms": 0,
        "ms": 2.5,
        "phase": "dt1.stop",
        "kind": "suspend",
        "event": "VHOST_VDPA_SUSPEND",
        "arguments": "",
    }


def test_a_device_without_a_downtime_has_no_spans() -> None:
    trace = Trace()
    trace.device(A).record(0, 10, "open", {}, 0)
    assert downtimes(trace) == {"dt1": {}, "dt2": {}}
    assert downtimes(Trace()) == {"dt1": {}, "dt2": {}}
