"""Several jobs at the same time on one terminal: the first one's output is live, the others' is shown at their end."""

import threading
from collections.abc import Callable, Sequence

from labkit.output import Sink

Job = Callable[[Sink | None], None]
"""Does its work; what it prints goes to the sink, or live to standard output without one."""


class Held:
    """A sink that keeps what it gets until it is shown."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def __call__(self, data: bytes) -> None:
        """Take some output."""
        self._kept += data

    def show(self, sink: Sink) -> None:
        """Hand on all of it."""
        if self._kept:
            sink(bytes(self._kept))
            self._kept.clear()


def beside(jobs: Sequence[Job], out: Sink) -> None:
    """Do all jobs, a thread each beyond the first; return when all have ended.

    An error of one ends no other. The first error is raised, in order of the jobs.
    """
    errors: dict[int, BaseException] = {}
    held = [Held() for _ in jobs[1:]]

    def do(number: int, sink: Sink | None) -> None:
        try:
            jobs[number](sink)
        except BaseException as error:
            errors[number] = error

    # what hangs in one must not keep the process when the user has had enough
    threads = [
        threading.Thread(target=do, args=(number, sink), name=f"job-{number}", daemon=True)
        for number, sink in enumerate(held, 1)
    ]
    for thread in threads:
        thread.start()
    do(0, None)
    for thread, kept in zip(threads, held, strict=True):
        # Ctrl-C, or a signal that ends the program (SystemExit)
        if isinstance(errors.get(0), Exception | None):
            thread.join()
        kept.show(out)
    for number in sorted(errors):
        raise errors[number]
