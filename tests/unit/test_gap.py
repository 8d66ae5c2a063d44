"""Stop to run: what a trace shows of the time in which the guest was stopped."""

from __future__ import annotations

from pyvhostvdpa.trace import gap
from pyvhostvdpa.trace.recorder import Event, Trace

MS = 1_000_000


def event(begin: int, end: int, phase: str, name: str = "note", device: str = "a", **fields: int) -> Event:
    return Event(begin * MS, end * MS, device, phase, name, fields, None if name == "note" else 0)


WHOLE = [
    event(0, 1, gap.PAUSE),
    event(2, 5, "dt2.stop", "VHOST_VDPA_SUSPEND"),
    event(2, 6, "dt2.stop", "VHOST_VDPA_SUSPEND", "b"),
    event(6, 8, gap.LAST_ROUND),
    event(8, 9, "dest.start", "VHOST_SET_VRING_BASE", index=0, num=4),
    event(9, 12, "dest.start", "VHOST_VDPA_RESUME"),
    event(9, 14, "dest.start", "VHOST_VDPA_RESUME", "b"),
    event(14, 30, "dest.start", "VHOST_VDPA_GET_CONFIG"),
]


def test_stop_to_run_ends_with_the_last_running_queue_of_all_devices() -> None:
    whole = gap.stop_to_run(gap.steps(WHOLE))
    assert whole is not None
    assert whole.ms == 14
    assert whole.by_phase() == {
        gap.PAUSE: 1.0, gap.BETWEEN: 1.0, "dt2.stop": 4.0, gap.LAST_ROUND: 2.0, "dest.start": 6.0
    }  # fmt: skip


def test_the_pieces_follow_on_each_other_and_sum_up_to_it() -> None:
    whole = gap.stop_to_run(gap.steps(WHOLE))
    assert whole is not None
    assert all(before.end == after.begin for before, after in zip(whole.pieces, whole.pieces[1:], strict=False))
    assert sum(piece.ms for piece in whole.pieces) == whole.ms


def test_steps_that_overlap_are_counted_once() -> None:
    overlapping = [event(0, 4, gap.PAUSE), event(2, 3, "dt2.stop", "X"), event(3, 6, "dest.start", "VHOST_VDPA_RESUME")]
    whole = gap.stop_to_run(gap.steps(overlapping))
    assert whole is not None
    assert (whole.ms, whole.by_phase()) == (6.0, {gap.PAUSE: 4.0, "dest.start": 2.0})


def test_a_guest_that_was_not_paused_or_never_ran_has_none() -> None:
    assert gap.stop_to_run(gap.steps(WHOLE[1:])) is None
    assert gap.stop_to_run(gap.steps(WHOLE[:4])) is None
    assert gap.stop_to_run([]) is None


def test_only_the_last_pause_counts_after_a_cancelled_migration() -> None:
    earlier = [event(-50, -49, gap.PAUSE), event(-45, -40, "dt2.stop", "VHOST_VDPA_SUSPEND")]
    whole = gap.stop_to_run(gap.steps([*earlier, *WHOLE]))
    assert whole is not None
    assert whole.ms == 14


def test_steps_of_both_sides_are_joined_by_their_common_clock() -> None:
    here, there = WHOLE[:4], WHOLE[4:]
    told = gap.from_numbers(gap.to_numbers(gap.steps(there)))
    assert gap.stop_to_run([*gap.steps(here), *told]) == gap.stop_to_run(gap.steps(WHOLE))
    part = gap.join(gap.steps(here))
    assert part is not None
    assert part.ms == 8


def test_a_call_that_failed_sets_nothing_running() -> None:
    failed = Event(0, 1, "a", "dest.start", "VHOST_VDPA_RESUME", {}, -5)
    assert not gap.sets_running(failed)
    assert gap.sets_running(event(0, 1, "dest.start", "VHOST_VDPA_SET_STATUS", status=15))
    assert not gap.sets_running(event(0, 1, "dest.start", "VHOST_VDPA_SET_STATUS", status=3))
    assert gap.sets_running(event(0, 1, "dest.start", "VHOST_VDPA_SET_VRING_ENABLE", index=0, num=1))


def test_a_step_is_recorded_also_when_it_fails() -> None:
    trace = Trace()
    try:
        with gap.step(trace.device("a"), gap.PAUSE):
            raise ValueError
    except ValueError:
        pass
    [recorded] = trace.events
    assert (recorded.phase, recorded.event, recorded.result) == (gap.PAUSE, gap.PAUSE, None)


def test_time_taken_by_calls_is_that_of_the_slowest_device() -> None:
    trace = Trace()
    trace.extend(WHOLE)
    assert gap.taken(trace, ("dt2.stop",), gap.suspends) == 4.0
    assert gap.taken(trace, ("dest.start",), gap.sets_running) == 5.0
