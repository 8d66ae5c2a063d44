"""What doubles of a device have in common: the state that they were brought to."""

from __future__ import annotations

from typing import Any

from pyvhostvdpa.device.net import State


class Resettable:
    """A double that is reset by a halt and by a reset."""

    state: State

    def _call(self, name: str, what: Any = None) -> None:
        raise NotImplementedError

    def halt(self) -> None:
        self._call("halt")
        self.state = State.RESET

    def reset(self) -> None:
        self._call("reset")
        self.state = State.RESET
