"""A network between two processes that can be cut, stopped and slowed down while a stream goes over it."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

_PIECE = 64 << 10


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


class Wire:
    """``left`` and ``right`` are the ends, TCP sockets; what goes in at one comes out at the other."""

    def __init__(self) -> None:
        self.left, near = _tcp_pair()
        self.right, far = _tcp_pair()
        self._inner = (near, far)
        self._stopped = threading.Event()
        self._slow = threading.Event()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._carry, args=ends) for ends in ((near, far), (far, near))]
        for thread in self._threads:
            thread.start()

    def _carry(self, come: socket.socket, go: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not self._ended.is_set():
                if self._stopped.is_set():
                    time.sleep(0.005)
                    continue
                if not select.select([come], [], [], 0.02)[0]:
                    continue
                slow = self._slow.is_set()
                data = come.recv(200 if slow else _PIECE)
                if not data:
                    break
                if slow:
                    time.sleep(0.002)
                go.sendall(data)
        # an end that has closed is closed on the other side as well
        with contextlib.suppress(OSError):
            go.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Reset the stream at both ends, as a firewall does."""
        for end in self._inner:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut_one_way(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._inner[number].shutdown(socket.SHUT_WR)

    def stop(self) -> None:
        self._stopped.set()

    def go_on(self) -> None:
        self._stopped.clear()
        self._slow.clear()

    def trickle(self) -> None:
        self._slow.set()

    def close(self) -> None:
        self._ended.set()
        self._stopped.clear()
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in (self.left, self.right, *self._inner):
            end.close()
