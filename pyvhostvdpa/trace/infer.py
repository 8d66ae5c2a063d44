# SPDX-License-Identifier: MIT
"""The phases of a migration, from nothing but the calls of the processes that make it.

A switch to shadow rings is a stop and a start of one device behind which its rings lie in maps of their own (DT1). A
last stop is one that no start follows; the destination is the device that was open then and runs after it. Going back
from shadow rings is a cancelled migration. Everything else is a start, a restart or a stop, and has no phase.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from . import gap, phases
from .recorder import Event, Trace
from .sessions import DeviceSession, Episode, Follower, What, builds, changes, resets


@dataclass(slots=True)
class Migration:
    """One device's part of a migration: its switch, its last stop, and the start on the device that its guest moved to.

    A part is ``None`` if it did not happen or was not recorded.
    """

    source: DeviceSession
    switch: tuple[Episode, Episode] | None = None
    stop: Episode | None = None
    cancel: tuple[Episode, Episode] | None = None
    destination: DeviceSession | None = None
    start: Episode | None = None
    t_start: int = 0
    """When the destination's state was changed for the first time since the stop began."""
    first_start: int = 0
    """That call's place among the device's events."""

    @property
    def dt1_ms(self) -> float | None:
        """From the switch's first call to its last."""
        return None if self.switch is None else (self.switch[1].t_last - self.switch[0].t_first) / 1e6

    @property
    def dt2_ms(self) -> float | None:
        """From the last stop's first call to its last."""
        return None if self.stop is None else self.stop.ms

    @property
    def stop_to_run_ms(self) -> float | None:
        """From the last stop's first call to the last queue that the start makes ready."""
        if self.stop is None or self.start is None:
            return None
        return (self.start.t_last - self.stop.t_first) / 1e6

    @property
    def cancelled(self) -> bool:
        """Whether the guest went back to passthrough."""
        return self.cancel is not None


@dataclass(slots=True)
class Inferred:
    """What a recording shows: its devices' sessions, and the migrations in order of time."""

    sessions: list[DeviceSession]
    migrations: list[Migration]
    trace: Trace
    """The recording, with a phase on each call that has one: of each device's last migration."""

    def last(self, device: str) -> Migration | None:
        """Return the last migration that a device is the source of."""
        return next((each for each in reversed(self.migrations) if each.source.device == device), None)


def infer(trace: Trace) -> Inferred:
    """Return what a trace shows by its calls alone; phases that it has are replaced."""
    of_device: dict[str, list[Event]] = {}
    for event in trace.events:
        of_device.setdefault(event.device, []).append(event)
    sessions: list[DeviceSession] = []
    for device, events in of_device.items():
        follower = Follower(device)
        for event in events:
            follower.feed(event)
        sessions += follower.sessions
    found = sorted((each for session in sessions for each in _migrations(session)), key=_begin)
    for migration in found:
        _pair(migration, sessions, found, of_device)
        _cut(migration, of_device)
    found = [each for each in found if each.switch is not None or each.start is not None]
    return Inferred(sessions, found, _stamped(trace, found, of_device))


def _begin(migration: Migration) -> int:
    first = migration.switch[0] if migration.switch is not None else migration.stop
    assert first is not None
    return first.t_first


def _migrations(session: DeviceSession) -> Iterator[Migration]:
    """Yield a session's switches to shadow rings, each with what became of it, and its last stop."""
    current: Migration | None = None
    for episode, behind in itertools.zip_longest(session.episodes, session.episodes[1:]):
        if episode.what is not What.STOP:
            continue
        if behind is None:
            current = current or Migration(session)
            current.stop = episode
        elif behind.shadow and episode.shadow is False:
            current = Migration(session, (episode, behind))
        elif episode.shadow and behind.shadow is False and current is not None:
            current.cancel = (episode, behind)
            yield current
            current = None
    if current is not None:
        yield current


def _pair(
    migration: Migration,
    sessions: Sequence[DeviceSession],
    all_of: Sequence[Migration],
    of_device: Mapping[str, Sequence[Event]],
) -> None:
    """Find the destination of a last stop: the device that was open by then and is the first to run behind it.

    A start at the rings' begin does not count, unless the guest that was stopped stood there: that guest boots. Without
    a switch to shadow rings, only a start that goes on does. A process that closes its device hands over no guest.

    A device with other features is not the destination if there is one with the same; and the guest of a process that
    another of its devices has gone to goes there with all of them.
    """
    if migration.stop is None or migration.stop.closed:
        return
    taken = {id(each.start) for each in all_of if each.start is not None}
    stood = _bases(_stops(migration), of_device[migration.source.device], "VHOST_GET_VRING_BASE")
    candidates = [
        (start, session)
        for session in sessions
        if (start := _first_run_behind(session, migration)) is not None
        and id(start) not in taken
        and not _other_guest(migration, stood, start, of_device[session.device])
    ]
    if not candidates:
        return
    source = migration.source
    known = {each.destination.pid for each in all_of if each.destination and each.source.pid == source.pid} - {None}

    def far(pair: tuple[Episode, DeviceSession]) -> tuple[bool, bool, int]:
        start, session = pair
        apart = bool(known) and session.pid not in known
        return apart, session.acknowledged != source.acknowledged, start.running

    migration.start, migration.destination = min(candidates, key=far)


def _other_guest(migration: Migration, stood: Sequence[int], start: Episode, events: Sequence[Event]) -> bool:
    """Whether what starts is a guest of its own, by where its rings begin."""
    boots = _boots(start, events)
    if migration.switch is None:
        goes_on = bool(start.shadow) or any(_bases([start], events, "VHOST_SET_VRING_BASE"))
        return not goes_on
    return boots and (not stood or any(stood))


def _stops(migration: Migration) -> list[Episode]:
    """Return the stops that end a migrating guest's use of its own rings."""
    switch = () if migration.switch is None else (migration.switch[0],)
    return [*switch, *(() if migration.stop is None else (migration.stop,))]


def _bases(episodes: Sequence[Episode], events: Sequence[Event], call: str) -> list[int]:
    """Return the bases that a call read or set in some episodes."""
    inside = [event for each in episodes for event in events[each.first : each.last + 1]]
    return [int(e.fields["num"]) for e in inside if e.event == call and (e.result or 0) >= 0 and "num" in e.fields]


def _boots(start: Episode, events: Sequence[Event]) -> bool:
    """Whether a start is known to be one on rings that no device has used yet; shadow rings always begin there."""
    bases = _bases([start], events, "VHOST_SET_VRING_BASE")
    return start.shadow is False and bool(bases) and not any(bases)


def _first_run_behind(session: DeviceSession, migration: Migration) -> Episode | None:
    """Return a session's first start behind the stop, if it is another device's that was open and did not run then."""
    assert migration.stop is not None
    stopped = migration.stop.t_first
    if session.device == migration.source.device or (session.t_open or 0) > stopped:
        return None
    before = [episode for episode in session.episodes if episode.t_first < stopped and episode.running < stopped]
    if before and before[-1].what is What.START:
        return None
    starts = (episode for episode in session.episodes if episode.what is What.START)
    return next((episode for episode in starts if episode.running > stopped), None)


def _cut(migration: Migration, of_device: Mapping[str, Sequence[Event]]) -> None:
    """End the stop where the destination runs, and begin the start with the first change behind the stop's begin.

    A start that changed nothing behind it was under way before: of another guest.

    What the source is asked once the destination runs keeps no guest waiting; what the destination is asked while
    it waits for the guest starts nothing.
    """
    stop, start, destination = migration.stop, migration.start, migration.destination
    if stop is None or start is None or destination is None:
        return
    there = of_device[destination.device]
    behind = (n for n in range(destination.first, start.last + 1) if there[n].t_begin >= stop.t_first)
    first = next((number for number in behind if changes(there[number])), None)
    if first is None:
        migration.start = migration.destination = None
        return
    migration.first_start = first
    migration.t_start = there[migration.first_start].t_begin
    events = of_device[migration.source.device]
    while stop.last > stop.first and events[stop.last].t_begin >= start.running:
        stop.last -= 1
    stop.t_last = max(event.t_end for event in events[stop.first : stop.last + 1])


DevicePhase = tuple[str, str]
"""A device and a phase."""
_OF_SOURCE = (*phases.DT1, *phases.DT2, phases.CANCEL_START)
_OF_DESTINATION = (phases.DEST_PREMAP, phases.DEST_STAND_BY, phases.DEST_START)


def _stamped(trace: Trace, found: Sequence[Migration], of_device: Mapping[str, Sequence[Event]]) -> Trace:
    """Return the trace with the phases of each device's last migration."""
    chosen: dict[DevicePhase, list[int]] = {}
    for migration in found:
        for phase in _OF_SOURCE:
            chosen.pop((migration.source.device, phase), None)
        if migration.destination is not None:
            for phase in _OF_DESTINATION:
                chosen.pop((migration.destination.device, phase), None)
        for place, events in _stamps(migration, of_device):
            chosen[place] = events
    phase_of = {(device, number): phase for (device, phase), numbers in chosen.items() for number in numbers}
    counts: dict[str, int] = {}
    stamped = Trace(max(trace.limit, len(trace.events)))
    for event in trace.events:
        number = counts[event.device] = counts.get(event.device, -1) + 1
        # a note has the time of what it is about, and no place among the calls
        phase = "" if event.result is None else phase_of.get((event.device, number), "")
        stamped.events.append(event if event.phase == phase else event._replace(phase=phase))
    stamped.dropped = trace.dropped
    return stamped


def _stamps(migration: Migration, of_device: Mapping[str, Sequence[Event]]) -> Iterator[tuple[DevicePhase, list[int]]]:
    """Yield the phases of a migration, each with the numbers of its calls among its device's."""
    source = migration.source.device
    if migration.switch is not None:
        stop, start = migration.switch
        yield (source, phases.DT1_STOP), list(range(stop.first, start.first))
        yield (source, phases.DT1_START), list(range(start.first, start.last + 1))
    if migration.stop is not None:
        yield (source, phases.DT2_STOP), list(range(migration.stop.first, migration.stop.last + 1))
    if migration.cancel is not None:
        start = migration.cancel[1]
        yield (source, phases.CANCEL_START), list(range(start.first, start.last + 1))
    destination, start_there = migration.destination, migration.start
    if destination is None or start_there is None or migration.stop is None:
        return
    events = of_device[destination.device]
    first = migration.first_start
    yield (destination.device, phases.DEST_START), list(range(first, start_there.last + 1))
    before = [n for n in range(destination.first, first) if events[n].t_begin < migration.stop.t_first]
    reset = max((n for n in before if resets(events[n])), default=-1)
    set_up = min((n for n in before if n > reset and _sets_up(events[n])), default=first)
    yield (destination.device, phases.DEST_STAND_BY), [n for n in before if n >= set_up]
    early = [n for n in before if n < set_up and events[n].event.startswith("IOTLB_")]
    yield (destination.device, phases.DEST_PREMAP), early


def _sets_up(event: Event) -> bool:
    """Whether a call makes a device ready for a guest; maps are a phase of their own."""
    return builds(event) and not event.event.startswith("IOTLB_")


def pieces(migration: Migration) -> gap.StopToRun | None:
    """Return the time from the last stop to the last queue that runs, in pieces; None if one of both is not known."""
    stop, start = migration.stop, migration.start
    if stop is None or start is None:
        return None
    return gap.join(
        [
            gap.Piece(phases.DT2_STOP, stop.t_first, stop.t_last),
            gap.Piece(phases.DEST_START, migration.t_start, start.t_last),
        ]
    )
