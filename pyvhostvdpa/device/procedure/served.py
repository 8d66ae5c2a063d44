# SPDX-License-Identifier: MIT
"""A device's queues: how they are served, where a device continues in them, and bringing them to where it stopped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from ...base.errors import MissingFeature, OutOfOrder, QueueBroken
from ...memory.guest import Region, Translation
from ...virtqueue.layout import GuestQueue, RingStart, in_order, indices, ring_layout, same_rings
from ...virtqueue.rings import GuestRings
from ...virtqueue.serving import RingServer, ServerThreads, ServingOptions
from ...virtqueue.stall import StallDetector
from .. import shadowing
from ..kind import ControlPlace, ControlServer, GuestControl, GuestView
from ..target import State, Target
from .attached import CONTROL_ROOM, Attached

SVQ_BASE = "vhost_vdpa_get_vring_base"
"""The note of a shadowed queue's base, which no call returns."""


class Served(Attached):
    """A device with a guest's queues: data queues in a list, and a control queue that is always served by us."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.serving = target.serving or shadowing.choose(self.suited(target), target.kind)
        """How its queues are shadowed."""
        self.shadows: list[RingServer] = []
        self._placed = 0
        """Bytes of our memory that the shadow rings take."""
        self.serving_options = ServingOptions()
        self.control_deadline = target.kind.deadline
        self.control_died = False
        """Whether the control queue has stopped answering, since the device was opened."""
        self.guest_config: GuestView | None = None
        self._server_threads: ServerThreads | None = None
        self._control: ControlServer | None = None
        self._queues: tuple[GuestQueue, ...] = ()
        """The data queues."""
        self._known: list[GuestQueue] = []
        """Every queue of the last start, data queues first; it stays when they are stopped."""
        self._left_at: dict[int, int] = {}
        """Where queues stopped whose rings are no longer to be looked at."""
        self._guest_rings: GuestRings | None = None
        self._passed_rings: GuestRings | None = None
        """Those that the device works on itself while others are relayed; None without any."""
        self._stalls: StallDetector | None = None
        self._started_at: dict[int, RingStart] = {}
        """What each guest ring held when passthrough started, by queue index."""

    @staticmethod
    def suited(target: Target) -> str:
        """How queues are shadowed unless that is asked for: one of :data:`pyvhostvdpa.device.shadowing.NAMES`."""
        return shadowing.FULL

    # -- the guest's queues --------------------------------------------------------

    def _set_queues(self, queues: Sequence[GuestQueue], control: GuestControl | None) -> None:
        """Take a guest's queues; ValueError, with nothing changed, if a ring is not in guest memory."""
        memory = self.memories.guest
        passed = [queue for queue in queues if not self.serving.relays(queue.index)]
        if self._guest_rings is not None and same_rings(self._guest_rings.queues, queues):
            # a guest that comes brings its eventfds, and stands still meanwhile
            self._guest_rings.queues = tuple(queues)
            if self._passed_rings is not None:
                self._passed_rings.queues = tuple(passed)
        else:
            self._guest_rings = GuestRings(queues, memory)
            self._passed_rings = GuestRings(passed, memory) if passed else None
            self._stalls = StallDetector([q for q in queues if self.target.kind.completes(q.index)], memory)
        self._queues = tuple(queues)
        self._known = [*queues, *([control.queue] if control is not None and control.queue is not None else [])]
        self._left_at.clear()

    def _check_given(self, bases: Mapping[int, int]) -> None:
        """Raise unless the used indices, where a device starts, fit the ``bases`` at which another process stopped."""
        for queue in self._known:
            base = bases.get(queue.index)
            if base is None:
                continue
            self._check_base(queue, base, "it was stopped at")
            _, used = indices(queue, self.memories.guest)
            if base != used and not in_order(queue, self.memories.guest, None):
                raise OutOfOrder(
                    f"{self.target.path} virtqueue {queue.index}: it was stopped at base {base} with used index {used} "
                    "and used descriptors out of order, so those in flight are not known"
                )

    def bases(self) -> dict[int, int]:
        """Where each queue of the last start must continue, by index; see :meth:`VdpaNetDevice.bases`."""
        if self.state is not State.RESET:
            raise MissingFeature(f"{self.target.path} is in state {self.state.value}: stop() it to know its bases")
        return {**self._left_at, **{queue.index: indices(queue, self.memories.guest)[1] for queue in self._known}}

    def set_eventfds(self, index: int, kick: int | None, call: int | None) -> None:
        """Replace the eventfds of a queue that is running; see :meth:`VdpaNetDevice.set_eventfds`."""
        at = next((at for at, queue in enumerate(self._known) if queue.index == index), None)
        if at is None or self.state not in (State.PASSTHROUGH, State.SHADOW):
            raise MissingFeature(f"{self.target.path}: virtqueue {index} is not running")
        old = self._known[at]
        new = replace(old, kick=old.kick if kick is None else kick, call=old.call if call is None else call)
        if self._control is not None and index == self._control.index:
            with self._threads_paused():
                self._control.notify_by(new.kick, new.call)
        elif self.state is State.SHADOW and not self.shadows[at].through:
            with self._threads_paused():
                self.shadows[at].notify_by(new)
        else:
            self._tell_eventfds(new)
            if self.state is State.SHADOW:
                self.shadows[at].notify_by(new)
        self._known[at] = new
        if at < len(self._queues):
            self._queues = tuple(self._known[: len(self._queues)])
            if self._guest_rings is not None:
                self._guest_rings.queues = self._queues
        # notifications of the old ones may have been lost with them
        _notify(new)

    def _tell_eventfds(self, queue: GuestQueue) -> None:
        self.target.chardev.set_vring_kick(queue.index, queue.kick)
        self.target.chardev.set_vring_call(queue.index, queue.call)

    def written_rings(self) -> Sequence[GuestQueue]:
        """The guest's rings that the device writes into itself, as it does in passthrough."""
        if self.state is State.SHADOW:
            return [shadow.queue for shadow in self.shadows if shadow.through]
        return self._queues if self.state is State.PASSTHROUGH else ()

    # -- threads -------------------------------------------------------------------

    def _serve(self) -> None:
        threads = self.serving.threads
        self._server_threads = threads(self.shadows, self.serving_options, self._config_call, self.target.kind.together)
        self._server_threads.start()
        if self.serving.in_place:
            # it was given buffers before it ran, and a device may forget what it was notified of then
            for shadow in self.shadows:
                if not shadow.through:
                    raise_eventfd(shadow.kick)

    def _serve_control(self) -> None:
        if self._control is not None:
            self._control.start()

    @contextmanager
    def _data_threads_paused(self) -> Iterator[None]:
        """Keep our threads off the rings for the block."""
        threads, self._server_threads = self._server_threads, None
        if threads is not None:
            threads.stop()
        try:
            yield
        finally:
            if threads is not None:
                self._serve()

    @contextmanager
    def _threads_paused(self) -> Iterator[None]:
        control = self._control if self._control is not None and self._control.serving else None
        if control is not None:
            control.stop()
        try:
            with self._data_threads_paused():
                yield
        finally:
            if control is not None:
                control.start()

    def _stop_serving(self) -> None:
        if self._server_threads is not None:
            self._server_threads.stop()
            self._server_threads = None
        if self._control is not None:
            self._control.stop()

    def _notify(self) -> None:
        # a notification raised while no reader waited must not be lost; in the
        # guest's order: where buffers come first, they are there in time
        for queue in self._queues:
            _notify(queue)
        if self.guest_config is not None:
            self.guest_config.connect(self, None if self._control is None else self._control.model)

    def _device_kicks(self) -> list[int]:
        """The eventfds by which the device is notified of its data queues, in the guest's order."""
        if self.state is State.SHADOW:
            return [shadow.kick for shadow in self.shadows]
        return [queue.kick for queue in self._queues] if self.state is State.PASSTHROUGH else []

    # -- when regions of guest memory come and go ----------------------------------------

    def _known_queues(self) -> Sequence[GuestQueue]:
        return self._known

    def _check_unused(self, regions: Sequence[Region]) -> None:
        for region in regions:
            for shadow in self.shadows:
                if shadow.reaches(region.gpa, region.size):
                    raise MissingFeature(
                        f"{self.target.path} virtqueue {shadow.queue.index} has buffers in guest memory at "
                        f"{region.gpa:#x}-{region.end - 1:#x}, so it cannot be taken away"
                    )

    def _memory_changed(self) -> None:
        for shadow in self.shadows:
            shadow.memory_changed()

    # -- what serves them --------------------------------------------------------------

    def _shadow(self, queue: GuestQueue, translation: Translation | None = None) -> RingServer:
        """Make the shadow of a guest's queue, its ring behind those that there are."""
        own = self.memories.own
        at = own.hva + self._placed
        ring = self.target.ring_bits
        layout = ring_layout(queue.num, ring)
        if at + layout.size > own.hva + own.size - CONTROL_ROOM:
            raise MissingFeature(f"{self.target.path}: the shadow rings do not fit {own.size - CONTROL_ROOM} bytes")
        shadow = self.serving.queue(queue, self.memories.guest, at, ring, translation)
        self._placed += layout.size
        self.shadows.append(shadow)
        return shadow

    def _make_control(self, control: GuestControl) -> ControlServer:
        """Make our side of the control queue, at the end of our memory; its IOVA is taken from the holes."""
        own, kind, ring = self.memories.own, self.target.kind, self.target.ring_bits
        # it need not be as long as the guest's: commands are copied
        layout = ring_layout(self.target.fitting(control.index, control.num), ring)
        size = kind.control_size(layout)
        place = ControlPlace(
            layout, own.hva + own.size - size, self._allocate(size), self.control_deadline, ring, self._config_call
        )
        self._control = kind.control(control, self.memories.guest, place, self.target.chardev.trace)
        return self._control

    @property
    def _config_call(self) -> int:
        return -1 if self.guest_config is None else self.guest_config.call

    def _close_queues(self) -> None:
        self._close_shadows()
        if self._control is not None:
            self.control_died |= self._control.died
            self._control.close()
            self._control = None

    def _close_shadows(self) -> None:
        shadows, self.shadows, self._placed = self.shadows, [], 0
        for shadow in shadows:
            shadow.close()

    def _broken_queue(self) -> str:
        for shadow in self.shadows:
            if shadow.broken:
                return f"virtqueue {shadow.queue.index}: {shadow.broken}"
        if self._control is not None and self._control.failed:
            return f"control queue: {self._control.failed}"
        return ""

    # -- where a device continues --------------------------------------------------------

    def _used_indices(self) -> list[int]:
        """Return from where a device must continue in each of the guest's rings, and remember what they hold."""
        assert self._guest_rings is not None
        self._started_at.clear()
        return self._guest_rings.remember()

    def _used_index(self, queue: GuestQueue) -> int:
        """Return from where a device must continue in one guest's ring, and remember it."""
        start = self._started_at[queue.index] = RingStart(queue, self.memories.guest)
        return start.used_index

    def _remember_passed(self) -> None:
        """Remember what the rings hold that the device is going to work on itself while others are relayed."""
        self._started_at.clear()
        if self._passed_rings is not None:
            self._passed_rings.remember()

    def _note_base(self, queue: GuestQueue, base: int) -> None:
        """For the trace: a shadowed queue's base, which no call returns."""
        self.target.chardev.trace.note(SVQ_BASE, index=queue.index, num=base, svq=True)

    def _take_over_shadows(self) -> None:
        """Hand the guest what the device used and what it did not; a broken queue keeps no other from that."""
        first: QueueBroken | None = None
        for shadow in self.shadows:
            try:
                shadow.drain()
            except QueueBroken as e:
                first = first or e
        for shadow in self.shadows:
            if not shadow.broken:
                base = shadow.republish()
                if not shadow.through:
                    self._note_base(shadow.queue, base)
        if first is not None:
            raise first

    def _check_order(self, mode: State) -> None:
        """Raise OutOfOrder if a stopped device did not keep order in a ring that it worked on itself in ``mode``."""
        if mode is State.SHADOW:
            wrong = None if self._passed_rings is None else self._passed_rings.out_of_order()
        elif mode is not State.PASSTHROUGH:
            wrong = None
        elif self._guest_rings is not None and not self._started_at:
            wrong = self._guest_rings.out_of_order()
        else:
            memory, started = self.memories.guest, self._started_at
            wrong = next((q for q in self._queues if not in_order(q, memory, started.get(q.index))), None)
        if wrong is not None:
            raise self._out_of_order(wrong)

    def _out_of_order(self, queue: GuestQueue) -> OutOfOrder:
        return OutOfOrder(
            f"{self.target.path} virtqueue {queue.index}: the device uses descriptors out of order, "
            "so the in-flight descriptors cannot be determined where it works on the guest's own rings"
        )

    def _check_base(self, queue: GuestQueue, base: int, told: str = "the device reports") -> None:
        """Between used index and base lie the descriptors that the device took and did not finish.

        They are not lost: the next owner starts at the used index. That is
        right for a device that finishes in order, which was looked at before.
        """
        avail, used = indices(queue, self.memories.guest)
        taken = (base - used) & 0xFFFF
        if taken > queue.num or (avail - used) & 0xFFFF < taken:
            raise QueueBroken(
                f"{self.target.path} virtqueue {queue.index}: {told} base {base}, "
                f"the ring has avail {avail} and used {used}"
            )


def _notify(queue: GuestQueue) -> None:
    raise_eventfd(queue.kick)
    if queue.call >= 0:
        raise_eventfd(queue.call)


def raise_eventfd(fd: int) -> None:
    """Notify the reader of an eventfd. One that is full has been raised already."""
    with suppress(BlockingIOError):
        os.eventfd_write(fd, 1)
