"""Downtime comes from the trace, and from nothing else."""

from __future__ import annotations

from pyvhostvdpa.trace.downtime import DT1, cost, interval, measured, milliseconds, of_all, total, worst
from pyvhostvdpa.trace.recorder import Trace


def recorded() -> Trace:
    trace = Trace()
    a, b = trace.device("a"), trace.device("b")
    with a.in_phase("dt1.stop"):
        a.record(1_000_000, 2_000_000, "VHOST_VDPA_SUSPEND", {}, 0)
        a.record(2_500_000, 3_000_000, "VHOST_VDPA_SET_STATUS", {"status": 0}, 0)
    a.record(3_100_000, 3_200_000, "VHOST_GET_FEATURES", {}, 0)
    with a.in_phase("dt1.start"):
        a.record(4_000_000, 6_000_000, "IOTLB_UPDATE", {}, 72)
    with b.in_phase("dt1.stop"):
        b.record(9_000_000, 9_500_000, "VHOST_VDPA_SUSPEND", {}, 0)
    return trace


def test_a_downtime_runs_from_its_first_call_to_its_last() -> None:
    trace = recorded()
    assert interval(trace, "a", DT1) == (1_000_000, 6_000_000)
    assert milliseconds(trace, "a", DT1) == 5.0
    assert milliseconds(trace, "b", DT1) == 0.5
    assert milliseconds(trace, "c", DT1) == 0.0


def test_phase_counts_ioctls_and_messages_separately() -> None:
    trace = recorded()
    start = cost(trace, "dt1.start")
    stop = cost(trace, "dt1.stop")
    assert start is not None
    assert stop is not None
    assert (start.ioctls, start.iotlb_messages, start.ms) == (0, 1, 2.0)
    assert (stop.ioctls, stop.iotlb_messages) == (3, 0)
    assert cost(trace, "dt2.stop") is None


def test_phases_nest_and_end() -> None:
    device = Trace().device("a")
    with device.in_phase("outer"):
        with device.in_phase("inner"):
            assert device.phase == "inner"
        assert device.phase == "outer"
    assert device.phase == ""


def test_measured_of_a_phase_that_did_not_happen_is_unknown() -> None:
    trace = recorded()
    assert measured(trace, "a", DT1) == 5.0
    # it was stopped, and never started again
    assert measured(trace, "b", DT1) is None
    assert measured(trace, "c", DT1) is None


def test_figure_of_devices_of_which_one_is_unknown_is_unknown() -> None:
    assert of_all(worst, [3.0, 7.0, 5.0]) == 7.0
    assert of_all(total, [3.0, 7.0]) == 10.0
    assert of_all(worst, [3.0, None]) is None
    assert of_all(total, [3.0, None]) is None
    assert of_all(worst, []) is None
    assert of_all(total, []) is None
