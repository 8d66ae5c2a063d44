"""What a move comes to: rows, faults, and the comparison of back-ends, from accounts that are made up here."""

from labvm import calls, report
from labvm.move import Outcome, Plan

MS = 1_000_000


def call(begin, end, name="SET_STATUS"):
    return calls.Call(begin * MS, end * MS, 0, name, 0, 0, b"\0" * 40, b"", 0, 0, 0, 0)


def account(**changes):
    return {
        "received": 100,
        "lost": 0,
        "duplicated": 0,
        "reordered": 0,
        "corrupted": 0,
        "longest_gap_ns": 300 * MS,
        "gaps": [[900 * MS, 300 * MS], [100 * MS, 30 * MS]],
        **changes,
    }


def outcome(**changes):
    guest = {
        "udp": {"sent": 100, **account()},
        "tcp": {"sent": 10, "echoed": 10, "wrong": 0, "broken": 0},
        "memory": {"verified": 5, "wrong": 0},
        "frames": {"tx": 120, "rx": 1},
    }
    given = {
        "plan": Plan("11.1"),
        "figures": calls.Move((110 * MS, 120 * MS), (1000 * MS, 1010 * MS), (1050 * MS, 1080 * MS)),
        "stopped_ns": 1012 * MS,
        "resumed_ns": 1040 * MS,
        "qemu_downtime_ms": 30,
        "guest": guest,
        "peer": {"udp": account()},
        "counters": [{"vq1.packets": 70}, {"vq1.packets": 50}, {}, {}],
        "timeline": [(0, "begin"), (1, "end")],
        "logs": ([call(1000, 1010)], [call(1050, 1060), call(1055, 1080)]),
    }
    return Outcome(**{**given, **changes})


def test_row_has_the_span_from_the_stop_to_the_last_queue_and_who_had_it():
    row = report.row(outcome())
    assert (row["switch_ms"], row["stop_to_run_ms"], row["vmm_ms"]) == (10, 80, 40)
    assert (row["guest"]["switch_gap_ms"], row["guest"]["move_gap_ms"]) == (30, 300)
    assert (row["guest"]["lost"], row["device"]["lost"]) == (0, 0)
    assert report.faults(row) == []


def test_work_of_serve_beside_its_calls_is_its_own_share():
    row = report.row(outcome(work=[call(990, 1002, "WORK"), call(1008, 1015, "WORK"), call(1045, 1062, "WORK")]))
    assert (row["stop_to_run_ms"], row["device_ms"], row["serve_ms"], row["vmm_ms"]) == (80, 40, 10, 30)
    assert report.row(outcome())["serve_ms"] is None
    assert "serve's own share" in report.render(outcome(work=[call(990, 1002, "WORK")]))


def test_frames_from_before_the_device_ran_are_not_lost_by_the_move():
    guest = outcome().guest | {"udp": {"sent": 109, **account(lost=10)}}
    row = report.row(outcome(guest=guest, lost_before=9))
    assert (row["guest"]["lost"], row["guest"]["answers_lost"]) == (0, 1)


def test_a_standstill_that_is_not_among_the_longest_gaps_has_a_bound():
    calm = outcome(peer={"udp": account(gaps=[[900 * MS, 300 * MS], [500 * MS, 40 * MS]])})
    assert report.row(calm)["guest"]["switch_gap_ms"] is None
    assert "300.0 ms at the move and at most 40.0 ms at the switch" in report.render(calm)


def test_a_standstill_that_was_asked_for_is_known_among_longer_gaps():
    class Far:
        def gap(self, begin, end):
            return (100 * MS, 12 * MS) if begin == 110 * MS else None

    busy = outcome(peer={"udp": account(gaps=[[500 * MS, 40 * MS]])})
    busy.ask_for_gaps(Far())
    row = report.row(busy)
    assert (row["guest"]["switch_gap_ms"], row["guest"]["move_gap_ms"]) == (12, None)
    assert "at most 40.0 ms at the move and 12.0 ms at the switch" in report.render(busy)


def test_guest_that_runs_later_than_its_queues_sets_the_end():
    assert report.row(outcome(resumed_ns=1200 * MS))["stop_to_run_ms"] == 200


def test_what_cannot_be_known_is_none():
    row = report.row(outcome(peer=None, counters=[{}, {}], figures=calls.Move(None, None, None)))
    assert [row[name] for name in ("switch_ms", "dt2_ms", "start_ms")] == [None] * 3
    assert (row["guest"]["longest_gap_ms"], row["device"]["lost"]) == (None, None)
    assert "unknown" in report.render(outcome(peer=None))


def faults(name, **changes):
    broken = outcome()
    broken.guest[name].update(changes)
    return report.faults(report.row(broken))


def test_a_guest_that_is_not_whole_is_a_fault():
    assert "1 pages of 5 wrong" in faults("memory", wrong=1)[0]
    assert "TCP" in faults("tcp", broken=1)[0]
    assert "TCP" in faults("tcp", echoed=0)[0]
    assert faults("frames", tx=121) == ["1 frames of the guest were never sent"]
    assert faults("frames", tx=119) == ["the devices sent 1 more frames than the guest"]
    twice = outcome(peer={"udp": account(duplicated=2)})
    assert "2 twice" in report.faults(report.row(twice))[0]
    assert "did not arrive whole" in report.render(twice)


def test_back_ends_are_compared_within_a_profile():
    base = report.row(outcome())
    better = {**base, "backend": "serve", "switch_ms": 0.05, "stop_to_run_ms": 0.8}
    text = report.compare([base, better])
    assert "switch is 1/200 of QEMU's, which is wanted (1/200)" in text
    assert "stop to run is 1/100 of QEMU's, which is wanted (1/100)" in text
    slower = {**better, "stop_to_run_ms": 8}
    text = report.compare([base, slower])
    assert "stop to run is 1/10 of QEMU's, not what is wanted (1/100)" in text
    assert "2 x SET_STATUS on the destination 35.0 ms" in text
