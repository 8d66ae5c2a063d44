# SPDX-License-Identifier: MIT
"""Another program's output, within a time limit; :mod:`subprocess` would take longer to load than most of them run."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_CHUNK = 1 << 16
_SIGKILL, _SIGPIPE = 9, 13
"""Of every architecture (include/uapi/asm-generic/signal.h). To load :mod:`signal` takes as long as a program."""


def outcome(argv: Sequence[str], timeout: float) -> tuple[int, str, str]:
    """Run a program; its exit status, and what it wrote to standard output and standard error.

    Raises FileNotFoundError without such a program, and TimeoutError after
    ``timeout`` seconds: the program is killed then, and a thread waits for its end, since in a lock of
    the kernel not even a kill ends it.
    """
    reads: list[int] = []
    writes: list[int] = []
    try:
        for _ in range(2):
            read, write = os.pipe()
            reads.append(read)
            writes.append(write)
        pid = os.posix_spawnp(
            argv[0],
            list(argv),
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, write, fd) for fd, write in enumerate(writes, 1)],
            setsigdef=[_SIGPIPE],
        )
        try:
            _close(writes)
            texts = _read(reads, time.monotonic() + timeout)
        except BaseException:
            os.kill(pid, _SIGKILL)
            _bury(pid)
            raise
        _, status = os.waitpid(pid, 0)
    finally:
        _close(writes)
        _close(reads)
    said, complained = (text.decode(errors="replace") for text in texts)
    return os.waitstatus_to_exitcode(status), said, complained


def _close(fds: list[int]) -> None:
    """Close descriptors. Each is forgotten before: if Ctrl-C comes in between, it must not be closed twice."""
    while fds:
        os.close(fds.pop())


def _bury(pid: int) -> None:
    """Leave no zombie of a child that was killed, whenever it ends."""
    import contextlib  # noqa: PLC0415
    import threading  # noqa: PLC0415

    with contextlib.suppress(RuntimeError):
        # none can be had: the zombie goes with this process
        threading.Thread(target=os.waitpid, args=(pid, 0), name=f"end of {pid}", daemon=True).start()


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
