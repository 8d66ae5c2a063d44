# SPDX-License-Identifier: MIT
"""Requests that are known before they are needed: prepared in advance, then made by C in one go.

While a guest is paused, each line of Python between two requests counts.
So what a switch, a stop or a start will ask of the device is put into a list
while the guest runs. :meth:`PreparedCalls.run` makes the requests in order,
without the GIL, each with its own times for the trace; it is the same door
and the same record as :class:`~pyvhostvdpa.VhostVdpa`'s methods.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, Protocol

from .._cdefs import ffi, lib
from ..base.errors import KernelError
from ..base.uapi import IOCTLS, Status, VdpaConfig, VringAddr, VringFile
from ..trace.recorder import DeviceTrace, describe


class Opened(Protocol):
    """What a list needs of an opened device."""

    trace: DeviceTrace

    def fileno(self) -> int:
        """Return the descriptor that the requests are made on; raises once it is closed."""


class PreparedCalls:
    """A list of requests to one device, in order; it can be run any number of times.

    :meth:`VhostVdpa.prepare <pyvhostvdpa.VhostVdpa.prepare>` makes one.

    The methods that add a request are named as those of
    :class:`~pyvhostvdpa.VhostVdpa`. Those of a queue's state return the
    request's place in the list, for :meth:`put` and :meth:`got`.
    """

    def __init__(self, chardev: Opened) -> None:
        self._chardev = chardev
        self._names: list[str] = []
        self._fields: list[dict[str, int | str]] = []
        self._arguments: list[Any] = []
        self._states: list[Any] = []
        """Of each request: its struct vhost_vring_state as two numbers, None if it has another argument."""
        self._c: Any = ffi.NULL
        self.done = 0
        """How many requests of the last run were made without an error."""

    def __len__(self) -> int:
        return len(self._names)

    # -- making the list ---------------------------------------------------------

    def _add(self, name: str, argument: Any, fields: dict[str, int | str], state: Any = None) -> int:
        self._names.append(name)
        self._fields.append(fields)
        self._arguments.append(argument)
        self._states.append(state)
        self._c = ffi.NULL
        return len(self._names) - 1

    def _vring(self, name: str, index: int, num: int = 0) -> int:
        state = ffi.new("uint32_t[2]", [index, num])
        return self._add(name, state, {"index": index, "num": num}, state)

    def _bytes(self, name: str, argument: bytes, fields: dict[str, int | str]) -> int:
        return self._add(name, ffi.new("uint8_t[]", argument), fields)

    def suspend(self) -> None:
        """Add SUSPEND."""
        self._add("VHOST_VDPA_SUSPEND", ffi.NULL, {})

    def resume(self) -> None:
        """Add RESUME."""
        self._add("VHOST_VDPA_RESUME", ffi.NULL, {})

    def set_status(self, status: Status) -> None:
        """Add SET_STATUS."""
        self._bytes("VHOST_VDPA_SET_STATUS", bytes([int(status)]), {"status": int(status)})

    def get_vring_base(self, index: int) -> int:
        """Add GET_VRING_BASE; :meth:`got` has the base after a run."""
        return self._vring("VHOST_GET_VRING_BASE", index)

    def set_vring_base(self, index: int, base: int) -> int:
        """Add SET_VRING_BASE; :meth:`put` changes the base."""
        return self._vring("VHOST_SET_VRING_BASE", index, base)

    def set_vring_num(self, index: int, num: int) -> None:
        """Add SET_VRING_NUM."""
        self._vring("VHOST_SET_VRING_NUM", index, num)

    def set_vring_enable(self, index: int, enable: bool) -> None:
        """Add SET_VRING_ENABLE."""
        self._vring("VHOST_VDPA_SET_VRING_ENABLE", index, int(enable))

    def set_vring_addr(self, index: int, desc: int, avail: int, used: int) -> None:
        """Add SET_VRING_ADDR."""
        fields: dict[str, int | str] = {"index": index, "desc": desc, "avail": avail, "used": used}
        self._bytes("VHOST_SET_VRING_ADDR", bytes(VringAddr(index, 0, desc, used, avail, 0)), fields)

    def set_vring_kick(self, index: int, eventfd: int) -> None:
        """Add SET_VRING_KICK."""
        self._bytes("VHOST_SET_VRING_KICK", bytes(VringFile(index, eventfd)), {"index": index, "fd": eventfd})

    def set_vring_call(self, index: int, eventfd: int) -> None:
        """Add SET_VRING_CALL."""
        self._bytes("VHOST_SET_VRING_CALL", bytes(VringFile(index, eventfd)), {"index": index, "fd": eventfd})

    def get_config(self, length: int) -> int:
        """Add GET_CONFIG of ``length`` bytes from the first on; :meth:`config_of` is where they are after a run."""
        return self._bytes(
            "VHOST_VDPA_GET_CONFIG", bytes(VdpaConfig(0, length)) + bytes(length), {"off": 0, "len": length}
        )

    def config_of(self, place: int) -> Any:
        """Return where C finds what GET_CONFIG has read."""
        return self._arguments[place] + ctypes.sizeof(VdpaConfig)

    def put(self, place: int, num: int) -> None:
        """Change the number of a request on a queue's state."""
        self._states[place][1] = num

    def got(self, place: int) -> int:
        """Return the number that a request on a queue's state holds: what a reading one read in the last run."""
        return int(self._states[place][1])

    # -- running it ----------------------------------------------------------------

    def seal(self) -> PreparedCalls:
        """Make the list ready to run, so that nothing is allocated later; return it."""
        count = len(self._names)
        self._c = ffi.new("struct prepared_call[]", count)
        for slot, name, argument in zip(self._c, self._names, self._arguments, strict=True):
            slot.request = IOCTLS[name].request
            slot.argument = int(ffi.cast("uintptr_t", argument))
        return self

    def run(self) -> None:
        """Make every request, in order, until one fails.

        Raises :class:`~pyvhostvdpa.KernelError` that names the request, as
        the single call would; those before it are in force (:attr:`done`
        is their number), those behind it were not made.
        """
        if self._c == ffi.NULL:
            self.seal()
        count = len(self._names)
        self.done = done = lib.calls_run(self._chardev.fileno(), self._c, count)
        self._record(min(done + 1, count))
        if done < count:
            raise KernelError(-self._c[done].result, self._names[done], describe(self._shown(done)))

    def fill(self, job: Any) -> None:
        """Put the list into a ``struct device_job`` that is done once; :meth:`settle` comes behind it."""
        if self._c == ffi.NULL:
            self.seal()
        job.fd, job.calls, job.count = self._chardev.fileno(), self._c, len(self._names)

    def do(self, job: Any) -> None:
        """Do a job that :meth:`fill` has filled, without others beside it; :meth:`settle` comes behind it."""
        lib.jobs_run(job, 1)

    def settle(self, job: Any) -> None:
        """Record what a job made of the list, and raise what :meth:`run` raises."""
        count = len(self._names)
        self.done = done = int(job.done)
        self._chardev.trace.record_later(lambda: self._made(min(done + 1, count)))
        if done < count:
            raise KernelError(-self._c[done].result, self._names[done], describe(self._shown(done)))

    def state_of(self, place: int) -> Any:
        """Return where C finds the number of a request on a queue's state, for a job that puts it there."""
        return self._states[place] + 1

    def _record(self, made: int) -> None:
        for call in self._made(made):
            self._chardev.trace.record(*call)

    def _made(self, count: int) -> Iterator[tuple[int, int, str, dict[str, int | str], int]]:
        for place in range(count):
            call = self._c[place]
            yield int(call.begin), int(call.end), self._names[place], self._shown(place), int(call.result)

    def _shown(self, place: int) -> dict[str, int | str]:
        """Return a request's fields as they were in the run that just ended."""
        fields, state = self._fields[place], self._states[place]
        return fields if state is None else {"index": fields["index"], "num": int(state[1])}
