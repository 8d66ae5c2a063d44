# SPDX-License-Identifier: MIT
"""Another program's output, within a time limit; :mod:`subprocess` would take longer to load than most of them run."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNK = 1 << 16


def outcome(argv: Sequence[str], timeout: float) -> tuple[int, str, str]:
    """Run a program; its exit status, and what it wrote to standard output and standard error.

    Raises FileNotFoundError without such a program, and TimeoutError after
    ``timeout`` seconds: the program is killed then, and not waited for, since
    in a lock of the kernel not even a kill ends it.
    """
    import signal  # noqa: PLC0415

    pipes = []
    try:
        pipes = [os.pipe()]
        pipes.append(os.pipe())
        pid = os.posix_spawnp(
            argv[0],
            list(argv),
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, write, fd) for fd, (_, write) in enumerate(pipes, 1)],
            setsigdef=[signal.SIGPIPE],
        )
        for _, write in pipes:
            os.close(write)
        pipes = [(read, -1) for read, _ in pipes]
        try:
            texts = _read([read for read, _ in pipes], time.monotonic() + timeout)
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        _, status = os.waitpid(pid, 0)
    finally:
        for fd in (fd for pair in pipes for fd in pair if fd >= 0):
            os.close(fd)
    said, complained = (text.decode(errors="replace") for text in texts)
    return os.waitstatus_to_exitcode(status), said, complained


def _read(fds: Sequence[int], deadline: float) -> list[bytes]:
    """Read descriptors to their ends."""
    import select  # noqa: PLC0415

    texts = dict.fromkeys(fds, b"")
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    left = len(fds)
    while left:
        wait = deadline - time.monotonic()
        if wait <= 0:
            raise TimeoutError
        for fd, _ in poll.poll(wait * 1000):
            chunk = os.read(fd, _CHUNK)
            texts[fd] += chunk
            if not chunk:
                poll.unregister(fd)
                left -= 1
    return [texts[fd] for fd in fds]
