# SPDX-License-Identifier: MIT
"""The package's own procedure: few calls, guest memory mapped once, ours in one batch an address space."""

from __future__ import annotations

from collections.abc import Sequence

from ...base.uapi import Access, BackendFeature, Status
from ...chardev.calls import PreparedCalls
from ...chardev.iotlb import GuestMapping
from ...memory.guest import GuestMemory
from ...net.control_queue import GuestControl
from ...virtqueue.layout import GuestQueue
from .base import FEATURES_SET, GUEST_ASID, OWN_ASID, READY, RUNNING, Procedure, State, Target


class Direct(Procedure):
    """Maps guest memory at attach, IOVA = GPA, and keeps it mapped."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._translation_lost = False
        self._set_up_for: tuple[Sequence[GuestQueue], GuestControl | None] | None = None
        """What :meth:`stand_by` has set up, if nothing was started since."""

    @property
    def ring_asid(self) -> int:
        """Apart from guest memory if the device can fetch descriptors from there."""
        return OWN_ASID if self.target.descriptors_apart else GUEST_ASID

    def _attached(self) -> None:
        memory: GuestMemory = self.memories.guest
        space = self.target.iotlb.space(GUEST_ASID)
        with space.batch() as batch:
            for region in memory.regions:
                batch.map(region.gpa, region.memory.hva, region.size)
        space.layout = GuestMapping.IDENTITY

    # -- start ------------------------------------------------------------------

    def _start(self, mode: State, control: GuestControl | None) -> None:
        if mode is State.PASSTHROUGH and self._is_set_up(control):
            self._set_bases()
        else:
            self._set_up(mode, control)
        self._set_up_for = None
        self._go()
        if mode is State.SHADOW:
            self._serve()

    def _is_set_up(self, control: GuestControl | None) -> bool:
        """Whether :meth:`stand_by` has set up these queues; what it set up for others is reset."""
        if self._set_up_for is None:
            return False
        set_up, known = self._set_up_for
        if set_up == self._queues and known is control:
            return True
        queues = self._queues
        self.reset()
        self._take(queues)
        return False

    def _stand_by(self, control: GuestControl | None) -> str:
        self._set_up(State.PASSTHROUGH, control)
        self._set_up_for = self._queues, control
        return "its queues are set up; DRIVER_OK and the control queue's state come at the start"

    def _set_up(self, mode: State, control: GuestControl | None) -> None:
        self._begin()
        self._bind_descriptors(mode)
        if control is not None and self.target.groups.control is not None:
            self._set_up_control(control, self.target.groups.control)
        if mode is State.SHADOW:
            self._set_up_shadows()
        else:
            self._set_up_guest_queues()

    def _set_up_guest_queues(self) -> None:
        calls = self.target.chardev.prepare()
        for queue, used in zip(self._queues, self._used_indices(), strict=True):
            set_ring(calls, queue.index, queue.num, used, (queue.desc, queue.avail, queue.used))
            set_eventfds(calls, queue.index, queue.kick, queue.call)
        calls.run()

    def _set_bases(self) -> None:
        """Tell the device from where to go on in rings that it has."""
        calls = self.target.chardev.prepare()
        for queue, used in zip(self._queues, self._used_indices(), strict=True):
            calls.set_vring_base(queue.index, used)
        calls.run()
        if self._control is not None:
            self._control.take_up()

    def _begin(self) -> None:
        if self._translation_lost:
            self.target.iotlb.map_again()
            self._translation_lost = False
        c = self.target.chardev
        c.set_status(READY)
        self._set_features()
        c.set_status(FEATURES_SET)
        self._check_features(c.get_status())

    def _bind_descriptors(self, mode: State) -> None:
        if mode is State.SHADOW and self.ring_asid == OWN_ASID and self.target.groups.descriptors is not None:
            self.target.chardev.set_group_asid(self.target.groups.descriptors, OWN_ASID)

    def _go(self) -> None:
        self._let_run()
        self._serve_control()

    def _let_run(self) -> None:
        """Make the queues ready and set DRIVER_OK.

        Before DRIVER_OK works on every parent (VDUSE looks at its queues
        then). With a control queue the data queues wait until the guest's
        state is back, where the parent can be told late.
        """
        c, control = self.target.chardev, self._control
        late = control is not None and BackendFeature.ENABLE_AFTER_DRIVER_OK in self.target.backend_features
        if control is not None:
            c.set_vring_enable(control.queue.index, True)
        if not late:
            self._enable_data_queues()
        c.set_status(RUNNING)
        self._check_running(c.get_status())
        if control is not None:
            control.replay()
        if late:
            self._enable_data_queues()

    def _enable_data_queues(self) -> None:
        calls = self.target.chardev.prepare()
        for queue in self._queues:
            calls.set_vring_enable(queue.index, True)
        calls.run()

    # -- our own memory in the device ---------------------------------------------

    def _set_up_control(self, guest: GuestControl, group: int) -> None:
        """Place our control queue in its own address space, behind the shadow rings."""
        self.target.chardev.set_group_asid(group, OWN_ASID)
        control = self._make_control(guest)
        area = control.area
        self._ours.append((OWN_ASID, area.iova))
        self.target.iotlb.space(OWN_ASID).map(area.iova, area.hva, area.size)
        index, desc = control.queue.index, area.iova
        addresses = (desc, desc + area.layout.avail_offset, desc + area.device_area)
        calls = self.target.chardev.prepare()
        set_ring(calls, index, area.layout.num, 0, addresses)
        set_eventfds(calls, index, control.kick, control.call)
        calls.run()

    def _set_up_shadows(self) -> None:
        placed = self._map_shadow_rings()
        calls = self.target.chardev.prepare()
        for shadow in self.shadows:
            desc, used = placed[shadow.queue.index]
            addresses = (desc, desc + shadow.layout.avail_offset, used)
            set_ring(calls, shadow.queue.index, shadow.queue.num, 0, addresses)
            set_eventfds(calls, shadow.queue.index, shadow.kick, shadow.call)
        calls.run()

    def _map_shadow_rings(self) -> dict[int, tuple[int, int]]:
        """Map every ring in one batch; driver and device area's IOVA by queue index."""
        placed: dict[int, tuple[int, int]] = {}
        with self.target.iotlb.space(self.ring_asid).batch() as batch:
            for queue in self._queues:
                shadow = self._shadow(queue)
                layout = shadow.layout
                desc = self._allocate(layout.driver_area)
                used = self._allocate(layout.device_area)
                self._ours += [(self.ring_asid, desc), (self.ring_asid, used)]
                placed[queue.index] = (desc, used)
                batch.map(desc, shadow.area, layout.driver_area, Access.RO)
                batch.map(used, shadow.area + layout.driver_area, layout.device_area, Access.RW)
        return placed

    # -- stop -------------------------------------------------------------------

    def _stop(self, then: State | None) -> None:
        self._take_queues()
        self.reset()

    def _take_queues(self) -> None:
        """Bring the guest's rings to where the device stopped; in passthrough they are there, which is checked."""
        if self.state is State.SHADOW:
            self._take_shadow_queues()
        else:
            self._check_guest_queues()

    def _check_guest_queues(self) -> None:
        calls = self.target.chardev.prepare()
        places = [calls.get_vring_base(queue.index) for queue in self._queues]
        calls.run()
        self._check_bases([calls.got(place) for place in places])

    def _check_bases(self, bases: Sequence[int]) -> None:
        assert self._guest_rings is not None
        if not self._guest_rings.hold(bases):
            for queue, base in zip(self._queues, bases, strict=True):
                self._check_base(queue, base)

    def _take_shadow_queues(self) -> None:
        self._stop_serving()
        self._take_over_shadows()

    def _reset(self) -> None:
        """Reset the device and take shadow rings away. Guest memory stays mapped.

        Without IOTLB_PERSIST the device has forgotten its maps; they are
        renewed at the next start, not here, since there may be none.
        """
        self._set_up_for = None
        self.target.chardev.set_status(Status(0))
        self.state = State.RESET
        if BackendFeature.IOTLB_PERSIST not in self.target.backend_features:
            self._translation_lost = True
        self._drop_ours()


def set_ring(calls: PreparedCalls, index: int, num: int, base: int, addresses: tuple[int, int, int]) -> None:
    """Add what gives a queue its size, base and addresses (descriptors, avail ring, used ring)."""
    desc, avail, used = addresses
    calls.set_vring_num(index, num)
    calls.set_vring_base(index, base)
    calls.set_vring_addr(index, desc=desc, avail=avail, used=used)


def set_eventfds(calls: PreparedCalls, index: int, kick: int, call: int) -> None:
    """Add what gives a queue its eventfds."""
    calls.set_vring_kick(index, kick)
    calls.set_vring_call(index, call)
