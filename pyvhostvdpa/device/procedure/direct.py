# SPDX-License-Identifier: MIT
"""The package's own procedure: few calls, guest memory mapped once, own memory in one batch per address space."""

from __future__ import annotations

from collections.abc import Sequence

from ...base.uapi import Access, BackendFeature, Status
from ...chardev.calls import PreparedCalls
from ...chardev.iotlb import GuestMapping
from ...chardev.message import IotlbWriteError
from ...memory.guest import Region
from ...virtqueue.layout import GuestQueue, same_rings
from .. import shadowing
from ..kind import GuestControl
from ..target import FEATURES_SET, GUEST_ASID, OWN_ASID, READY, RUNNING, State, Target
from .base import Procedure


class Direct(Procedure):
    """Maps guest memory at attach, IOVA = GPA, and keeps it mapped."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._translation_lost = False
        self._set_up_for: tuple[Sequence[GuestQueue], GuestControl | None] | None = None
        """What :meth:`stand_by` has set up, if nothing was started since."""

    @property
    def ring_asid(self) -> int:
        """Apart from guest memory if the device can fetch descriptors from there, and they are not the guest's."""
        apart = self.target.separate_descriptors and not self.serving.in_place
        return OWN_ASID if apart else GUEST_ASID

    @staticmethod
    def suited(target: Target) -> str:
        """By their own rings, unless descriptors can have an address space of their own: there a switch maps less.

        The rings of a relay lie beside guest memory, and some drivers tell a
        device of all its memory again then (drivers/vdpa/mlx5/net/mlx5_vnet.c:set_map_data).
        """
        return shadowing.FULL if target.separate_descriptors else shadowing.USED_ALL

    @property
    def follows_memory(self) -> bool:
        """Whether regions can come and go once memory is attached."""
        return True

    def _attached(self) -> None:
        self._map_regions(self.memories.guest.regions)
        self.target.iotlb.space(GUEST_ASID).guest_mapping = GuestMapping.IDENTITY

    def _detach(self) -> None:
        self._unmap_regions(self.memories.guest.regions)
        self.target.iotlb.space(GUEST_ASID).guest_mapping = GuestMapping.NONE

    def _map_regions(self, regions: Sequence[Region]) -> None:
        try:
            with self.target.iotlb.space(GUEST_ASID).batch() as batch:
                for region in regions:
                    batch.map(region.gpa, region.memory.hva, region.size)
        except IotlbWriteError:
            self._unmap_regions(regions)
            raise

    def _unmap_regions(self, regions: Sequence[Region]) -> None:
        space = self.target.iotlb.space(GUEST_ASID)
        if self._translation_lost:
            # what was lost on the way is not in the mirror, and would come back with the next start
            self.target.iotlb.map_again()
            self._translation_lost = False
        mapped = {m.iova for m in space.mappings}
        with space.batch() as batch:
            for region in regions:
                if region.gpa in mapped:
                    batch.unmap(region.gpa, region.size)

    def _inherit_maps(self, before: Procedure) -> None:
        if isinstance(before, Direct):
            # groups were asked for, which takes a reset
            self._translation_lost = BackendFeature.IOTLB_PERSIST not in self.target.backend_features
        else:
            super()._inherit_maps(before)

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
        if same_rings(set_up, self._queues) and known is control:
            return True
        queues = self._queues
        self.reset()
        self._set_queues(queues, control)
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
        """Set the bases from which the device continues in rings that it has."""
        set_up = self._set_up_for[0] if self._set_up_for is not None else ()
        calls = self.target.chardev.prepare()
        for queue, had, used in zip(self._queues, set_up, self._used_indices(), strict=True):
            calls.set_vring_base(queue.index, used)
            if queue is not had:
                set_eventfds(calls, queue.index, queue.kick, queue.call)
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
        state is back, where the parent accepts that late.
        """
        c, control = self.target.chardev, self._control
        late = control is not None and BackendFeature.ENABLE_AFTER_DRIVER_OK in self.target.backend_features
        if control is not None:
            c.set_vring_enable(control.index, True)
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
        index, desc = control.index, area.iova
        addresses = (desc, desc + area.layout.avail_offset, desc + area.device_area)
        calls = self.target.chardev.prepare()
        set_ring(calls, index, area.layout.num, 0, addresses)
        set_eventfds(calls, index, control.kick, control.call)
        calls.run()

    def _set_up_shadows(self) -> None:
        placed = self._map_shadow_rings()
        self._remember_passed()
        calls = self.target.chardev.prepare()
        for shadow in self.shadows:
            shadow.take_up()
            addresses = shadow.addresses(*placed[shadow.queue.index])
            set_ring(calls, shadow.queue.index, shadow.queue.num, shadow.base, addresses)
            set_eventfds(calls, shadow.queue.index, shadow.kick, shadow.call)
        calls.run()

    def _map_shadow_rings(self) -> dict[int, tuple[int, int]]:
        """Map every ring in one batch; driver and device area's IOVA by queue index."""
        placed: dict[int, tuple[int, int]] = {}
        with self.target.iotlb.space(self.ring_asid).batch() as batch:
            for queue in self._queues:
                shadow = self._shadow(queue)
                if shadow.through:
                    placed[queue.index] = (0, 0)
                    continue
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
        if self.written_rings():
            self._check_guest_queues()
        if self.state is State.SHADOW:
            self._take_shadow_queues()

    def _check_guest_queues(self) -> None:
        calls = self.target.chardev.prepare()
        places = [calls.get_vring_base(queue.index) for queue in self.written_rings()]
        calls.run()
        self._check_bases([calls.got(place) for place in places])

    def _check_bases(self, bases: Sequence[int]) -> None:
        rings = self._passed_rings if self.state is State.SHADOW else self._guest_rings
        assert rings is not None
        if not rings.hold(bases):
            for queue, base in zip(rings.queues, bases, strict=True):
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
        self._drop_own_maps()


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
