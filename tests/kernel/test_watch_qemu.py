# lab: --vmm
"""A stock QEMU is recorded from outside; a library preloaded into it wrote down the same calls, as a second witness."""

from __future__ import annotations

import json
import os
import statistics
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import lab
import pytest
from tracing import mounted

from labvm import calls, move, report
from labvm.machine import GuestMachine, ring_entries, started, vhost_vdpa, vmms
from labvm.network import Costs
from pyvhostvdpa.trace import clocks, live, records
from pyvhostvdpa.trace.recorder import Event
from pyvhostvdpa.trace.sessions import Followers
from pyvhostvdpa.trace.summary import Summary, summarize
from pyvhostvdpa.trace.surroundings import Facts
from pyvhostvdpa.trace.watch import CALLER

PROFILE = os.environ.get("WATCH_PROFILE", "none")
KEEP = os.environ.get("WATCH_KEEP")
NEAR_NS = 50_000
ENTRIES = 256
"""Of a ring of vdpa_sim (VDPASIM_QUEUE_MAX in drivers/vdpa/vdpa_sim/vdpa_sim.h)."""
VIRTUAL = os.environ.get("PYVHOSTVDPA_LAB_ACCEL") == "icount"


@dataclass(frozen=True)
class Moved:
    """A move by the log of the preloaded library: the calls on both devices, and figures from them."""

    logs: tuple[list[calls.Call], list[calls.Call]]
    figures: calls.Move
    outcome: move.Outcome | None = None

    @property
    def stop_to_run_ms(self) -> float | None:
        stop, start = self.figures.stop, self.figures.start
        return (start[1] - stop[0]) / 1e6 if stop and start else None


@dataclass(frozen=True)
class Recorded:
    """One move, as both witnesses saw it."""

    move: Moved
    summary: Summary
    lost: int
    row: dict[str, Any] | None
    """What the guest and the other end of its wire say of the move; not on a device that is no network."""


@contextmanager
def noting(watch: live.Watch) -> Iterator[None]:
    """Look where memory lies while QEMU runs, as the command does."""
    ended, facts, followers = threading.Event(), Facts(), Followers()

    def follow() -> None:
        over = False
        while not over:
            over = ended.wait(0.1)
            for event in watch.events():
                for note in facts.notes(event, *followers.feed(event)):
                    watch.trace.append(note)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


EVERY = [(vmm, kind) for vmm in reversed(vmms()) for kind in ("vdpa_hwsim", "vdpa_sim_net")]
CASES = EVERY if os.environ.get("WATCH_EVERY_QEMU") else EVERY[:1]
"""Every version takes minutes: `tools/lab test --vmm --env WATCH_EVERY_QEMU=1 tests/kernel/test_watch_qemu.py`."""


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    vmm, kind = request.param
    folder = tmp_path_factory.mktemp("move")
    with mounted(), pytest.MonkeyPatch.context() as patch:
        # no other thread runs between the clock of the library and the call that it logs
        patch.setenv("VDPA_AHEAD", "1")
        with live.Watch() as watch:
            with noting(watch):
                moved = on_hwsim(vmm, folder) if kind == "vdpa_hwsim" else on_sim_net(vmm, folder)
            watch.stop()
        if KEEP:
            with open(f"{KEEP}-{vmm}-{kind}.jsonl", "w", encoding="utf-8") as file:
                records.write(watch.trace, file, {"clock": clocks.now()})
        row = report.row(moved.outcome) if moved.outcome else None
        yield Recorded(moved, summarize(watch.trace), watch.lost, row)


def on_hwsim(vmm: str, folder: Path) -> Moved:
    """Between two devices of vdpa_hwsim, with traffic to a peer."""
    costs = Costs(PROFILE, 64 << 20, 128 << 30)
    outcome = move.run(move.Plan(vmm, costs=costs, guest=GuestMachine(memory=64 << 20), seconds=1.0), folder, print)
    return Moved(outcome.logs, outcome.figures, outcome)


def runs(log: Path) -> bool:
    """Whether the guest's driver has its queues, by the log of the preloaded library."""
    return any(call.name == "SET_VRING_ENABLE" and call.end_ns for call in calls.read(log))


def on_sim_net(vmm: str, folder: Path) -> Moved:
    """Between two devices of vdpa_sim_net, which send a guest's frames back to it.

    A QEMU that gives a Linux guest larger rings than these devices have (ENTRIES) moves iPXE, which takes smaller ones.
    """
    lab.reload()
    guest = GuestMachine(memory=64 << 20, looped=True, huge=False, firmware=ring_entries(vmm) > ENTRIES)
    with (
        started(vmm, folder, "destination", vhost_vdpa(lab.DEVICES[1]), guest, incoming=True) as destination,
        started(vmm, folder, "source", vhost_vdpa(lab.DEVICES[0]), guest) as source,
    ):
        move.wait_until(source, lambda: runs(folder / "source.calls"), "the device to run", 600, (destination,))
        if not guest.firmware:
            move.wait_until(source, lambda: source.reports, "the guest's first report", 600, (destination,))
        begin = time.monotonic_ns()
        move.migrate(source, destination, f"unix:{folder}/migration", 600, print)
        move.serve(destination, 2)
        paused, resumed = source.qmp.find("STOP"), destination.qmp.find("RESUME")
    logs = calls.read(folder / "source.calls"), calls.read(folder / "destination.calls")
    assert paused
    assert resumed
    return Moved(logs, calls.move(*logs, begin, paused.at_ns, resumed.at_ns))


def test_every_case_is_both_versions_on_both_kinds_of_device() -> None:
    """The lab has two: the distribution's QEMU and a newer one."""
    assert len(EVERY) == len(set(EVERY)) == 4
    assert {kind for _, kind in EVERY} == {"vdpa_hwsim", "vdpa_sim_net"}


def short(event: Event) -> str:
    return event.event.removeprefix("VHOST_").removeprefix("VDPA_")


WORD, LONG = struct.Struct("<I"), struct.Struct("<Q")
SIGNED = struct.Struct("<i")
STATES = ("VRING_NUM", "VRING_BASE", "VRING_ENABLE", "VRING_GROUP", "GROUP_ASID", "VRING_DESC_GROUP", "VRING_SIZE")
PLACES = {
    **{f"{verb}_{name}": {"index": (WORD, 0), "num": (WORD, 4)} for verb in ("GET", "SET") for name in STATES},
    "SET_VRING_ADDR": {"index": (WORD, 0), "desc": (LONG, 8), "used": (LONG, 16), "avail": (LONG, 24)},
    **{f"SET_VRING_{name}": {"index": (WORD, 0), "fd": (SIGNED, 4)} for name in ("KICK", "CALL", "ERR")},
    "SET_CONFIG_CALL": {"fd": (SIGNED, 0)},
    "GET_FEATURES": {"features": (LONG, 0)},
    "SET_FEATURES": {"features": (LONG, 0)},
    "GET_BACKEND_FEATURES": {"backend_features": (LONG, 0)},
    "SET_BACKEND_FEATURES": {"backend_features": (LONG, 0)},
    "GET_DEVICE_ID": {"device_id": (WORD, 0)},
    "GET_STATUS": {"status": (struct.Struct("B"), 0)},
    "SET_STATUS": {"status": (struct.Struct("B"), 0)},
    "GET_CONFIG": {"off": (WORD, 0), "len": (WORD, 4)},
    "SET_CONFIG": {"off": (WORD, 0), "len": (WORD, 4)},
    "GET_VRING_NUM": {"vring_num": (struct.Struct("<H"), 0)},
    "GET_CONFIG_SIZE": {"config_size": (WORD, 0)},
    "GET_AS_NUM": {"as_num": (WORD, 0)},
    "GET_GROUP_NUM": {"group_num": (WORD, 0)},
    "GET_VQS_COUNT": {"vqs_count": (WORD, 0)},
    "GET_IOVA_RANGE": {"first": (LONG, 0), "last": (LONG, 8)},
    "SET_MEM_TABLE": {"nregions": (WORD, 0)},
}


def fields(call: calls.Call) -> dict[str, int]:
    """What a call of the preloaded library carried, decoded on its own."""
    if call.name.startswith("IOTLB_"):
        message = call.message()
        wanted = ["asid"] if "BATCH" in call.name else ["asid", "iova", "size"]
        wanted += ["uaddr", "perm"] if call.name == "IOTLB_UPDATE" else []
        return {name: message[name] for name in wanted}
    data = call.received if call.name.startswith("GET_") and call.result >= 0 else call.sent
    found = {name: int(form.unpack_from(data, at)[0]) for name, (form, at) in PLACES.get(call.name, {}).items()}
    if call.result < 0 and call.name.startswith("GET_"):
        found = {name: value for name, value in found.items() if name == "index"}
    return found


def seen(summary: Summary, device: int) -> list[Event]:
    """The calls of the recording that the library logs too, in the order of their begin."""
    path = f"/dev/vhost-vdpa-{device}"
    events = [e for e in summary.trace.events if e.device == path and e.result is not None and e.event != CALLER]
    return sorted((e for e in events if e.event not in ("open", "close", "mmap")), key=lambda e: e.t_begin)


def logged(log: Sequence[calls.Call]) -> list[calls.Call]:
    return sorted((call for call in log if call.end_ns), key=lambda call: call.begin_ns)


MADE = {"SET_OWNER", "SET_FEATURES", "SET_VRING_ADDR", "SET_VRING_BASE", "SET_VRING_ENABLE", "SET_STATUS", "GET_CONFIG"}
MADE |= {"IOTLB_BATCH_BEGIN", "IOTLB_UPDATE", "IOTLB_INVALIDATE", "IOTLB_BATCH_END", "SUSPEND", "GET_VRING_BASE"}
"""On each device of a move. How many there are depends on QEMU: 10.0 makes 97 on a destination, 11.1 makes 113."""


def test_every_call_is_what_the_library_logged(recorded: Recorded) -> None:
    """Order, arguments and results."""
    # a guest that is firmware does not look at its configuration again when it has moved
    assert {call.name for log in recorded.move.logs for call in logged(log)} >= MADE
    for log in recorded.move.logs:
        made = logged(log)
        device = made[0].device
        assert {call.name for call in made} >= MADE - {"GET_CONFIG"}
        theirs = [(c.name, fields(c), -c.error if c.result < 0 else c.result) for c in made]
        ours = [(short(e), dict(e.fields), e.result) for e in seen(recorded.summary, device)]
        assert ours == theirs
    assert recorded.lost == 0


def test_guest_arrives_whole_while_its_vmm_is_recorded(recorded: Recorded) -> None:
    if recorded.row is None:
        return
    assert report.faults(recorded.row) == []
    assert recorded.row["guest"]["lost"] == 0
    assert min(recorded.row["device"]["sent"]) > 0
    assert 0 < recorded.row["dt2_ms"] < recorded.row["stop_to_run_ms"]
    assert recorded.row["guest"]["move_gap_ms"] >= recorded.row["start_ms"]
    source, destination = recorded.move.logs
    assert all(call.end_ns >= call.begin_ns for log in (source, destination) for call in log)
    assert sum(call.name == "SUSPEND" for call in source) == 2
    assert calls.first(source, lambda call: call.result < 0 and call.name.startswith("IOTLB")) is None


def test_times_are_those_that_the_library_logged(recorded: Recorded) -> None:
    """All within 50 us in virtual time. In wall clock half of them within 25: an emulated CPU may pause on the way."""
    apart: list[int] = []
    undisturbed: list[int] = []
    for log in recorded.move.logs:
        made = logged(log)
        for call, event in zip(made, seen(recorded.summary, made[0].device), strict=True):
            assert call.begin_ns <= event.t_begin <= event.t_end <= call.end_ns
            pair = [event.t_begin - call.begin_ns, call.end_ns - event.t_end]
            apart += pair
            undisturbed += [] if call.lost_cpu else pair
    far = sorted(each for each in apart if each > NEAR_NS)
    print(f"differences of times: median {statistics.median(apart)} ns, longest {max(apart)} ns, {len(apart)} of them")
    print(f"of {len(undisturbed)} whose thread kept the CPU: longest {max(undisturbed)} ns")
    print(f"more than {NEAR_NS} ns: {far}")
    if VIRTUAL:
        assert max(apart) <= NEAR_NS
    else:
        assert statistics.median(apart) <= NEAR_NS / 2


def test_figures_agree_with_those_of_the_log(recorded: Recorded) -> None:
    figures = recorded.move.figures
    print(json.dumps({k: v for k, v in recorded.summary.to_dict().items() if k != "recording"}, indent=1))
    print(figures, recorded.move.stop_to_run_ms)
    (migration,) = recorded.summary.found.migrations
    near = 0.01 if VIRTUAL else 0.05
    # a figure is the difference of two times; a device without costs has some of less than a millisecond
    assert migration.dt1_ms == pytest.approx(figures.dt1_ms, rel=near, abs=NEAR_NS / 1e6)
    assert migration.dt2_ms == pytest.approx(figures.dt2_ms, rel=near, abs=NEAR_NS / 1e6)
    assert migration.stop_to_run_ms == pytest.approx(recorded.move.stop_to_run_ms, rel=near)
