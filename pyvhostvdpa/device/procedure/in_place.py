# SPDX-License-Identifier: MIT
"""Switching a device without a reset: suspend it, give its queues other rings, let it continue.

Whatever a switch needs is made before the guest runs. Descriptors are bound
to an address space of their own from the first start on (later the kernel
refuses), and that space holds at once the guest's rings, at IOVA = GPA, the
shadow rings, in the holes, and the control queue. A switch then maps nothing,
and keeps features, bindings, queues and what the control queue has set:
vhost-vdpa lets a suspended device's rings be moved since Linux 6.8
(drivers/vhost/vdpa.c:vhost_vdpa_vring_ioctl). After a stop nothing is undone
either; the reset comes with the next start or with close().
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..._cdefs import ffi, lib
from ...base.errors import KernelError, MissingFeature, QueueBroken
from ...base.uapi import Access, BackendFeature, names
from ...chardev.calls import PreparedCalls
from ...memory.guest import PAGE_SIZE
from ...virtqueue.layout import GuestQueue, RingLayout, ring_layout, same_rings
from ...virtqueue.serving import RingServer
from .. import shadowing
from ..kind import GuestControl, is_at, remember
from ..target import OWN_ASID, State, Target
from ..work import Work
from .direct import Direct, set_eventfds, set_ring
from .prepared import Addresses, Face, Move, PreparedStart, PreparedStop
from .served import SVQ_BASE

_NEEDED = BackendFeature.SUSPEND | BackendFeature.RESUME


class InPlace(Direct):
    """Starts a device as :class:`Direct` does, switches it in place.

    What a suspend, a move of the rings and a resume will ask of the device is
    put into lists while it runs (:mod:`pyvhostvdpa.chardev.calls`), and so are
    shadow queues made; while it is suspended the lists are run.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        if lacking := self.lacks(target):
            raise MissingFeature(f"{target.path} cannot be switched in place: {lacking}")
        self._suspended = False
        """Whether the device is suspended and could continue."""
        self._stopped_in: State | None = None
        """The mode that the last stop ended."""
        self._guest_control: GuestControl | None = None
        self._told: tuple[Sequence[GuestQueue], object] = ((), None)
        """The queues that the device has, and the state set through its control queue."""
        self._places: dict[int, tuple[RingLayout, int, int]] = {}
        """Layout, address and IOVA of each shadow ring by queue index."""
        self._spare: list[RingServer] = []
        """Shadow queues that the next switch will need, made before the device is suspended."""
        self._given: dict[int, Face] = {}
        """What the device got last for each queue."""
        self._stopping: PreparedCalls | None = None
        self._bases: list[int] = []
        """Where in the list of a stop the bases are asked for."""
        self._base_failed: KernelError | None = None
        self._moving: dict[State, Move] = {}
        self._unsettled = False
        """Whether the last stop has left something for :meth:`_settle`."""

    @property
    def ring_asid(self) -> int:
        """Apart from guest memory: the guest's own rings are there too."""
        return OWN_ASID

    @staticmethod
    def suited(target: Target) -> str:
        """By their own rings: everything is mapped before the guest runs."""
        return shadowing.USED_ALL

    @staticmethod
    def lacks(target: Target) -> str:
        """Why a device cannot be switched in place; "" if it can."""
        if missing := _NEEDED & ~target.backend_features:
            return f"it takes SUSPEND and RESUME, and {names(missing)} is not offered"
        if not target.separate_descriptors:
            return f"descriptors cannot lie in an address space of their own: {target.why_not_separate}"
        if target.ring_bits & lib.SVQ_F_INDIRECT:
            # vhost_types.h names the descriptor table, driver and device area; devices differ in where they look
            return (
                "the guest may use indirect descriptor tables, which lie in its memory, and it is not specified "
                "whether a device looks for them there when descriptors have an address space of their own"
            )
        return ""

    # -- start ------------------------------------------------------------------

    def prepare_start(self, queues: Sequence[GuestQueue], control: GuestControl | None) -> Work | None:
        """See :meth:`Procedure.prepare_start`: bases, ring addresses and RESUME are one list."""
        self._set_queues(queues, control)
        move = self._moving.get(State.PASSTHROUGH)
        if move is None or not self._stands_for(control) or not self._is_for_these(move, State.PASSTHROUGH):
            return None
        assert self._guest_rings is not None
        start = PreparedStart(move, tuple(queues), control, self._guest_rings)
        work = Work(lambda: self._begin_start(start, work), lambda: self._finish_start(start, work))
        move.calls.fill(work.job)
        self._guest_rings.fill(work.job, [move.calls.state_of(place) for place in move.bases])
        if self._control is not None:
            self._control.fill(work.job)
        return work

    def _begin_start(self, start: PreparedStart, work: Work) -> None:
        control = start.control
        if not self._stands_for(control):
            # the guest has set something since
            start.anew = True
            work.job.count = work.job.ring_count = 0
            work.job.control = ffi.NULL

    def _finish_start(self, start: PreparedStart, work: Work) -> None:
        self._moving.clear()
        if start.anew:
            self.start(State.PASSTHROUGH, start.queues, start.control)
            return
        self._note_shadowed(State.PASSTHROUGH, start.control)
        self._started_at.clear()
        if self._guest_rings is not None:
            self._guest_rings.done()
        try:
            start.move.calls.settle(work.job)
        except BaseException:
            self.abandon()
            raise
        self._suspended, self._given = False, start.move.given
        self.state = State.PASSTHROUGH
        self._serve_control()
        self._notify()

    def _start(self, mode: State, control: GuestControl | None) -> None:
        self._settle()
        # such shadow rings start over at the same addresses; vdpa_hwsim was seen to continue there where it had stopped
        moved = not (mode is State.SHADOW and self._stopped_in is State.SHADOW)
        if moved and self._stands_for(control):
            try:
                self._continue(mode)
                return
            except KernelError as e:
                # before Linux 6.8 rings could not be moved
                if e.errno != errno.EINVAL:
                    raise
        queues = self._queues
        if self._suspended:
            self.reset()
            self._set_queues(queues, control)
        self._guest_control = control
        super()._start(mode, control)
        faces = self._faces(mode, self.shadows)
        self._given = {queue.index: self._face(queue, face) for queue, face in zip(self._queues, faces, strict=True)}

    def _faces(self, mode: State, shadows: Sequence[RingServer]) -> Sequence[GuestQueue | RingServer]:
        """Return whose ring and eventfds the device has of each queue in ``mode``."""
        if mode is not State.SHADOW:
            return self._queues
        pairs = zip(self._queues, shadows, strict=True)
        return [queue if shadow.through else shadow for queue, shadow in pairs]

    def _face(self, queue: GuestQueue, face: GuestQueue | RingServer) -> Face:
        """Return what the device gets for a queue: the addresses of one of its rings, and its eventfds."""
        if isinstance(face, GuestQueue):
            return (queue.desc, queue.avail, queue.used), face
        layout, _, iova = self._places[queue.index]
        return face.addresses(iova, iova + layout.driver_area), face

    def _stands_for(self, control: GuestControl | None) -> bool:
        """Whether the device stands suspended with these queues, and knows what their control queue has set."""
        queues, remembered = self._told
        same = control is self._guest_control and same_rings(queues, self._queues)
        return self._suspended and same and is_at(remembered, control)

    def _stand_by(self, control: GuestControl | None) -> str:
        """Start the device on empty shadow rings, suspend it, and give it the guest's: bases and RESUME are left.

        It finds no descriptor in the first, does not look at the second before
        RESUME, and so writes nothing into guest memory.
        """
        self._settle()
        self._guest_control = control
        self._begin()
        self._bind_descriptors(State.PASSTHROUGH)
        if control is not None and self.target.groups.control is not None:
            self._set_up_control(control, self.target.groups.control)
        self._set_up_empty_rings()
        self._let_run()
        self.suspend()
        if not self._can_move_rings():
            queues = self._queues
            self.reset()
            self._set_queues(queues, control)
            return super()._stand_by(control)
        self._told = self._queues, remember(control)
        self._suspended = True
        self._stopped_in = None
        calls = self.target.chardev.prepare()
        for queue in self._queues:
            ring, _ = self._given[queue.index] = self._face(queue, queue)
            calls.set_vring_addr(queue.index, *ring)
        calls.run()
        self._moving[State.PASSTHROUGH] = self._prepare_move(State.PASSTHROUGH)
        return "it stands suspended with its queues and the control queue's state; bases and RESUME come at the start"

    def _set_up_empty_rings(self) -> None:
        calls = self.target.chardev.prepare()
        for queue in self._queues:
            layout, at, _ = self._places[queue.index]
            ffi.memmove(ffi.cast("char *", at), bytes(layout.size), layout.size)
            set_ring(calls, queue.index, queue.num, 0, self._shadow_ring(queue))
            set_eventfds(calls, queue.index, queue.kick, queue.call)
            self._given[queue.index] = (self._shadow_ring(queue), queue)
        calls.run()

    def _shadow_ring(self, queue: GuestQueue) -> Addresses:
        """Return where the device finds the shadow ring of a queue: descriptors, avail and used ring."""
        layout, _, iova = self._places[queue.index]
        return iova, iova + layout.avail_offset, iova + layout.driver_area

    def _can_move_rings(self) -> bool:
        """Whether this kernel lets a suspended device's rings be moved; before Linux 6.8 it did not."""
        try:
            self.target.chardev.set_vring_base(self._queues[0].index, 0)
        except KernelError as e:
            if e.errno != errno.EINVAL:
                raise
            return False
        return True

    def _bind_descriptors(self, mode: State) -> None:
        group = self.target.groups.descriptors
        if group is not None:
            self.target.chardev.set_group_asid(group, OWN_ASID)
        self._map_rings()

    def _map_rings(self) -> None:
        """Map the guest's rings and the shadow ones in one batch, whichever are used first."""
        with self.target.iotlb.space(OWN_ASID).batch() as batch:
            for gpa, size in self._guest_pages():
                self._ours.append((OWN_ASID, gpa))
                batch.map(gpa, self.memories.guest.hva(gpa, size), size)
            at: int = self.memories.own.hva
            for queue in self._queues:
                layout = ring_layout(queue.num, self.target.ring_bits)
                iova = self._allocate(layout.size)
                used = iova + layout.driver_area
                self._ours += [(OWN_ASID, iova), (OWN_ASID, used)]
                batch.map(iova, at, layout.driver_area, Access.RO)
                batch.map(used, at + layout.driver_area, layout.device_area)
                self._places[queue.index] = (layout, at, iova)
                at += layout.size

    def _guest_pages(self) -> Iterator[tuple[int, int]]:
        """Yield what the guest's rings lie in, as ranges (GPA, bytes) of whole pages of one region each."""
        pages: set[int] = set()
        for queue in self._queues:
            for gpa, size in queue.parts:
                pages.update(range(gpa // PAGE_SIZE, (gpa + size - 1) // PAGE_SIZE + 1))
        ends = {region.end // PAGE_SIZE for region in self.memories.guest.regions}
        first: int | None = None
        for page in sorted(pages):
            first = page if first is None else first
            if page + 1 not in pages or page + 1 in ends:
                yield first * PAGE_SIZE, (page + 1 - first) * PAGE_SIZE
                first = None

    def _map_shadow_rings(self) -> dict[int, tuple[int, int]]:
        """Return where the shadow rings are mapped, by queue index; they were before the first start."""
        if not self.shadows:
            self._make_spare()
            self.shadows, self._spare = self._spare, []
        return {index: (iova, iova + layout.driver_area) for index, (layout, _, iova) in self._places.items()}

    def _make_spare(self) -> None:
        """Make the shadow queues of a switch; nothing of the device is touched, so it may run."""
        if self._spare:
            return
        ring = self.target.ring_bits
        for queue in self._queues:
            _, at, _ = self._places[queue.index]
            self._spare.append(self.serving.queue(queue, self.memories.guest, at, ring, None))

    # -- switch -------------------------------------------------------------------

    def _prepare_move(self, mode: State) -> Move:
        """Put into a list what gives a suspended device its queues' other rings and lets it continue."""
        calls = self.target.chardev.prepare()
        bases: list[int] = []
        faces = self._faces(mode, self._spare)
        given: dict[int, Face] = {}
        for queue, face in zip(self._queues, faces, strict=True):
            ring, _ = given[queue.index] = self._face(queue, face)
            had_ring, had_face = self._given.get(queue.index, ((), None))
            bases.append(calls.set_vring_base(queue.index, 0))
            if ring != had_ring:
                calls.set_vring_addr(queue.index, *ring)
            if face is not had_face:
                set_eventfds(calls, queue.index, face.kick, face.call)
        if self._control is not None:
            # mlx5_vdpa forgets that its control queue is ready, and RESUME does not remind it
            # (drivers/vdpa/mlx5/net/mlx5_vnet.c:mlx5_vdpa_cvq_suspend). In front of RESUME: behind it data queues are
            # at work, and may keep this thread from the CPU
            calls.set_vring_enable(self._control.index, True)
        calls.resume()
        return Move(calls.seal(), tuple(bases), given)

    def _continue(self, mode: State) -> None:
        """Give a suspended device its queues' other rings and let it continue."""
        if mode is State.SHADOW:
            self._make_spare()
        move = self._moving.pop(mode, None)
        if move is None or not self._is_for_these(move, mode):
            move = self._prepare_move(mode)
        if mode is State.SHADOW:
            self.shadows, self._spare = self._spare, []
            self._remember_passed()
            for queue, shadow, place in zip(self._queues, self.shadows, move.bases, strict=True):
                shadow.notify_by(queue)
                shadow.take_up()
                move.calls.put(place, shadow.base)
        else:
            for place, used in zip(move.bases, self._used_indices(), strict=True):
                move.calls.put(place, used)
        if self._control is not None:
            self._control.take_up()
        move.calls.run()
        self._suspended = False
        self._given = move.given
        if mode is State.SHADOW:
            self._serve()
        self._serve_control()

    def _is_for_these(self, move: Move, mode: State) -> bool:
        """Whether a move that was prepared has the eventfds of the queues that are started now."""
        faces = self._faces(mode, self._spare)
        return all(move.given[q.index][1] is face for q, face in zip(self._queues, faces, strict=True))

    def _tell_eventfds(self, queue: GuestQueue) -> None:
        super()._tell_eventfds(queue)
        self._given[queue.index] = self._face(queue, queue)

    # -- stop -------------------------------------------------------------------

    def prepare_stop(self) -> Work | None:
        """See :meth:`Procedure.prepare_stop`: SUSPEND, then threads are stopped and their queues reclaimed.

        Between the two, rings that the device works on itself are asked for their bases and looked at.
        """
        prepared = self._stop_job()
        return None if prepared is None else prepared[0]

    def _stop_job(self) -> tuple[Work, PreparedCalls] | None:
        take_over = None if self._server_threads is None else self._server_threads.prepare_take_over()
        if self.state is not State.SHADOW or take_over is None:
            return None
        calls = self.target.chardev.prepare()
        calls.suspend()
        places = [calls.get_vring_base(queue.index) for queue in self.written_rings()]
        self._moving.clear()
        self._told = self._queues, remember(self._guest_control)
        stop = PreparedStop(calls, tuple(places), take_over, self._passed_rings)
        work = Work(self._begin_stop, lambda: self._finish_stop(work, stop))
        calls.fill(work.job)
        take_over.fill(work.job)
        if stop.passed is not None:
            stop.passed.fill_stop(work.job, [calls.state_of(place) for place in places])
        return work, calls

    def stop(self, then: State | None = None) -> None:
        """See :meth:`Procedure.stop`. A shadowed device that need not go on at once is stopped as if it were prepared.

        Its threads are kept out of the rings, and end later: to end one takes until it has had a CPU.
        """
        prepared = None if then is State.PASSTHROUGH else self._stop_job()
        if prepared is None:
            super().stop(then)
            return
        work, calls = prepared
        self._begin_stop()
        try:
            calls.do(work.job)
        finally:
            # Ctrl-C may raise as soon as C has returned
            work.finish()

    def _begin_stop(self) -> None:
        # a command of the guest is answered before the device is suspended, or never
        if self._control is not None:
            self._control.hold()

    def _finish_stop(self, work: Work, stop: PreparedStop) -> None:
        try:
            stop.calls.settle(work.job)
        except BaseException:
            if stop.calls.done:
                # it is suspended: the stop fails, not the suspend
                self.abandon()
            else:
                self._serve_control()
            raise
        if stop.passed is not None and work.job.in_order < work.job.passed_count:
            self.resume()
            raise self._out_of_order(stop.passed.queues[work.job.in_order])
        self._note_bases(int(work.job.end), stop)
        try:
            if why := stop.take_over.broken():
                raise QueueBroken(why)
            if work.job.held < work.job.passed_count:
                self._check_bases([stop.calls.got(place) for place in stop.places])
        except QueueBroken:
            self.abandon()
            raise
        self._keep_told()
        self._unsettled = True
        self._suspended, self._stopped_in, self.state = True, self.state, State.RESET

    def _end(self, taking_over: bool) -> None:
        try:
            # what the last stop has taken over is not handed back twice
            self._settle()
        finally:
            super()._end(taking_over)

    def _note_bases(self, at: int, stop: PreparedStop) -> None:
        queues = [shadow.queue for shadow in self.shadows if not shadow.through]
        self.target.chardev.trace.record_later(
            lambda: [
                (at, at, SVQ_BASE, {"index": queue.index, "num": base, "svq": True}, None)
                for queue, base in zip(queues, stop.take_over.bases(), strict=True)
            ]
        )

    def _settle(self) -> None:
        """Do what the last stop postponed until nothing waits for it."""
        if not self._unsettled:
            return
        self._unsettled = False
        self._stop_serving()
        if self.guest_config is not None:
            self.guest_config.disconnect()
        self._close_shadows()

    @contextmanager
    def _threads_paused(self) -> Iterator[None]:
        # threads that the last stop has only kept out must not run afterwards
        self._settle()
        with super()._threads_paused():
            yield

    def _keep_told(self) -> None:
        """Keep what the control queue has set in the end."""
        if not is_at(self._told[1], self._guest_control):
            self._told = self._queues, remember(self._guest_control)

    def _prepare_stop(self, then: State | None) -> None:
        calls = self.target.chardev.prepare()
        calls.suspend()
        self._bases = [calls.get_vring_base(queue.index) for queue in self.written_rings()]
        self._stopping = calls.seal()
        self._moving.clear()
        if then is State.SHADOW and self.state is State.PASSTHROUGH:
            self._make_spare()
        if then is not None and (then is State.PASSTHROUGH or self._spare):
            self._moving[then] = self._prepare_move(then)
        # the control queue may set something until it is stopped, so this is compared then
        self._told = self._queues, remember(self._guest_control)

    def _suspend(self) -> None:
        stopping, self._stopping = self._stopping, None
        if stopping is None:
            super()._suspend()
            return
        try:
            stopping.run()
        except KernelError as e:
            if not stopping.done:
                raise
            # it is suspended: the stop fails, not the suspend
            self._base_failed = e
        self._bases = [stopping.got(place) for place in self._bases]

    def _check_guest_queues(self) -> None:
        failed, self._base_failed = self._base_failed, None
        if failed is not None:
            raise failed
        self._check_bases(self._bases)

    def _stop(self, then: State | None) -> None:
        self._take_queues()
        if self.guest_config is not None:
            self.guest_config.disconnect()
        self._close_shadows()
        self._keep_told()
        self._suspended = True
        self._stopped_in = self.state
        self.state = State.RESET

    def _reset(self) -> None:
        self._suspended = False
        self._places.clear()
        self._moving.clear()
        self._close_spare()
        super()._reset()

    def _close_spare(self) -> None:
        spare, self._spare = self._spare, []
        for shadow in spare:
            shadow.close()

    def _close_queues(self) -> None:
        self._unsettled = False
        super()._close_queues()
        self._close_spare()
