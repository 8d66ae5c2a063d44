# SPDX-License-Identifier: MIT
"""Handshakes with many peers at once, so that none of them can keep a source waiting.

Each connection has a thread and one deadline for its whole handshake: TLS,
preamble, SHAPE. Memory is allocated, and a device opened, only for a peer
that got that far and is chosen by the caller, one after the other.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from ..base.closing import Closing
from ..base.errors import MigrationCancelled, MigrationRefused, VhostVdpaError
from ..guest.shape import GuestShape
from .cancel import Cancel
from .endpoint import Listener, Looked, NoPeer
from .stream import STALL_SECONDS, Channel, Frame

ENTRY_SECONDS = 20.0
"""How long a whole handshake may take, from the connection to the last byte of SHAPE."""
MAX_HANDSHAKES = 64
"""At once; one more ends the oldest. A handshake of a source takes milliseconds."""
MAX_WAITING = 8
"""Sources that are past their handshake; one more is refused."""
_MAX_REFUSALS = 256
_AGAIN_SECONDS = 0.1

ReceiveShape = Callable[[Channel], GuestShape]


def _turned_away(channel: Channel, why: str) -> NoPeer:
    """Send a peer the reason of its refusal, and return that as an error."""
    channel.stall = _AGAIN_SECONDS
    with suppress(VhostVdpaError):
        channel.send_text(Frame.REFUSE, why)
        channel.finish(_AGAIN_SECONDS)
    return NoPeer(why)


class Reception(Closing):
    """Accepts connections to ``listener`` and returns the peers that have sent their shape, in :meth:`next`.

    ``receive_shape`` reads SHAPE and raises a :class:`~pyvhostvdpa.MigrationRefused` that it has sent the peer.
    """

    def __init__(self, listener: Listener, receive_shape: ReceiveShape, stall: float = STALL_SECONDS) -> None:
        self._listener, self._receive_shape, self._stall = listener, receive_shape, stall
        self._queue: queue.SimpleQueue[tuple[Channel, GuestShape] | MigrationRefused] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._handshakes: dict[threading.Thread, Cancel] = {}
        """In the order in which they began."""
        self._stop = Cancel()
        self._thread = threading.Thread(target=self._accept, name="accept")
        self._thread.start()

    def next(self) -> tuple[Channel, GuestShape]:
        """Return the next source and what its guest needs; the channel is the caller's.

        Raises what a peer was refused for: :class:`~pyvhostvdpa.MigrationRefused`; call it again for the next.
        """
        found = self._queue.get()
        if isinstance(found, MigrationRefused):
            raise found
        with self._lock:
            self._waiting -= 1
        return found

    # -- the thread that accepts -----------------------------------------------------

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._listener.fileno(), select.POLLIN)
        poll.register(self._stop.fileno(), select.POLLIN)
        while True:
            poll.poll()
            if self._stop.wanted:
                return
            try:
                sock = self._listener.accept_socket()
            except BlockingIOError:
                continue
            except OSError as e:
                self._refuse(NoPeer(f"a connection could not be accepted: {os.strerror(e.errno or 0)}"))
                # descriptors may be short: those of the oldest handshake come back
                self._end_oldest(at_least=1)
                self._stop.wait(_AGAIN_SECONDS)
                continue
            self._begin(sock)

    def _begin(self, sock: socket.socket) -> None:
        self._end_oldest(at_least=MAX_HANDSHAKES)
        with ExitStack() as unless_begun:
            unless_begun.callback(sock.close)
            try:
                cancel = unless_begun.enter_context(Cancel())
                self._start(sock, cancel)
            except (OSError, RuntimeError) as e:
                self._refuse(NoPeer(f"a handshake could not begin: {e}"))
            else:
                unless_begun.pop_all()

    def _start(self, sock: socket.socket, cancel: Cancel) -> None:
        thread = threading.Thread(target=self._handshake, args=(sock, cancel), name="handshake")
        with self._lock:
            self._handshakes[thread] = cancel
            try:
                thread.start()
            except RuntimeError:
                del self._handshakes[thread]
                raise

    def _end_oldest(self, at_least: int) -> None:
        """End the oldest handshake if there are so many; its thread closes what it has."""
        with self._lock:
            if len(self._handshakes) >= at_least:
                for cancel in self._handshakes.values():
                    if not cancel.wanted:
                        cancel.set()
                        return

    # -- a thread per handshake --------------------------------------------------------

    def _handshake(self, sock: socket.socket, cancel: Cancel) -> None:
        try:
            self._admit(sock, cancel)
        except MigrationCancelled:
            self._refuse(NoPeer(f"a handshake was ended for another of more than {MAX_HANDSHAKES} at once"))
        except Looked:
            # a source does so before it starts its guest: not worth a report
            pass
        except MigrationRefused as e:
            self._refuse(e)
        except (VhostVdpaError, OSError, MemoryError) as e:
            self._refuse(NoPeer(f"a handshake failed: {e}"))
        finally:
            with self._lock:
                del self._handshakes[threading.current_thread()]
                cancel.close()

    def _admit(self, sock: socket.socket, cancel: Cancel) -> None:
        deadline = time.monotonic() + ENTRY_SECONDS
        channel = self._listener.admit(sock, cancel.fileno(), self._stall, deadline)
        with ExitStack() as unless_admitted:
            unless_admitted.enter_context(channel)
            shape = self._receive_shape(channel)
            with self._lock:
                full = self._waiting >= MAX_WAITING
                self._waiting += not full
            if full:
                raise _turned_away(channel, f"{MAX_WAITING} other sources are waiting here already")
            channel.cancel, channel.deadline = -1, None
            unless_admitted.pop_all()
        self._queue.put((channel, shape))

    def _refuse(self, error: MigrationRefused) -> None:
        # a flood of strangers is not remembered one by one
        if self._queue.qsize() < _MAX_REFUSALS:
            self._queue.put(error)

    # -- the end -----------------------------------------------------------------------

    def stop(self) -> None:
        """Accept no more, and end the handshakes that are under way. Idempotent."""
        with self._lock:
            self._stop.set()
            for cancel in self._handshakes.values():
                cancel.set()

    def close(self) -> None:
        """Stop, wait until all threads have ended, and close the sources that were not chosen. Idempotent."""
        if self._stop.fileno() < 0:
            return
        self.stop()
        self._thread.join()
        with self._lock:
            threads = list(self._handshakes)
        for thread in threads:
            thread.join()
        with suppress(queue.Empty):
            while True:
                found = self._queue.get_nowait()
                if not isinstance(found, MigrationRefused):
                    channel, _ = found
                    with channel:
                        _turned_away(channel, "this destination has received another guest")
        self._stop.close()
