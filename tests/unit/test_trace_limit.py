"""A trace keeps so many events, counts those that it dropped, and can be switched off."""

from __future__ import annotations

import io
import threading

import pytest

from pyvhostvdpa.trace import perfetto, records
from pyvhostvdpa.trace.downtime import DT2, measured
from pyvhostvdpa.trace.phases import DT2_STOP
from pyvhostvdpa.trace.recorder import Trace


def poll(trace: Trace, times: int, device: str = "dev") -> None:
    recorder = trace.device(device)
    for at in range(times):
        recorder.record(at, at + 1, "VHOST_VDPA_GET_STATUS", {}, 0)


def test_trace_of_a_long_life_is_bounded_and_counts_dropped_events() -> None:
    trace = Trace(limit=100)
    poll(trace, 10_000)
    assert 100 <= len(trace.events) <= 112
    assert trace.dropped == 10_000 - len(trace.events)
    assert trace.events[-1].t_end == 10_000


def test_trace_by_default_is_bounded() -> None:
    assert 0 < Trace().limit < 1_000_000


def test_trace_keeps_phases_when_polls_are_dropped() -> None:
    trace = Trace(limit=100)
    recorder = trace.device("dev")
    with recorder.in_phase(DT2_STOP):
        recorder.record(0, 1_000_000, "VHOST_VDPA_SUSPEND", {}, 0)
        recorder.record(2_000_000, 3_000_000, "VHOST_VDPA_SET_STATUS", {}, 0)
    poll(trace, 5_000)
    assert measured(trace, "dev", DT2) == 3.0


def test_trace_of_phases_only_is_bounded() -> None:
    trace = Trace(limit=100)
    with trace.device("dev").in_phase(DT2_STOP):
        pass
    recorder = trace.device("dev")
    recorder.phase = DT2_STOP
    for at in range(1_000):
        recorder.record(at, at + 1, "VHOST_VDPA_SUSPEND", {}, 0)
    assert len(trace.events) <= 112
    assert trace.dropped == 1_000 - len(trace.events)


def test_trace_switched_off_records_nothing() -> None:
    trace = Trace(limit=0)
    poll(trace, 1_000)
    trace.device("dev").note("shadow_vqs", queues="0")
    trace.extend(Trace().events)
    assert (trace.events, trace.dropped) == ([], 0)
    assert measured(trace, "dev", DT2) is None


def test_trace_with_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 events"):
        Trace(limit=-1)


def test_trace_used_by_several_threads_loses_no_count() -> None:
    trace = Trace(limit=64)
    threads = [threading.Thread(target=poll, args=(trace, 5_000, f"dev{n}")) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trace.events) + trace.dropped == 20_000


def test_written_traces_contain_the_number_of_dropped_events() -> None:
    trace = Trace(limit=100)
    poll(trace, 1_000)
    assert perfetto.to_dict(trace)["otherData"]["dropped_events"] == trace.dropped
    file = io.StringIO()
    records.write(trace, file)
    file.seek(0)
    here = Trace()
    events, dropped = records.read_all(file)
    here.extend(events, dropped)
    assert (here.events, here.dropped) == (trace.events, trace.dropped)
