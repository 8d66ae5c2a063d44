"""A list of prepared requests for a double of the door: each is the double's method, one after the other."""

from __future__ import annotations

from typing import Any

from pyvhostvdpa.chardev.calls import PreparedCalls


class PreparedDouble(PreparedCalls):
    """Makes the requests of its list by a double's methods until one fails."""

    def __init__(self, door: Any) -> None:
        super().__init__(door)
        self._door = door

    def run(self) -> None:
        self.done = 0
        for place, name in enumerate(self._names):
            self._make(place, name.removeprefix("VHOST_").removeprefix("VDPA_").lower())
            self.done += 1

    def _make(self, place: int, method: str) -> None:
        arguments = dict(self._shown(place))
        if method == "get_vring_base":
            self.put(place, self._door.get_vring_base(int(arguments["index"])))
            return
        getattr(self._door, method)(*arguments.values())
