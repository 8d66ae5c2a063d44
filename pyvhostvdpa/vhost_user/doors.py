# SPDX-License-Identifier: MIT
"""Where front-ends come from."""

from __future__ import annotations

import os
import pwd
import socket
import stat
from dataclasses import dataclass

from ..base.errors import VhostVdpaError

BACKLOG = 8
"""Front-ends that may wait for an answer."""


@dataclass(frozen=True, slots=True)
class Door:
    """Where front-ends come from: a socket that listens, one that is connected, or a path to connect to.

    ``keep_path`` leaves the path of the socket that listens in the file system: another process made it.
    """

    listening: socket.socket | None = None
    keep_path: bool = False
    connected: socket.socket | None = None
    connect_to: str = ""


def listen(path: str, user: str | None = None) -> socket.socket:
    """Return a socket that listens at ``path``, for its owner alone (0600); ``user`` owns it if given.

    A socket without a listener is replaced. VhostVdpaError if it has one, if something else than a
    socket is there, or if it cannot be made.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _clear(path)
        # between bind and chmod no other user may connect
        before = os.umask(0o177)
        try:
            listening.bind(path)
        finally:
            os.umask(before)
        if user is not None:
            os.chown(path, pwd.getpwnam(user).pw_uid, -1)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except (OSError, KeyError) as e:
        listening.close()
        why = e.strerror if isinstance(e, OSError) else f"there is no user {user}"
        raise VhostVdpaError(f"cannot listen at {path}: {why}", hint="vhost-vdpa serve DEV --socket-path PATH") from e
    return listening


def _clear(path: str) -> None:
    try:
        # connect(2) answers ECONNREFUSED for any file that is not a socket
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise VhostVdpaError(f"{path} is there already and is not a socket", hint=f"ls -l {path}")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # one that listens and does not accept would keep a blocking connect waiting
        probe.setblocking(False)
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise VhostVdpaError(f"another process listens at {path}", hint=f"vhost-vdpa serve --status {path}")


def path_of(listening: socket.socket) -> str:
    """Return where a socket is in the file system, "" if it is nowhere."""
    path = listening.getsockname()
    return path if isinstance(path, str) and os.path.exists(path) else ""
