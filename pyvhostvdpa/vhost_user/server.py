# SPDX-License-Identifier: MIT
"""One device on one socket: waits for a front-end, serves it until it leaves, waits for the next.

One poll loop does everything of a device: nothing in it waits longer than a front-end's deadline, and nothing of it
runs while traffic flows. Several devices have a thread each, so a front-end can hold up its own device only.
"""

from __future__ import annotations

import json
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..base.closing import Closing
from ..base.errors import VhostVdpaError
from ..migration.endpoint import Address, Listener, Tls
from .backend import Backend
from .channel import DEADLINE, FrontEndGone, MessageChannel
from .coming import ComingGuest
from .discard import discarding_devices
from .doors import BACKLOG, Door, path_of
from .filters import FilterFollower, RxFilter
from .messages import MessageRefused, ProtocolError
from .peer import Hearing, Telling, describe, find_files
from .session import FrontEndSession
from .status import of_backend, of_session
from .urgency import Urgency

SCHEMA = "pyvhostvdpa/serve/1"
RETRY = 1.0
"""Seconds between attempts to connect to a front-end that listens."""
TICK = 0.5
"""Seconds between looks at what nothing notifies of: a device in shadow mode, a log without exact marks, holes in
guest memory where the kernel does not report them. Also the least time between two looks at what it reports."""
STATUS_SUFFIX = ".status"


@dataclass(frozen=True, slots=True)
class Peering:
    """The other server of a migration: where it listens (``to``), and where this one does (``listener``)."""

    to: Address | None = None
    tls: Tls | None = None
    listener: Listener | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """Whom a server serves: ``uids`` beside root and its own; ``allow_discard`` whatever discards memory."""

    uids: frozenset[int] = frozenset()
    allow_discard: bool = False


@dataclass(frozen=True, slots=True)
class Filters:
    """Where QEMU's monitor is that knows what the guest wants to receive ("" for nowhere), and which NIC it is."""

    monitor: str = ""
    nic: str = ""


class Refused(VhostVdpaError):
    """A front-end that is not served."""


class _Question:
    """What another thread asks of the loop."""

    def __init__(self, act: Callable[[], str]) -> None:
        self._act = act
        self._answered = threading.Event()
        self._words = ""
        self._error: Exception | None = None

    def answer(self) -> None:
        """Carry it out, in the loop."""
        try:
            self._words = self._act()
        except (VhostVdpaError, ValueError, OSError) as e:
            self._error = e
        self._answered.set()

    def wait(self, ended: Callable[[], bool]) -> str:
        """Return the words, or raise what went wrong."""
        while not self._answered.wait(TICK):
            if ended():
                raise MessageRefused("the server ends")
        if self._error is not None:
            raise self._error
        return self._words


class Server(Closing):
    """Serves one device. ``status`` is a socket that listens for requests of the status, or None."""

    def __init__(
        self,
        backend: Backend,
        door: Door,
        policy: Policy,
        status: socket.socket | None = None,
        peering: Peering | None = None,
        filters: Filters | None = None,
    ) -> None:
        self.backend = backend
        self._peering = peering or Peering()
        self._filters = filters or Filters()
        self._follower: FilterFollower | None = None
        self._hearing = Hearing(self._peering.listener, self._asked) if self._peering.listener is not None else None
        self._telling: Telling | None = None
        self._told: list[Telling] = []
        """Those that were stopped and may not have ended yet."""
        self._questions: queue.SimpleQueue[_Question] = queue.SimpleQueue()
        self._door = door
        self._policy = policy
        self._status = status
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._session: FrontEndSession | None = None
        self._urgency = Urgency()
        backend.mapped.before_mapping = self._urgency.close
        self._failed = ""
        self._turned_away: list[tuple[float, MessageChannel]] = []
        self._refused_for = ""
        self._next_tick = 0.0
        self._rest_until = 0.0
        """Until when notices of the kernel are not waited for."""
        self._waiting: tuple[object, ...] = ()
        """What :attr:`_waited` was made of: it holds as long as this is the same."""
        self._waited: Mapping[int, Callable[[], None]] = {}
        self._poll = select.poll()
        self.sessions = 0
        self.turned_away = 0
        """Front-ends that were not served."""
        self._paths = {
            path: os.lstat(path)
            for each in (None if door.keep_path else door.listening, status)
            if each is not None and (path := path_of(each))
        }
        """What to remove from the file system at the end."""

    # -- the loop ------------------------------------------------------------------------

    def run(self) -> None:
        """Serve front-ends until :meth:`stop`, or until the only one there can be has left."""
        if self._filters.monitor:
            self._follower = FilterFollower(
                self._filters.monitor, self._filters.nic, self._filter_changed, self._peer_said
            )
        try:
            if self._door.connected is not None:
                self._begin(self._door.connected)
            while not self._stopping and not (self._door.connected is not None and self._session is None):
                self._look()
        finally:
            self._end("the back-end ends")
            self._close_turned_away(all_of_them=True)
            self._stopping = True
            for telling in self._told:
                telling.join()
            if self._follower is not None:
                self._follower.stop()

    def stop(self) -> None:
        """End :meth:`run`, from any thread or a signal handler."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def _look(self) -> None:
        self._urgency.count()
        # one time for both: what is not waited for now has to end the wait
        now = time.monotonic()
        waited = self._waited_for(now)
        ready = self._poll.poll(self._timeout(now))
        if len(ready) == 1:
            waited[ready[0][0]]()
        else:
            found = {fd for fd, _ in ready}
            for fd, act in waited.items():
                if fd in found:
                    act()
        self._tick()

    def _waited_for(self, now: float) -> Mapping[int, Callable[[], None]]:
        """Return what is to be done for each descriptor that is waited for; :attr:`_poll` has the same.

        Between two messages that is the same in general, and a guest that moves waits for some thirty of them.
        """
        session = self._session
        notices: tuple[int, ...] = ()
        # without a session nobody would look at what they report, and they would wake the loop again and again
        if session is not None and (not self._rest_until or now >= self._rest_until):
            notices = self.backend.notices
        waiting = session, notices
        if waiting == self._waiting:
            return self._waited
        waited: dict[int, Callable[[], None]] = {self._wake: self._woken}
        # the session before the next front-end: one that has left is seen to have left
        if session is not None:
            waited[session.channel.fileno()] = self._message
        if self._door.listening is not None:
            waited[self._door.listening.fileno()] = self._accept
        if self._status is not None:
            waited[self._status.fileno()] = self._tell_status
        if self._hearing is not None:
            waited[self._hearing.fileno()] = self._hearing.accept
        waited.update(dict.fromkeys(notices, self._noticed))
        self._poll = select.poll()
        for fd in waited:
            self._poll.register(fd, select.POLLIN)
        self._waiting, self._waited = waiting, waited
        return waited

    def _timeout(self, now: float) -> int | None:
        if self._session is None and self._door.connect_to:
            return int(RETRY * 1000)
        ticks = self._session is not None and self.backend.needs_ticks
        if ticks or self._turned_away or self._told or now < self._rest_until:
            return max(0, int((self._next_tick - now) * 1000)) + 1
        return None

    def _noticed(self) -> None:
        """The tick looks at it."""
        self._next_tick = 0.0
        self._rest()

    def _rest(self) -> None:
        """Do not look soon again: a balloon discards page by page."""
        self._rest_until = time.monotonic() + TICK

    def _tick(self) -> None:
        if self._turned_away:
            self._close_turned_away()
        if self._told:
            self._forget_told()
        now = time.monotonic()
        due = now >= self._next_tick
        if due:
            self._next_tick = now + TICK
        if self._session is None:
            if self._door.connect_to and not self._stopping:
                self._connect()
            return
        # not with each message: a guest that moves waits for some thirty of them
        if due:
            discarded = self.backend.mapped.discarded
            self.backend.tick()
            if self.backend.mapped.discarded != discarded:
                self._rest()
        if self.backend.failed and not self._failed:
            self._session.raise_error()
        self._failed = self.backend.failed

    def _woken(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with suppress(queue.Empty):
            while True:
                self._questions.get_nowait().answer()

    # -- the other server ----------------------------------------------------------------

    def _asked(self, guest: ComingGuest) -> str:
        """In a thread of the peer: have the loop prepare the device, and wait for it."""
        return self._ask(lambda: self._prepare(guest))

    def _ask(self, act: Callable[[], str]) -> str:
        """In another thread: have the loop do something, and wait for it."""
        question = _Question(act)
        self._questions.put(question)
        os.eventfd_write(self._wake, 1)
        return question.wait(lambda: self._stopping)

    def _prepare(self, guest: ComingGuest) -> str:
        if self._session is None:
            raise MessageRefused("no front-end is connected yet")
        files = find_files(self._session.channel.peer.pid, guest.files)
        try:
            return self.backend.prepare(guest, files)
        finally:
            for fd in files:
                os.close(fd)
            self._hurry()

    def _tell_peer(self) -> None:
        """When a migration begins, announce the guest to the destination; stop when it is over."""
        migrating = self.backend.dirty_log.wanted and self.backend.running
        if not migrating or self._peering.to is None:
            if not self.backend.dirty_log.wanted and (self._telling is not None or self._told):
                self._stop_telling()
            return
        if self._telling is None:
            backend = self.backend
            message = describe(
                backend.acknowledged,
                backend.pairs,
                backend.memory.regions,
                backend.memory.files,
                backend.queues,
                backend.control_model,
            )
            self._telling = Telling(self._peering.to, self._peering.tls, message, self._peer_said)

    def _hurry(self) -> None:
        """Go first while a guest leaves, from the log start on, or comes, from what is known of it to its start."""
        backend = self.backend
        leaves = backend.dirty_log.wanted
        comes = not backend.running and (backend.awaits_guest or self._urgency.urgent)
        self._urgency.look(leaves or comes)

    def _filter_changed(self, wanted: RxFilter) -> None:
        def act() -> str:
            self.backend.set_filter(wanted)
            return ""

        self._ask(act)

    def _peer_said(self, event: str, words: str) -> None:
        self.backend.report(event, {"said": words})

    def _stop_telling(self) -> None:
        """The front-end is not kept waiting for what may be connecting to another host."""
        telling, self._telling = self._telling, None
        if telling is not None:
            telling.stop()
            self._told.append(telling)
        self._forget_told()

    def _forget_told(self) -> None:
        """Release those that have ended."""
        self._told = [each for each in self._told if not each.join(0)]

    # -- front-ends ----------------------------------------------------------------------

    def _connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # a front-end that listens and does not accept is tried again, not waited for
        connection.setblocking(False)
        try:
            connection.connect(self._door.connect_to)
        except OSError:
            # no process listens there yet
            connection.close()
            return
        self._begin(connection)

    def _accept(self) -> None:
        assert self._door.listening is not None
        try:
            connection, _ = self._door.listening.accept()
        except OSError:
            # it left again before it was accepted
            return
        if self._session is not None:
            self._turn_away(MessageChannel(connection, DEADLINE), "the device has a front-end already")
            return
        self._begin(connection)

    def _turn_away(self, channel: MessageChannel, why: str, hint: str = "") -> None:
        """Close a connection, but not at once: QEMU connects again without a pause. The reason is reported once."""
        self.turned_away += 1
        self._turned_away.append((time.monotonic() + RETRY, channel))
        if len(self._turned_away) > BACKLOG:
            # descriptors are for those that are served
            self._turned_away.pop(0)[1].close()
        if why != self._refused_for:
            self._refused_for = why
            self.backend.report("refused-front-end", {"why": why, "hint": hint})

    def _close_turned_away(self, all_of_them: bool = False) -> None:
        waiting, self._turned_away = self._turned_away, []
        for until, channel in waiting:
            if all_of_them or time.monotonic() >= until:
                channel.close()
            else:
                self._turned_away.append((until, channel))

    def _begin(self, connection: socket.socket) -> None:
        channel = MessageChannel(connection, DEADLINE)
        try:
            self._check_peer(channel)
            self._session = FrontEndSession(self.backend, channel)
        except (VhostVdpaError, ValueError) as e:
            self._turn_away(channel, str(e), e.hint if isinstance(e, VhostVdpaError) else "")
            return
        self.sessions += 1
        self._refused_for = ""
        self.backend.report("connected", {"pid": channel.peer.pid, "uid": channel.peer.uid})

    def _check_peer(self, channel: MessageChannel) -> None:
        peer = channel.peer
        if peer.uid not in {0, os.geteuid(), *self._policy.uids}:
            raise Refused(f"process {peer.pid} runs as uid {peer.uid}", hint="vhost-vdpa serve DEV --user NAME")
        if self._policy.allow_discard or not self.backend.mapped.pins:
            return
        found = discarding_devices(peer.pid)
        if found:
            raise Refused(
                f"process {peer.pid} has {', '.join(found)}: what it discards the device would still use",
                hint="leave the device out (libvirt: <memballoon model='none'/>), or vhost-vdpa serve --allow-discard",
            )
        if found is None:
            why = f"the command line of process {peer.pid} cannot be read; its memory is watched"
            self.backend.report("discard-unknown", {"why": why})

    def _message(self) -> None:
        session = self._session
        assert session is not None
        try:
            session.serve_one()
        except (FrontEndGone, ProtocolError) as e:
            self._end(str(e))
            return
        self._tell_peer()
        self._hurry()

    def _end(self, why: str) -> None:
        session, self._session = self._session, None
        self._stop_telling()
        self._urgency.close()
        if session is None:
            return
        session.close()
        self.backend.report("disconnected", {"why": why})

    # -- status --------------------------------------------------------------------------

    def _tell_status(self) -> None:
        assert self._status is not None
        try:
            connection, _ = self._status.accept()
        except OSError:
            return
        with connection, suppress(OSError):
            connection.setblocking(False)
            connection.send(json.dumps(self.to_dict()).encode() + b"\n", socket.MSG_NOSIGNAL)

    def to_dict(self) -> dict[str, Any]:
        """Return how it goes, for JSON."""
        session = self._session
        return {
            "schema": SCHEMA,
            "pid": os.getpid(),
            "sessions": self.sessions,
            "front_end": None if session is None else of_session(session),
            **of_backend(self.backend),
        }

    def close(self) -> None:
        """Close the sockets; :meth:`run` must have ended."""
        # paths first: behind a socket that is closed another server may have put its own
        for path, made in self._paths.items():
            with suppress(OSError):
                if os.path.samestat(os.lstat(path), made):
                    os.unlink(path)
        for each in (self._door.listening, self._status):
            if each is not None:
                each.close()
        if self._hearing is not None:
            self._stopping = True
            self._hearing.close()
        os.close(self._wake)
