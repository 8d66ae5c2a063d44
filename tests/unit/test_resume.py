"""Resuming a suspended device: what it was notified of meanwhile may be lost, so it is notified again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.device.net_kind import NET
from pyvhostvdpa.device.procedure.base import Procedure, State
from pyvhostvdpa.virtqueue import SHADOWED


class Plain(Procedure):
    """A procedure whose steps are not asked for here."""

    ring_asid = 0

    def _attached(self) -> None: ...
    def _start(self, mode: State, control: Any) -> None: ...
    def _stop(self, then: State | None) -> None: ...
    def _reset(self) -> None: ...


class Suspended:
    """In the place of the door: a device that drops notifications while it is suspended."""

    def __init__(self, kicks: list[int]) -> None:
        self._kicks = kicks

    def suspend(self) -> None: ...

    def resume(self) -> None:
        for kick in self._kicks:
            if raised(kick):
                os.eventfd_read(kick)


def raised(kick: int) -> bool:
    try:
        os.eventfd_write(kick, os.eventfd_read(kick))
    except BlockingIOError:
        return False
    return True


@pytest.fixture
def kicks() -> Iterator[list[int]]:
    made = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
    yield made
    for fd in made:
        os.close(fd)


@pytest.mark.parametrize("state", [State.PASSTHROUGH, State.SHADOW])
def test_resume_notifies_the_device_of_every_queue(kicks: list[int], state: State) -> None:
    queues = [SimpleNamespace(index=index, kick=kick) for index, kick in enumerate(kicks[:2])]
    features = BackendFeature.SUSPEND | BackendFeature.RESUME
    target: Any = SimpleNamespace(
        path="dev", backend_features=features, chardev=Suspended(kicks), kind=NET, serving=SHADOWED
    )
    procedure = Plain(target)
    procedure.state, procedure._queues = state, tuple(queues)  # type: ignore[assignment]
    procedure.shadows = [SimpleNamespace(kick=kick) for kick in kicks[2:]]  # type: ignore[misc]
    procedure.suspend()
    for kick in kicks:
        os.eventfd_write(kick, 1)
    procedure.resume()
    # those of the device; while shadowed the guest's own kicks go to the relay
    shadowed = state is State.SHADOW
    assert [raised(kick) for kick in kicks] == [not shadowed, not shadowed, shadowed, shadowed]
