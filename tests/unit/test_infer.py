"""The phases of a migration are found in nothing but the calls that a VMM makes."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from traces import MS, A, B
from vmm import MOVED, Vmm, sort, stop_for_good, switch

from pyvhostvdpa.trace import clocks, records
from pyvhostvdpa.trace.downtime import milliseconds
from pyvhostvdpa.trace.infer import infer, pieces
from pyvhostvdpa.trace.phases import CANCEL_START, DEST, DEST_PREMAP, DEST_START, DT1, DT2, DT2_STOP
from pyvhostvdpa.trace.recorder import Event, Trace
from pyvhostvdpa.trace.summary import summarize

C, D = "/dev/vhost-vdpa-2", "/dev/vhost-vdpa-3"
Times = dict[str, tuple[int, int]]


def started(trace: Trace, device: str, pid: int = 100, at: int = 0) -> Vmm:
    vmm = Vmm(trace, device, at)
    vmm.open(pid)
    vmm.start()
    vmm.wait(5_000)
    return vmm


def waiting(trace: Trace, device: str, pid: int = 200, at: int = 0) -> Vmm:
    """A destination as QEMU 11.1 makes it: memory is mapped at init, and unmapped by the machine's reset."""
    vmm = Vmm(trace, device, at)
    vmm.open(pid)
    vmm.map_memory()
    vmm.call("VHOST_VDPA_SET_STATUS", status=0)
    vmm.unmap_memory()
    vmm.base = 7
    return vmm


def migrated(trace: Trace, source: str = A, destination: str = B) -> Times:
    """One device's whole migration, with maps that take long."""
    there, here = waiting(trace, destination), started(trace, source)
    times = {"dt1": switch(here, 20_000 * MS)}
    here.wait(10_000)
    times["dt2"] = stop_for_good(here, 7_000 * MS)
    there.at = here.at + 50 * MS
    begin = there.at + 10_000
    there.start(ns=20_000 * MS)
    times["dest"] = (begin, there.at)
    there.wait(3_000)
    here.at = there.at
    here.close()
    there.close()
    sort(trace)
    return times


def length(times: tuple[int, int]) -> float:
    return (times[1] - times[0]) / 1e6


def test_migration_has_the_downtimes_of_its_calls() -> None:
    trace = Trace()
    times = migrated(trace)
    found = infer(trace)
    (migration,) = found.migrations
    assert migration.dt1_ms == pytest.approx(length(times["dt1"]))
    assert migration.dt2_ms == pytest.approx(length(times["dt2"]))
    assert migration.stop_to_run_ms == pytest.approx((times["dest"][1] - times["dt2"][0]) / 1e6)
    assert milliseconds(found.trace, A, DT1) == pytest.approx(length(times["dt1"]))
    assert milliseconds(found.trace, A, DT2) == pytest.approx(length(times["dt2"]))
    assert milliseconds(found.trace, B, DEST) == pytest.approx(length(times["dest"]))
    gap = pieces(migration)
    assert gap is not None
    assert gap.ms == pytest.approx(migration.stop_to_run_ms)
    assert list(gap.by_phase()) == [DT2_STOP, "between", DEST_START]
    assert gap.by_phase()["between"] == pytest.approx(50, abs=0.1)


def test_events_stay_as_they_are_but_for_the_phase() -> None:
    trace = Trace()
    migrated(trace)
    assert [event._replace(phase="") for event in infer(trace).trace.events] == trace.events


def test_early_map_of_the_destination_is_its_own_phase() -> None:
    trace = Trace()
    migrated(trace)
    early = infer(trace).trace.select(B, DEST_PREMAP)
    assert [event.event for event in early if "BATCH" not in event.event] == ["IOTLB_UPDATE"] * 2 + [
        "IOTLB_INVALIDATE"
    ] * 2


def test_two_nics_are_paired_in_order() -> None:
    trace = Trace()
    migrated(trace, A, B)
    other = Trace()
    migrated(other, C, D)
    trace.extend(event._replace(t_begin=event.t_begin + MS, t_end=event.t_end + MS) for event in other.events)
    found = infer(trace)
    pairs = [(each.source.device, each.destination and each.destination.device) for each in found.migrations]
    assert pairs == [(A, B), (C, D)]


def test_going_back_from_shadow_rings_is_a_cancelled_migration() -> None:
    trace = Trace()
    vmm = started(trace, A)
    switch(vmm)
    vmm.wait(2_000)
    stop_for_good(vmm)
    begin = vmm.at + 10_000
    vmm.start()
    end = vmm.at
    vmm.wait(2_000)
    found = infer(trace)
    (migration,) = found.migrations
    assert migration.cancelled
    assert migration.stop is None
    assert milliseconds(found.trace, A, (CANCEL_START,)) == pytest.approx((end - begin) / 1e6, abs=0.05)


def test_second_attempt_counts_for_the_figures() -> None:
    trace = Trace()
    vmm = started(trace, A)
    switch(vmm)
    vmm.wait(2_000)
    stop_for_good(vmm)
    vmm.start()
    vmm.wait(2_000)
    times = switch(vmm, 100 * MS)
    found = infer(trace)
    assert [each.cancelled for each in found.migrations] == [True, False]
    assert milliseconds(found.trace, A, DT1) == pytest.approx(length(times))
    assert not found.trace.select(A, CANCEL_START)


def test_reboot_of_the_guest_is_not_a_migration() -> None:
    trace = Trace()
    vmm = started(trace, A)
    vmm.stop()
    vmm.wait(3_000)
    vmm.start()
    vmm.wait(100)
    vmm.stop()
    vmm.close()
    found = infer(trace)
    assert found.migrations == []
    assert {event.phase for event in found.trace.events} == {""}


def test_guest_rings_in_low_memory_are_not_shadow_rings() -> None:
    """The map is as small as one of shadow rings; its memory is the same as that of the large region."""
    trace = Trace()
    vmm = started(trace, A)
    assert vmm.gpa < 0xA0000
    (session,) = infer(trace).sessions
    assert [episode.shadow for episode in session.episodes] == [False]


def test_migration_without_shadow_rings_has_no_dt1() -> None:
    """As Cloud Hypervisor moves a guest: suspended in passthrough, started at the destination."""
    trace = Trace()
    there, here = waiting(trace, B), started(trace, A)
    here.stop()
    there.at = here.at + MS
    there.start()
    sort(trace)
    (migration,) = infer(trace).migrations
    assert migration.dt1_ms is None
    assert migration.dt2_ms is not None
    assert migration.stop_to_run_ms is not None


def test_guest_started_later_is_not_a_destination() -> None:
    trace = Trace()
    here = started(trace, A)
    here.stop()
    here.close()
    started(trace, B, at=here.at)
    assert infer(trace).migrations == []


def test_guest_that_runs_beside_it_is_not_a_destination() -> None:
    """It is open at the stop, and starts again behind it; but it ran by then."""
    trace = Trace()
    beside, here = started(trace, B), started(trace, A)
    switch(here)
    stop_for_good(here)
    beside.at = here.at + MS
    beside.stop()
    # it goes on where it was, which is no boot
    beside.base = 7
    beside.start()
    sort(trace)
    (migration,) = infer(trace).migrations
    assert migration.destination is None
    assert migration.stop_to_run_ms is None


def test_another_guest_that_boots_behind_the_stop_is_not_a_destination() -> None:
    """One virtual machine is shut down while another, which was open before, starts its guest."""
    trace = Trace()
    other, here = waiting(trace, B), started(trace, A)
    here.stop()
    other.at = here.at + 50 * MS
    other.base = 0
    other.start()
    sort(trace)
    assert infer(trace).migrations == []


@pytest.mark.parametrize("end", ["killed", "reset"])
def test_guest_that_boots_long_after_another_was_killed_has_not_come_from_it(end: str) -> None:
    """A device that cannot be suspended is stopped by a reset: where its guest stood is not known."""
    trace = Trace()
    other, here = waiting(trace, B), started(trace, A)
    if end == "reset":
        here.call("VHOST_VDPA_SET_STATUS", status=0)
        here.unmap_memory()
    here.close()
    other.at = here.at + 3_600_000 * MS
    other.base = 0
    other.start()
    sort(trace)
    assert infer(trace).migrations == []


def test_process_that_is_killed_while_its_guest_migrates_hands_nothing_over() -> None:
    """Another guest arrives on another device a while later."""
    trace = Trace()
    other, here = waiting(trace, B), started(trace, A)
    switch(here)
    here.close()
    other.at = here.at + 60_000 * MS
    other.start()
    sort(trace)
    (migration,) = infer(trace).migrations
    assert (migration.dt1_ms is not None, migration.start) == (True, None)


@pytest.mark.parametrize("end", ["suspended", "closed"])
def test_start_whose_last_call_was_under_way_is_another_guests(end: str) -> None:
    trace = Trace()
    other, here = waiting(trace, B), started(trace, A)
    if end == "suspended":
        here.call("VHOST_VDPA_SUSPEND")
    else:
        here.close()
    other.at = here.at - 3_000 * MS
    other.prepare()
    for index in range(other.queues):
        other.call("VHOST_VDPA_SET_VRING_ENABLE", index=index, num=1)
    other.call("VHOST_VDPA_SET_STATUS", 20_000 * MS, status=15)
    sort(trace)
    assert infer(trace).migrations == []


def migrating_at_once(pids: tuple[int, int, int, int], other_features: int = 0) -> list[tuple[str, str]]:
    """A and C migrate at the same time, to B and D; D runs before B does. Returns the pairs that are found."""
    trace = Trace()
    to_b, to_d = waiting(trace, B, pids[2]), waiting(trace, D, pids[3])
    a, c = started(trace, A, pids[0]), Vmm(trace, C)
    for each in (c, to_d):
        each.features ^= other_features
    c.open(pids[1])
    c.start()
    c.at = a.at + MS
    switch(a)
    switch(c)
    a.at = c.at = max(a.at, c.at) + 1_000 * MS
    stop_for_good(a)
    stop_for_good(c)
    to_d.at = max(a.at, c.at) + MS
    to_d.start()
    to_b.at = to_d.at + MS
    to_b.start()
    sort(trace)
    found = infer(trace).migrations
    return [(each.source.device, each.destination.device) for each in found if each.destination]


def test_guests_that_migrate_at_once_are_told_apart_by_their_features() -> None:
    assert migrating_at_once((101, 102, 201, 202), other_features=1 << 15) == [(A, B), (C, D)]


def test_devices_of_one_guest_go_to_one_process() -> None:
    """Another guest's device, which runs before the second of them, is not taken for it."""
    trace = Trace()
    there = [waiting(trace, "/dev/vhost-vdpa-5", 200), waiting(trace, "/dev/vhost-vdpa-6", 200)]
    other = waiting(trace, "/dev/vhost-vdpa-7", 300)
    here = [started(trace, A, 100), started(trace, B, 100)]
    for each in here:
        switch(each)
    end = max(each.at for each in here) + 1_000 * MS
    for each in here:
        each.at = end
        stop_for_good(each)
        end = each.at
    for each in (there[0], other, there[1]):
        each.at = end + MS
        each.start()
        end = each.at
    sort(trace)
    found = [(each.source.device, each.destination and each.destination.pid) for each in infer(trace).migrations]
    assert found == [(A, 200), (B, 200)]


def test_note_that_comes_late_is_in_no_phase() -> None:
    trace = Trace()
    times = migrated(trace)
    within = next(n for n, e in enumerate(trace.events) if e.device == A and e.t_begin > times["dt2"][0])
    at = times["dt1"][1]
    trace.events.insert(within, Event(at, at, A, "", "ring_pages", {"index": 0, "runs": 1, "pages": 2}, None))
    stamped = infer(trace).trace
    assert [event.phase for event in stamped.events if event.result is None] == [""]
    begin = min(event.t_begin for event in stamped.events if event.phase == DT2_STOP)
    assert begin == times["dt2"][0]


def test_recording_of_the_source_alone_has_its_downtimes() -> None:
    trace = Trace()
    here = started(trace, A)
    dt1 = switch(here, 20 * MS)
    here.wait(100)
    dt2 = stop_for_good(here, 7 * MS)
    (migration,) = infer(trace).migrations
    assert migration.dt1_ms == pytest.approx(length(dt1))
    assert migration.dt2_ms == pytest.approx(length(dt2))
    assert migration.stop_to_run_ms is None


def test_calls_on_the_source_once_the_destination_runs_are_not_downtime() -> None:
    """The guest runs by then: our own source resets its device behind the hand-over."""
    trace = Trace()
    there, here = waiting(trace, B), started(trace, A)
    switch(here)
    begin = here.at + 10_000
    here.call("VHOST_VDPA_SUSPEND")
    end = here.at
    there.at = here.at + MS
    there.start()
    here.at = there.at + MS
    here.call("VHOST_VDPA_SET_STATUS", 500 * MS, status=0)
    sort(trace)
    (migration,) = infer(trace).migrations
    assert migration.dt2_ms == pytest.approx((end - begin) / 1e6)


def test_requests_to_a_waiting_destination_start_nothing() -> None:
    trace = Trace()
    there, here = waiting(trace, B), started(trace, A)
    switch(here)
    stop_for_good(here)
    there.at = here.at + MS
    for _ in range(3):
        there.call("VHOST_VDPA_GET_STATUS", 100 * MS, status=0)
    asked = there.at
    there.start()
    sort(trace)
    (migration,) = infer(trace).migrations
    assert migration.t_start >= asked


def test_calls_that_follow_an_idle_time_are_not_part_of_a_stop() -> None:
    trace = Trace()
    here = started(trace, A)
    switch(here)
    dt2 = stop_for_good(here)
    here.wait(4_000)
    here.call("VHOST_VDPA_SET_STATUS", status=0)
    (migration,) = infer(trace).migrations
    assert migration.dt2_ms == pytest.approx(length(dt2))


def test_queue_that_the_guest_enables_later_does_not_lengthen_a_start() -> None:
    trace = Trace()
    here = started(trace, A)
    dt1 = switch(here)
    here.wait(30)
    here.call("VHOST_VDPA_SET_VRING_ENABLE", index=3, num=1)
    (migration,) = infer(trace).migrations
    assert migration.dt1_ms == pytest.approx(length(dt1))


def test_killed_process_leaves_no_migration() -> None:
    trace = Trace()
    here = started(trace, A)
    here.close()
    found = infer(trace)
    assert found.migrations == []
    assert found.sessions[0].episodes[-1].closed


def test_failed_open_does_not_end_a_session() -> None:
    trace = Trace()
    here = started(trace, A)
    here.call("open", result=-16, pid=300, comm="other")
    dt1 = switch(here)
    (migration,) = infer(trace).migrations
    assert migration.dt1_ms == pytest.approx(length(dt1))


def test_device_that_was_open_before_is_followed_from_what_is_known() -> None:
    trace = Trace()
    here = started(trace, A)
    begin = len(trace.events)
    stop_for_good(here)
    trace.events = trace.events[begin:]
    summary = summarize(trace)
    assert summary.devices()[0]["processes"] == [{"pid": None, "comm": "", "open_before": True}]
    assert summary.found.migrations == []


def test_summary_counts_calls_and_advises_with_figures() -> None:
    trace = Trace()
    migrated(trace)
    summary = summarize(trace)
    of_device = {each["device"]: each for each in summary.devices()}
    source, destination = of_device[A], of_device[B]
    assert source["destination"] == B
    assert source["ioctls"] == sum(e.event.startswith("VHOST_") and e.device == A for e in trace.events)
    assert source["messages"] == sum(e.event.startswith("IOTLB_") and e.device == A for e in trace.events)
    assert destination["dt1_ms"] is None
    unmapped = [each for each in summary.advice if each.id == "guest-memory-unmapped"]
    assert [each.ms for each in unmapped] == [pytest.approx(40_000, rel=0.01), pytest.approx(7_000, rel=0.01)]
    by_id = {(each.id, each.device): each for each in summary.advice}
    assert by_id["guest-memory-mapped-late", B].ms == pytest.approx(20_000, rel=0.01)
    assert "had been mapped before" in by_id["guest-memory-mapped-late", B].text
    assert "IOTLB_PERSIST" in by_id["not-acknowledged", A].text
    times = [each.ms or 0 for each in summary.advice]
    assert times == sorted(times, reverse=True)
    assert summary.to_dict()["lost_events"] == 0


def test_moved_memory_is_still_guest_memory() -> None:
    """In shadow mode QEMU maps guest memory at other addresses; its rings lie in maps of their own."""
    trace = Trace()
    here = started(trace, A)
    switch(here)
    (session,) = infer(trace).sessions
    assert [episode.shadow for episode in session.episodes] == [False, False, True]
    assert MOVED


RECORDINGS = Path(__file__).parent / "recordings"


def own(procedure: str) -> Trace:
    """A real migration on two devices, as our own door recorded it, with the phases that the program stamped."""
    with gzip.open(RECORDINGS / f"{procedure}.jsonl.gz", "rt") as file:
        return records.read_recording(file)[0]


@pytest.mark.parametrize("procedure", ["direct", "in-place"])
def test_real_migration_is_found_by_its_calls_alone(procedure: str) -> None:
    """Every call but those that only read is given the phase that the program gave it."""
    stamped = own(procedure)
    bare = Trace()
    bare.events = [event._replace(phase="") for event in stamped.events if event.result is not None]
    found = infer(bare)
    source, destination = stamped.devices()
    assert milliseconds(found.trace, source, DT1) == milliseconds(stamped, source, DT1) > 0
    assert milliseconds(found.trace, source, DT2) == milliseconds(stamped, source, DT2) > 0
    calls = [event for event in stamped.events if event.result is not None]
    differ = [(a.event, a.phase, b.phase) for a, b in zip(calls, found.trace.events, strict=True) if a.phase != b.phase]
    assert [each for each in differ if "_GET_" not in each[0]] == []
    (migration,) = found.migrations
    assert (migration.source.device, migration.destination and migration.destination.device) == (source, destination)


def test_recordings_of_both_hosts_give_the_figures_of_one() -> None:
    """Each host calls its device by the same name and has a clock of its own."""
    whole = Trace()
    migrated(whole)
    source, destination = Trace(), Trace()
    offset = 777_000 * MS
    source.events = [event for event in whole.events if event.device == A]
    destination.events = [
        event._replace(device=A, t_begin=event.t_begin + offset, t_end=event.t_end + offset)
        for event in whole.events
        if event.device == B
    ]
    clock = {"realtime_minus_monotonic_ns": 5_000_000 * MS, "max_error_ms": 1.0}
    here = {"clock": {**clock, "boot_id": "here"}}
    there = {
        "clock": {**clock, "boot_id": "there", "realtime_minus_monotonic_ns": 5_000_000 * MS - offset},
    }
    joined = clocks.join([("here", source, here), ("there", destination, there)])
    (migration,) = infer(joined.trace).migrations
    (expected,) = infer(whole).migrations
    assert migration.stop_to_run_ms == expected.stop_to_run_ms
    assert migration.destination is not None
    assert (migration.source.device, migration.destination.device) == (f"here:{A}", f"there:{A}")
    assert joined.clocks[1]["offset_ns"] == -offset


def test_recorded_qemu_has_the_figures_of_the_log_from_inside_it() -> None:
    """Stock QEMU 11.1.3 in the lab, in virtual time; a preloaded library logged the same run."""
    logged = {"dt1": 23_397.643, "dt2": 6_925.698, "stop_to_run": 27_889.010}
    with gzip.open(RECORDINGS / "qemu-11.1.jsonl.gz", "rt") as file:
        trace, _ = records.read_recording(file)
    (migration,) = infer(trace).migrations
    assert migration.dt1_ms == pytest.approx(logged["dt1"], abs=0.02)
    assert migration.dt2_ms == pytest.approx(logged["dt2"], abs=0.02)
    assert migration.stop_to_run_ms == pytest.approx(logged["stop_to_run"], abs=0.02)
