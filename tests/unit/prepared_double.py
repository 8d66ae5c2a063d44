"""A list of prepared requests for a double of the door: each is the double's method, one after the other."""

from __future__ import annotations

from typing import Any

from pyvhostvdpa.base.errors import KernelError
from pyvhostvdpa.chardev.calls import PreparedCalls


class PreparedDouble(PreparedCalls):
    """Makes the requests of its list by a double's methods until one fails."""

    def __init__(self, door: Any) -> None:
        super().__init__(door)
        self._door = door
        self._ended: KernelError | bool = False
        """What :meth:`do` has left for :meth:`settle`; False if C did the job without the calls."""

    def run(self) -> None:
        self.done = 0
        for place, name in enumerate(self._names):
            self._make(place, name.removeprefix("VHOST_").removeprefix("VDPA_").lower())
            self.done += 1

    def fill(self, job: Any) -> None:
        """Leave a job without calls: they are made by :meth:`settle`."""

    def do(self, job: Any) -> None:
        """Make the calls in front of what C does behind them: it does nothing if one failed."""
        try:
            self.run()
        except KernelError as e:
            self._ended = e
        else:
            self._ended = True
            super().do(job)

    def settle(self, job: Any) -> None:
        ended, self._ended = self._ended, False
        if isinstance(ended, KernelError):
            raise ended
        if not ended:
            self.run()

    def _make(self, place: int, method: str) -> None:
        arguments = dict(self._shown(place))
        if method == "get_vring_base":
            self.put(place, self._door.get_vring_base(int(arguments["index"])))
            return
        getattr(self._door, method)(*arguments.values())
