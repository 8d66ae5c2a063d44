"""Stand-ins for a migration's devices and its other side: what a source does with them is decided in milliseconds."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from device_states import Resettable

from pyvhostvdpa._cdefs import ffi
from pyvhostvdpa.base.errors import StreamBroken
from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.device.net import State
from pyvhostvdpa.device.procedure.best import Choice
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.synthetic import SyntheticGuest
from pyvhostvdpa.memory.guest import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.migration.cancel import Cancel
from pyvhostvdpa.migration.pages import PAGES, ZERO, PageReceiver
from pyvhostvdpa.migration.source import SendOptions, Source
from pyvhostvdpa.migration.stream import Channel, Frame
from pyvhostvdpa.net.features import Feature
from pyvhostvdpa.trace.recorder import Trace

MEMORY = 1 << 20


class StubDevice(Resettable):
    """Is in the state that it was brought to; ``failures`` has what the next call of a method raises, in turn."""

    def __init__(self, path: str = "stub0", trace: Trace | None = None) -> None:
        self.path = path
        self.trace = (trace or Trace()).device(path)
        self.state = State.PASSTHROUGH
        self.backend_features = BackendFeature.SUSPEND | BackendFeature.RESUME
        self.guest_config: object = None
        self.control_deadline = 1.0
        self.no_job = ffi.new("struct device_job *")
        self.failures: dict[str, list[BaseException | None]] = {}
        self.calls: list[str] = []
        self.still: dict[int, float] = {}
        self.features = Feature.VERSION_1
        self.procedure, self.shadow = Choice("direct"), "full"
        self.iotlb = SimpleNamespace(limits=SimpleNamespace(pinned=None, entries=None, private=False))

    def _call(self, name: str, what: Any = None) -> None:
        self.calls.append(name)
        now = self.trace.phase and name
        if now:
            self.trace.record(len(self.calls), len(self.calls) + 1, f"VHOST_{name}", {}, 0)
        if self.failures.get(name):
            error = self.failures[name].pop(0)
            if error is not None:
                raise error

    def stop(self, then: State | None = None) -> None:
        self._call("stop")
        self.state = State.RESET

    def prepare_stop(self) -> None: ...

    def prepare_start(self, queues: Any, control: Any = None) -> None: ...

    def prepare_config(self) -> SimpleNamespace:
        """Ask nothing, and find what is expected."""
        return SimpleNamespace(fill=lambda answer: setattr(answer, "job", self.no_job), settle=lambda: None)

    def start_shadow(self, queues: Any, control: Any = None) -> None:
        self._call("start_shadow")
        self.state = State.SHADOW

    def start_passthrough(self, queues: Any, control: Any = None) -> None:
        self._call("start_passthrough")
        self.state = State.PASSTHROUGH

    def check(self) -> None:
        self._call("check")

    def stalled(self) -> dict[int, float]:
        return self.still

    def close(self) -> None: ...


class StubDestination:
    """The other side in a thread. ``answers`` replaces its answer to a frame; None closes the stream instead."""

    def __init__(self, channel: Channel, answers: Mapping[Frame, Frame | None] | None = None) -> None:
        self.channel, self.answers = channel, dict(answers or {})
        self.memory = GuestMemory([(DEFAULT_GPA, MEMORY)])
        self.heard: list[Frame] = []
        self.words = b""
        self.hash = b""
        """What READY has of its memory."""
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        receiver = PageReceiver(self.memory, self.channel)
        right = {Frame.SHAPE: Frame.ACCEPT, Frame.FINAL: Frame.READY, Frame.GO: Frame.RUNNING}
        with self.channel, suppress(StreamBroken):
            while True:
                header = self.channel.receive_header(30.0)
                if header.type in (PAGES, ZERO):
                    receiver.receive(header)
                    continue
                kind = Frame(header.type)
                payload = self.channel.receive_payload(header)
                self.heard.append(kind)
                if kind is Frame.CANCEL:
                    self.words = payload
                    return
                answer = self.answers.get(kind, right.get(kind))
                if kind in self.answers and answer is None:
                    return
                if answer is Frame.READY:
                    self.channel.send_frame(answer, self.hash)
                elif answer is not None:
                    self.channel.send_text(answer, "so it was told" if answer is Frame.FAILED else "")

    def close(self) -> None:
        self.thread.join()
        self.memory.close()


class Rig:
    """A guest on a stub device, ready to be sent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        memory = GuestMemory([(DEFAULT_GPA, MEMORY)])
        self.guest = SyntheticGuest(memory)
        self.guest.add(GuestNic(memory, NicOptions(ring_size=16)), None)
        self.trace = Trace()
        self.device = StubDevice(trace=self.trace)
        self.guest.run()
        # its threads may not have had a CPU yet; then nothing is in flight and nothing can be missing
        while not self.guest.counts().sent:
            time.sleep(0.001)

    @contextmanager
    def source(
        self, answers: Mapping[Frame, Frame | None] | None = None, **callbacks: Any
    ) -> Iterator[tuple[Source, StubDestination]]:
        near, far = socket.socketpair()
        with Cancel() as cancel, Channel(near, cancel.fileno(), stall=5.0) as channel:
            other = StubDestination(Channel(far, stall=30.0), answers)
            options = SendOptions(folder=self.folder)
            try:
                yield Source(self.guest, [self.device], channel, cancel, options, **callbacks), other  # type: ignore[list-item]
            finally:
                channel.close()
                other.close()

    @property
    def runs(self) -> bool:
        return all(traffic.running and not traffic.dead for traffic in self.guest.traffic)

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.saved"))

    def close(self) -> None:
        self.guest.close()
