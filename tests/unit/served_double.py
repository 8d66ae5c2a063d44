"""A double of a served device: its states and rules, a record of what was asked of it, errors on demand.

For the state machine of a vhost-user session only; tests/kernel has real devices.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from device_states import Resettable

from pyvhostvdpa.base.errors import MissingFeature, VhostVdpaError
from pyvhostvdpa.base.uapi import ALL_BACKEND_FEATURES
from pyvhostvdpa.device.net import State
from pyvhostvdpa.memory.guest import FileRegion, GuestMemory
from pyvhostvdpa.memory.log import SharedLog
from pyvhostvdpa.net.control_queue import NetGuestControl
from pyvhostvdpa.net.features import CONTROL, OFFLOADS, SUPPORTED, Feature
from pyvhostvdpa.trace.recorder import Trace
from pyvhostvdpa.virtqueue.layout import GuestQueue

PAIRS = 2
MTU = 1500
OFFERED = SUPPORTED | CONTROL | OFFLOADS | Feature.EVENT_IDX | Feature.INDIRECT_DESC | Feature.RING_PACKED


@dataclass
class Call:
    """What was asked of the device."""

    name: str
    what: Any = None


class ServedDouble(Resettable):
    """A net device with two pairs and a control queue, switched in place."""

    def __init__(self, trace: Trace, offered: Feature = OFFERED) -> None:
        self.path = "/dev/vhost-vdpa-double"
        self.trace = trace.device(self.path)
        self.offered = offered
        self.backend_features = ALL_BACKEND_FEATURES
        self.features = Feature(0)
        self.ring_sizes = (256,) * (2 * PAIRS + 1)
        self.state = State.RESET
        self.calls: list[Call] = []
        self.fails: dict[str, VhostVdpaError] = {}
        """The next call of a name raises this, once."""
        self.regions: dict[int, FileRegion] = {}
        self.queues: Sequence[GuestQueue] = ()
        self.control: NetGuestControl | None = None
        self.log: SharedLog | None = None
        self.stopped_at: Mapping[int, int] = {}
        self.commands: list[bytes] = []
        self.answer = 0
        self.config_call = -1
        self.procedure = SimpleNamespace(name="in-place", why_not_better="")
        limits = SimpleNamespace(pinned=True)
        groups = SimpleNamespace(max_pairs=PAIRS, control_index=2 * PAIRS)
        chardev = SimpleNamespace(set_config_call=lambda fd: setattr(self, "config_call", fd))
        self.target = SimpleNamespace(groups=groups, iotlb=SimpleNamespace(limits=limits), chardev=chardev)

    def _call(self, name: str, what: Any = None) -> None:
        self.calls.append(Call(name, what))
        self.trace.note(name)
        if error := self.fails.pop(name, None):
            if name in ("start", "stop"):
                self.state = State.RESET
            raise error

    def names(self) -> list[str]:
        return [call.name for call in self.calls]

    def forget(self) -> None:
        self.calls.clear()

    # -- what is asked of a device ---------------------------------------------------

    def config(self) -> bytes:
        return bytes(10) + MTU.to_bytes(2, "little") + bytes(12)

    def negotiate(self, wanted: Feature) -> Feature:
        assert self.state is State.RESET, "features are negotiated while the device runs"
        self._call("negotiate", wanted)
        self.features = wanted & self.offered
        return self.features

    def attach(self, memory: GuestMemory) -> None:
        self.memory = memory

    def add_memory(self, regions: Sequence[FileRegion]) -> None:
        self._call("add_memory", list(regions))
        for region in regions:
            assert region.gpa not in self.regions
            # as the device does, whose pages are pinned
            os.posix_fallocate(region.fd, region.offset, region.size)
            self.regions[region.gpa] = region

    def map_memory(self) -> None:
        self._call("map_memory")

    def stand_by(self, queues: Sequence[GuestQueue], control: NetGuestControl | None = None) -> str:
        assert self.state is State.RESET
        self._call("stand_by", [queue.index for queue in queues])
        return "it stands suspended"

    def remove_memory(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._call("remove_memory", list(ranges))
        for gpa, size in ranges:
            if self.state is not State.RESET and any(gpa <= queue.desc < gpa + size for queue in self.queues):
                raise MissingFeature("a queue that runs has its ring there")
        for gpa, size in ranges:
            assert self.regions.pop(gpa).size == size

    def start(
        self,
        mode: State,
        queues: Sequence[GuestQueue],
        control: NetGuestControl | None = None,
        bases: Mapping[int, int] | None = None,
    ) -> None:
        assert self.state is State.RESET, "started while it runs"
        assert self.features, "started without features"
        self._call("start", (mode, dict(bases or {})))
        for queue in queues:
            assert any(gpa <= queue.desc < gpa + region.size for gpa, region in self.regions.items())
            os.fstat(queue.kick)
            if queue.call >= 0:
                os.fstat(queue.call)
        self.state, self.queues, self.control = mode, tuple(queues), control
        self.stopped_at = {queue.index: (bases or {}).get(queue.index, 0) for queue in queues}

    def stop(self, then: State | None = None) -> None:
        assert self.state in (State.PASSTHROUGH, State.SHADOW), "stopped while it does not run"
        self._call("stop", then)
        self.state = State.RESET
        self.stopped_at = {index: base + 1 for index, base in self.stopped_at.items()}

    def bases(self) -> Mapping[int, int]:
        assert self.state is State.RESET
        return self.stopped_at

    def set_eventfds(self, index: int, kick: int | None = None, call: int | None = None) -> None:
        assert self.state is not State.RESET
        self._call("set_eventfds", (index, kick is not None, call is not None))
        for fd in (kick, call):
            if fd is not None and fd >= 0:
                os.fstat(fd)

    def set_log(self, log: SharedLog | None) -> None:
        self._call("set_log", log is not None)
        self.log = log

    def command(self, data: bytes) -> int:
        assert self.control is not None
        assert self.state is not State.RESET
        self._call("command", data)
        self.commands.append(data)
        if self.answer == 0:
            self.control.model.apply(data)
        return self.answer

    def check(self) -> None:
        self._call("check")
