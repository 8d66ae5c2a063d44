# SPDX-License-Identifier: MIT
"""What happens to devices, as lines for people, while it happens: one line per phase of a device's life."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..base.uapi import ALL_BACKEND_FEATURES, BackendFeature, names
from .recorder import Event
from .sessions import IDLE_NS, Episode, Follower, What
from .watch import CALLER

_CHANGES = {"IOTLB_UPDATE": "mapped", "IOTLB_INVALIDATE": "unmapped"}
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def amount(size: int) -> str:
    """Return bytes for people."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:,.4g} {name}"
    return f"{size} bytes"


def duration(ns: int | float) -> str:
    """Return a length of time for people."""
    return f"{ns / 1e9:,.3f} s" if ns >= 1e9 else f"{ns / 1e6:,.3f} ms"


def short(device: str) -> str:
    """Return a device's name without its folder."""
    return device.replace("/dev/", "")


@dataclass(slots=True)
class _Messages:
    """Messages of one kind since the last line."""

    count: int = 0
    size: int = 0
    ns: int = 0
    failed: int = 0

    def add(self, event: Event) -> None:
        """Count one."""
        self.count += 1
        self.ns += event.t_end - event.t_begin
        if (event.result or 0) < 0:
            self.failed += 1
        else:
            self.size += int(event.fields["size"])

    def words(self, verb: str) -> str:
        """Return the line."""
        failed = f", {self.failed} refused" if self.failed else ""
        messages = "1 message" if self.count == 1 else f"{self.count:,} messages"
        return f"{verb} {amount(self.size)} in {messages}{failed}: {duration(self.ns)}"


class _Device:
    def __init__(self, name: str) -> None:
        self.name = name
        self.messages: dict[str, _Messages] = {}
        self.due: Episode | None = None
        """What is under way; its line is printed when it is over."""
        self.stopped: Episode | None = None
        self.switched = False
        self.t_last = 0

    def feed(self, event: Event, follower: Follower, episode: Episode | None) -> Iterator[str]:
        """Yield the lines that an event gives occasion to, once it was followed."""
        if event.event == CALLER:
            yield f"calls by pid {event.fields['pid']} from now on, which did not open it"
        if event.result is None:
            return
        if event.t_begin - self.t_last > IDLE_NS:
            yield from self.flush()
        self.t_last = event.t_end
        if event.event == "close":
            yield from self.flush()
        over = self.due is not None and self.due.what is What.STOP and not follower.stopping
        if self.due is not None and (over or (episode is not None and episode is not self.due)):
            yield from self.flush()
        if event.event in _CHANGES:
            self.messages.setdefault(_CHANGES[event.event], _Messages()).add(event)
        elif event.event == "IOTLB_BATCH_END" and self.messages:
            # where a batch takes its time
            list(self.messages.values())[-1].ns += event.t_end - event.t_begin
        yield from self._at_once(event, follower)
        if episode is not None and not episode.closed:
            self.due = episode

    def _at_once(self, event: Event, follower: Follower) -> Iterator[str]:
        if event.event == "open":
            yield _opened(event)
        elif event.event == "close":
            yield "closed"
        elif (event.result or 0) >= 0 and event.event in ("VHOST_SET_FEATURES", "VHOST_SET_BACKEND_FEATURES"):
            yield _features(follower, event)
        elif event.event == "VHOST_VDPA_SUSPEND":
            yield f"suspended: {duration(event.t_end - event.t_begin)}"

    def flush(self) -> Iterator[str]:
        """Yield what is due."""
        for verb, messages in self.messages.items():
            yield messages.words(verb)
        self.messages.clear()
        if self.due is not None:
            yield from self._told(self.due)
            self.due = None

    def _told(self, episode: Episode) -> Iterator[str]:
        if episode.what is What.STOP:
            self.stopped = episode
            yield f"stopped: {duration(episode.t_last - episode.t_first)}"
            return
        queues = "1 queue" if len(episode.queues) == 1 else f"{len(episode.queues)} queues"
        yield f"started {_HOW[episode.shadow]}, {queues}: {duration(episode.t_last - episode.t_first)}"
        stopped = self.stopped
        if stopped is not None:
            took = duration(episode.t_last - stopped.t_first)
            if episode.shadow and stopped.shadow is False:
                self.switched = True
                yield f"switched to shadow rings, DT1: {took}"
            elif self.switched and stopped.shadow and episode.shadow is False:
                yield f"back in passthrough: {took}"


class Narrator:
    """Events in, lines out. A line about something that takes a while comes when it is over."""

    def __init__(self) -> None:
        self._devices: dict[str, _Device] = {}

    def lines(self, event: Event, follower: Follower, episode: Episode | None) -> Iterator[tuple[int, str]]:
        """Yield the time in ns, and the words, of what an event shows, once it was followed."""
        device = self._devices.get(event.device)
        if device is None:
            device = self._devices[event.device] = _Device(event.device)
        for words in device.feed(event, follower, episode):
            yield event.t_begin, f"{short(event.device)}: {words}"

    def idle(self, now: int | None = None, busy: Collection[str] = ()) -> Iterator[tuple[int, str]]:
        """Yield what is due of devices that had no call for a while; of all, without a time.

        A ``busy`` device has a call under way, which may take seconds: what that belongs to is not over yet.
        """
        for name, device in self._devices.items():
            if now is None or (now - device.t_last > IDLE_NS and name not in busy):
                for words in device.flush():
                    yield device.t_last, f"{short(name)}: {words}"


_HOW = {True: "with shadow rings", False: "in passthrough", None: "(with whose rings is not known)"}


def _opened(event: Event) -> str:
    by = f"{event.fields.get('comm', '')} (pid {event.fields.get('pid', '?')})".strip()
    return (
        f"opened by {by}" if (event.result or 0) >= 0 else f"could not be opened by {by}: error {-(event.result or 0)}"
    )


def _features(follower: Follower, event: Event) -> str:
    session = follower.session
    if event.event == "VHOST_SET_FEATURES":
        taken, offered = int(event.fields["features"]), session.offered
        left = "" if offered is None else f", {(offered & ~taken).bit_count()} more are offered"
        return f"features {taken:#x}: {taken.bit_count()} bits{left}"
    taken, offered = int(event.fields["backend_features"]), session.backend_offered
    rest = BackendFeature(0) if offered is None else BackendFeature(offered & ~taken) & ALL_BACKEND_FEATURES
    left = f"; offered and not taken: {names(rest)}" if rest else ""
    return f"backend features {names(BackendFeature(taken))}{left}"
