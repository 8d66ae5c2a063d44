# SPDX-License-Identifier: MIT
"""What devices do while a guest is paused: prepared before, done by C for all devices at once, reported afterwards.

Of a device's stop or start only the requests, and the rings between them,
have to wait for the pause. They are put into a job in advance. All jobs are
done in one call, without the GIL, by threads that were made before as well:
a device that takes its time keeps no other waiting.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._cdefs import ffi, lib
from ..base.closing import Closing
from ..chardev.calls import PreparedCalls


def _new_job() -> Any:
    return ffi.new("struct device_job *")


@dataclass(slots=True)
class Work:
    """A device's stop or start, to be done once.

    ``begin`` is called in front of the job, and may empty it; ``finish``
    behind it: it raises what went wrong, and can wait if nothing did.
    """

    begin: Callable[[], None]
    finish: Callable[[], None]
    job: Any = field(default_factory=_new_job)


class ConfigLook:
    """A look at a device's configuration space that C takes: whether it still is what it was."""

    def __init__(self, calls: PreparedCalls, expected: bytes) -> None:
        """``calls`` is an empty list for the device."""
        self._calls, self._expected = calls, ffi.from_buffer("uint8_t[]", expected)
        self._job = _new_job()
        place = calls.get_config(len(expected))
        calls.seal().fill(self._job)
        self._found = calls.config_of(place)

    def fill(self, answer: Any) -> None:
        """Put it into a ``struct expected_answer``."""
        answer.job, answer.found, answer.expected = self._job, self._found, self._expected
        answer.length = len(self._expected)

    def settle(self) -> None:
        """Record the request, if it was made; KernelError if it failed."""
        if self._job.begin:
            self._calls.settle(self._job)


class Crew(Closing):
    """Does the works of several devices at once, each in its own thread while there are any.

    :meth:`begin`, :meth:`do` and :meth:`finish` come in this order, once.
    """

    def __init__(self, works: Sequence[Work], beside: bool = False) -> None:
        """``beside`` if :meth:`do` will do something else meanwhile: one more thread then.

        On one CPU a thread that is woken would wait for its turn, up to a tick of the scheduler, while this one could
        make the requests: there it is done behind them, unless the threads run ahead of others (SCHED_FIFO).
        """
        self._works = list(works)
        count = len(self._works)
        self._jobs: Any = ffi.new("struct device_job[]", count)
        for number, work in enumerate(self._works):
            self._jobs[number] = work.job[0]
            # what begin() changes is what is done
            work.job = self._jobs + number
        threads = count if beside else count - 1
        self._c: Any = lib.crew_make(threads) if threads else ffi.NULL
        begins = len(os.sched_getaffinity(0)) > 1 or bool(lib.crew_is_ahead(self._c))
        self._beside = beside and begins and lib.crew_threads(self._c) > 0
        self._errors: dict[int, BaseException] = {}

    def begin(self) -> None:
        """Begin each work; what that raises is kept for :meth:`finish`."""
        lib.jobs_prepare()
        for number, work in enumerate(self._works):
            try:
                work.begin()
            except BaseException as e:
                self._errors[number] = e
                self._jobs[number] = ffi.new("struct device_job *")[0]

    def do(self, meanwhile: Callable[[], None] | None = None) -> bool:
        """Do all jobs; whether nothing went wrong, so that :meth:`finish` raises nothing.

        ``meanwhile`` is done beside them, or behind them if there is no thread for that; its error is raised once they
        are done.
        """
        count = len(self._works)
        if not self._beside or meanwhile is None:
            lib.crew_run(self._c, self._jobs, count)
            if meanwhile is not None:
                meanwhile()
        else:
            try:
                # inside: Ctrl-C may raise as soon as they have begun
                lib.crew_begin(self._c, self._jobs, count)
                meanwhile()
            finally:
                lib.crew_wait(self._c, self._jobs, count)
        return not self._errors and bool(lib.jobs_fine(self._jobs, count))

    def finish(self) -> None:
        """Finish each work; an error of one keeps no other from that. The first is raised, the others are its notes."""
        for number, work in enumerate(self._works):
            if number not in self._errors:
                try:
                    work.finish()
                except BaseException as e:
                    self._errors[number] = e
        found = [self._errors[number] for number in sorted(self._errors)]
        if found:
            for other in found[1:]:
                found[0].add_note(f"also: {other}")
            raise found[0]

    def close(self) -> None:
        """End the threads. Idempotent."""
        crew, self._c = self._c, ffi.NULL
        lib.crew_end(crew)
