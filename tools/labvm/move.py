"""One move: a guest under one QEMU, traffic, live migration to a second QEMU, and what each side saw of it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from labvm import calls
from labvm.backends import Attachment, attached
from labvm.machine import GUEST, GuestMachine, Machine, ring_entries, started
from labvm.network import ADDRESS, AS_PROGRAMS_RUN, Costs, NotReady, Wires, loops, wires
from labvm.qmp import QmpError

BANDWIDTH = 10 << 30
"""Bytes per second for a migration: memory is moved as fast as the machine can, so that it hides nothing."""

HELD = 1 << 12
"""Bytes per second until the destination is ready. A guest that is charged as 128 GiB has the memory of a small one:
its memory would have moved before a device could map what it is charged as, which takes less than moving it would."""
READY_S = 120.0

MIGRATING = "migrating"
REMIND_S = 20.0


@dataclass(frozen=True)
class Plan:
    """What to move, how, and for how long."""

    vmm: str
    backend: str = "vhost-vdpa"
    looped: bool = False
    """On vdpa_sim_net, which loops frames back, instead of vdpa_hwsim with a switch at the end of its wires."""
    costs: Costs = field(default_factory=Costs)
    guest: GuestMachine = field(default_factory=GuestMachine)
    seconds: float = 3.0
    """How long traffic is watched before the move, and after it."""
    limit: float = 300.0
    """For each step, seconds of the machine's clock."""


Say = Callable[[str], None]


class Peer:
    """The program at the other end of the wires."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def report(self) -> dict[str, Any]:
        """Return its account so far."""
        assert self._process.stdin
        self._process.stdin.write("report\n")
        self._process.stdin.flush()
        return self.read()

    def gap(self, begin: int, end: int) -> tuple[int, int] | None:
        """Return begin and length of the longest gap between two frames that overlaps a span, ns; None if unknown."""
        assert self._process.stdin
        self._process.stdin.write(f"gap {begin} {end}\n")
        self._process.stdin.flush()
        gap: tuple[int, int] | None = self.read()["gap"]
        return gap

    def read(self) -> dict[str, Any]:
        """Return its next line."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise NotReady("vm-peer ended")
        report: dict[str, Any] = json.loads(line)
        return report


@contextmanager
def peer() -> Iterator[Peer]:
    """Start the other end."""
    argv = [*AS_PROGRAMS_RUN, str(GUEST / "vm-peer"), ADDRESS]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            end = Peer(process)
            end.read()
            yield end
        finally:
            process.kill()


@dataclass
class Outcome:
    """What came of a move. Spans of time are (begin, end), CLOCK_MONOTONIC in ns."""

    plan: Plan
    figures: calls.Move
    stopped_ns: int
    """The source's QEMU said that the guest is paused and its devices have stopped."""
    resumed_ns: int
    """The destination's QEMU let it run."""
    qemu_downtime_ms: float | None
    guest: dict[str, Any]
    peer: dict[str, Any] | None
    """What the other end of the wire saw; None if frames are looped back."""
    counters: list[dict[str, int]]
    timeline: list[tuple[int, str]]
    logs: tuple[list[calls.Call], list[calls.Call]]
    work: list[calls.Call] = field(default_factory=list)
    """When serve was at work, on either side."""
    lost_before: int = 0
    """Frames that the guest sent before its device had started; the guest's own kernel drops them."""

    @property
    def stop_to_run(self) -> tuple[int, int]:
        """Return the span from the source's stop to the last queue that runs at the destination.

        QEMU pauses the guest right before it stops the device, and reports it afterwards: the stop's first call counts.
        """
        stop, start = self.figures.stop, self.figures.start
        begin = stop[0] if stop else self.stopped_ns
        return begin, max(self.resumed_ns, start[1] if start else 0)

    def ask_for_gaps(self, far: Peer) -> None:
        """Note the gaps at the switch and at the move: on a slow machine they are not among the longest there were."""
        assert self.peer is not None
        spans = [self.stop_to_run, *([self.figures.switch] if self.figures.switch else [])]
        self.peer["asked"] = [gap for gap in (far.gap(*span) for span in spans) if gap]


def wait_until(
    machine: Machine, condition: Callable[[], object], what: str, limit: float, others: tuple[Machine, ...] = ()
) -> None:
    """Serve machines until something is so."""
    begin = noted = time.monotonic()
    while not condition():
        machine.poll(0.05)
        for other in others:
            other.poll()
        if time.monotonic() - noted > REMIND_S:
            noted = time.monotonic()
            if why := machine.trouble():
                raise NotReady(f"waited {noted - begin:.0f} s for {what}: {why}")
            print(f"waiting for {what}, {noted - begin:.0f} s; {_last(machine)}", file=sys.stderr, flush=True)
        if time.monotonic() - begin > limit:
            said = "; ".join(machine.console.other[-5:])
            raise NotReady(
                f"waited {limit:g} s for {what}; {_last(machine)}; its console: {said or 'nothing'}; {machine.errors()}"
            )


def _last(machine: Machine) -> str:
    """Return the guest's last report in short."""
    if not machine.reports or "udp" not in machine.reports[-1]:
        return "the guest has not reported yet"
    report = machine.reports[-1]
    return (
        f"the guest at its {report['t_ns'] / 1e9:.1f} s: {report['udp']['sent']} frames sent, "
        f"{report['udp']['received']} answers, TCP {report['tcp']['sent']} bytes sent, {report['tcp']['echoed']} back"
    )


def flows(machine: Machine, limit: float, begin: int = 0) -> None:
    """Wait until both streams of the guest flow: a report that comes from now on shows it."""
    seen = len(machine.reports)

    def flowing() -> bool:
        new = [report for report in machine.reports[seen:] if "guest" in report and report["udp"]["received"] > begin]
        return bool(new) and (not new[-1]["tcp"]["sent"] or new[-1]["tcp"]["echoed"] > 0)

    wait_until(machine, flowing, "answers to the guest's frames", limit)


def run(plan: Plan, folder: Path, say: Say) -> Outcome:
    """Move a guest once; NotReady or QmpError says what went wrong."""
    if plan.looped:
        plan = replace(plan, guest=replace(plan.guest, looped=True))
        with loops(plan.guest.memory) as there:
            return _move(plan, folder, there, None, say)
    with wires(plan.costs, ring_entries(plan.vmm)) as there, peer() as far:
        return _move(plan, folder, there, far, say)


def _move(plan: Plan, folder: Path, there: Wires, far: Peer | None, say: Say) -> Outcome:
    timeline: list[tuple[int, str]] = []

    def mark(text: str) -> None:
        timeline.append((time.monotonic_ns(), text))
        say(text)

    with ExitStack() as stack:
        near, other = (
            stack.enter_context(attached(plan.backend, sim, folder, name, onward))
            for sim, name, onward in zip(there.devices, ("source", "destination"), ("destination", ""), strict=True)
        )
        mark(f"QEMU {plan.vmm} starts the guest on {there.devices[0].chardev} ({plan.backend})")
        source = stack.enter_context(started(plan.vmm, folder, "source", near.netdev, plan.guest))
        source.trouble = near.trouble
        stack.callback(_note_devices, folder, there)
        wait_until(source, lambda: source.reports, "the guest's first report", plan.limit)
        mark("the guest is up")
        flows(source, plan.limit)
        mark("traffic flows")
        lost = int(far.report()["udp"]["lost"]) if far else 0
        serve(source, plan.seconds)
        destination = stack.enter_context(
            started(plan.vmm, folder, "destination", other.netdev, plan.guest, incoming=True)
        )
        destination.trouble = other.trouble
        mark("the second QEMU is ready")
        migrate(source, destination, f"unix:{folder}/migration", plan.limit, mark, near)
        flows(destination, plan.limit, source.reports[-1]["udp"]["received"])
        mark("traffic flows at the destination")
        serve(destination, plan.seconds)
        destination.console.send("stop")
        wait_until(destination, lambda: _stopped(destination), "the guest's last report", plan.limit)
        guest, account = destination.reports[-1], far.report() if far else None
        mark("done")
        stats = [sim.counters() for sim in (*there.devices, *there.ends)]
        downtime = source.qmp.command("query_migrate").get("downtime")
        paused, resumed = source.qmp.find("STOP"), destination.qmp.find("RESUME")
    if not paused or not resumed:
        raise NotReady("QEMU did not say when it paused the guest and let it run")
    timeline += [(event.at_ns, f"source: {_event(event)}") for event in source.qmp.events]
    timeline += [(event.at_ns, f"destination: {_event(event)}") for event in destination.qmp.events]
    for name, attachment in (("source", near), ("destination", other)):
        timeline += [(at, f"{name}'s serve: {_served(event)}") for at, event in attachment.events()]
    read = calls.read(near.calls), calls.read(other.calls)
    work = [call for made in read for call in made if call.name == calls.WORK]
    near_log, far_log = ([call for call in made if call.name != calls.WORK] for made in read)
    logs = near_log, far_log
    migrating = next(at for at, text in timeline if text == MIGRATING)
    figures = calls.move(*logs, migrating, paused.at_ns, resumed.at_ns)
    spans = paused.at_ns, resumed.at_ns
    outcome = Outcome(plan, figures, *spans, downtime, guest, account, stats, sorted(timeline), logs, work, lost)
    if far:
        outcome.ask_for_gaps(far)
    return outcome


def _note_devices(folder: Path, there: Wires) -> None:
    """Write down the devices' state, to find out why a move failed."""
    for sim in (*there.devices, *there.ends):
        told = {"state": sim.read("state"), "stats": sim.read("stats")}
        (folder / f"{sim.name}.json").write_text(json.dumps(told, indent=1) + "\n")


def _event(event: Any) -> str:
    status = event.data.get("status")
    return f"{event.name} {status}" if status else str(event.name)


def _served(event: dict[str, Any]) -> str:
    """Return an event of serve in short."""
    words = [f"{name} {event[name]}" for name in ("ms", "mode", "how", "said", "why", "error") if event.get(name)]
    return f"{event['event']}" + (f" ({', '.join(words)})" if words else "")


def _stopped(machine: Machine) -> bool:
    return bool(machine.reports) and machine.reports[-1].get("guest") == "stopped"


def serve(machine: Machine, seconds: float) -> None:
    """Let it run for a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        machine.poll(0.2)


def migrate(
    source: Machine, destination: Machine, uri: str, limit: float, say: Say, near: Attachment | None = None
) -> None:
    """Move the guest; QmpError if QEMU says that it failed.

    Memory is held back until ``near``, the source's back-end, says that the destination is ready; QEMU's own has
    nothing to wait for.
    """
    for machine in (source, destination):
        machine.qmp.command("migrate_set_capabilities", capabilities=[{"capability": "events", "state": True}])
    waits = near is not None and near.log is not None
    source.qmp.command("migrate_set_parameters", max_bandwidth=HELD if waits else BANDWIDTH)
    destination.qmp.command("migrate_incoming", uri=uri)
    seen = len(near.events()) if near is not None else 0
    say(MIGRATING)
    source.qmp.command("migrate", uri=uri)

    def failed() -> bool:
        return source.qmp.find("MIGRATION", status="failed") is not None

    def over() -> bool:
        return failed() or bool(source.qmp.find("MIGRATION", status="completed") and destination.qmp.find("RESUME"))

    if waits:
        assert near is not None
        _hold(source, destination, near, seen, over, say)
        source.qmp.command("migrate_set_parameters", max_bandwidth=BANDWIDTH)
    wait_until(source, over, "the end of the migration", limit, (destination,))
    if failed():
        why = source.qmp.command("query_migrate").get("error-desc", "no reason given")
        raise QmpError(f"the migration failed: {why}; {source.errors()}; {destination.errors()}")
    say("migrated")


def _hold(
    source: Machine, destination: Machine, near: Attachment, seen: int, over: Callable[[], bool], say: Say
) -> None:
    """Wait until the destination's device is ready, as an event behind the first ``seen`` says, or cannot be."""
    begin = time.monotonic()

    def ready() -> bool:
        new = [event["event"] for _, event in near.events()[seen:]]
        return over() or "peer-ready" in new or time.monotonic() - begin > READY_S

    wait_until(source, ready, "the destination's serve to be ready", 2 * READY_S, (destination,))
    said = near.told("peer-ready", "peer-not-ready")
    say(
        "the destination is ready"
        if said and said["event"] == "peer-ready"
        else f"the destination is not ready: {said}"
    )
