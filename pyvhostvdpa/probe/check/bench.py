# SPDX-License-Identifier: MIT
"""The device as a rule has it: opened, and with few lines owned, mapped, negotiated, started."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from ...base.errors import KernelError
from ...base.uapi import Access, BackendFeature, IotlbType, Status, names
from ...chardev.door import VhostVdpa
from ...chardev.message import IotlbMessage
from ...memory.guest import DEFAULT_GPA, HUGE_PAGE, PAGE_SIZE
from ...memory.mapped import SharedMemory
from ...memory.pinned import allow_pinning
from ...net.features import Feature
from ...trace.recorder import Trace
from ...virtqueue.layout import SplitLayout
from .facts import Facts, Opener, ask
from .queue import Place, Queue
from .rule import BLOCK, NET, Broken, CannotTell, NotOffered, demand, offered

STARTED = Status.ACKNOWLEDGE | Status.DRIVER
READY = STARTED | Status.FEATURES_OK
RUNNING = READY | Status.DRIVER_OK
SIZE = HUGE_PAGE
"""Bytes of the memory that a rule gets: little, since all of it is allocated, and pinned, for each rule."""
PATIENCE_S = 3.0
"""Seconds that a device may take for what it must do."""
LACKING = (errno.EOPNOTSUPP, errno.ENOTTY)
"""What a request gives that the parent lacks, or the kernel: one that is older than the request does not know it."""
REST_S = 0.06
"""How long a device is watched doing nothing."""
RING = 64
"""The ring size where a rule does not care, if the device can do it."""


class Arena:
    """Memory for rings and buffers, handed out from its start; mapped as a whole at ``iova``."""

    def __init__(self, iova: int, size: int = SIZE) -> None:
        self.iova, self.memory, self._next = iova, SharedMemory("check", size), 0

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return self.memory.size

    @property
    def all(self) -> Place:
        """All of it as one place."""
        return Place(self.iova, 0, self.size, self.memory)

    def allocate(self, size: int, align: int = PAGE_SIZE) -> Place:
        """Allocate ``size`` bytes."""
        at = -(-self._next // align) * align
        if at + size > self.size:
            raise CannotTell(f"the rule needs more than {self.size} bytes of memory")
        self._next = at + size
        return Place(self.iova + at, at, size, self.memory)


class Bench:
    """A freshly opened device for one rule, or (as a context manager) for a script.

    ``facts`` are asked for if they are not given. ``may_write`` allows the
    rules to write to a disk. Raises what opening raises.
    """

    def __init__(
        self, path: str, facts: Facts | None = None, opener: Opener = VhostVdpa, may_write: bool = False
    ) -> None:
        self.facts = facts or ask(path, opener)
        self.path, self.opener, self.may_write = path, opener, may_write
        self.trace = Trace()
        """Every call that was made on the device."""
        self._stack = ExitStack()
        self.c: VhostVdpa = opener(path, self.trace)
        self._stack.callback(self.c.close)
        self._arenas: dict[int, Arena] = {}
        self.queues: list[Queue] = []

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the device, then give memory and eventfds back."""
        self.c.close()
        for queue in self.queues:
            queue.close()
        self.queues.clear()
        self._stack.close()
        for arena in self._arenas.values():
            arena.memory.close()
        self._arenas.clear()

    def reopen(self) -> VhostVdpa:
        """Close the device and open it again."""
        self.c.close()
        self.c = self.opener(self.path, self.trace)
        self._stack.callback(self.c.close)
        return self.c

    # -- what a device offers -----------------------------------------------------------

    def needs(self, *features: BackendFeature) -> None:
        """Raise :class:`NotOffered` unless the parent offers these backend features."""
        for feature in features:
            offered(feature in self.facts.backend, f"the parent does not offer {feature.name}")

    def needs_feature(self, feature: Feature) -> None:
        """Raise :class:`NotOffered` unless the device offers this feature bit."""
        offered(feature in self.facts.offered, f"the device does not offer {feature.name}")

    def needs_address_spaces(self, count: int = 2) -> None:
        """Raise :class:`NotOffered` unless there are so many address spaces, and groups that can be bound to them."""
        offered(self.facts.as_num >= count, f"the device has {self.facts.as_num} address spaces")
        offered(self.facts.groups is not None, "the parent does not implement get_vq_group")

    def needs_second_space(self) -> None:
        """Raise :class:`NotOffered` on a device with one address space."""
        offered(self.facts.as_num >= 2, "the device has one address space")

    def needs_pinning(self) -> None:
        """Raise :class:`NotOffered` unless the parent is known to pin memory."""
        unpinned = self.facts.pinned is False
        why = "the parent works on user addresses" if unpinned else "whether the parent pins is unknown"
        offered(self.facts.pinned, why)

    def needs_control(self) -> int:
        """Return the control queue's index; :class:`NotOffered` without one."""
        index = self.facts.control
        if index is None:
            raise NotOffered("the device does not have a control queue")
        if index >= self.facts.vqs_count:
            raise Broken(f"the control queue would be queue {index}, the device has {self.facts.vqs_count}")
        return index

    # -- steps to a running device -------------------------------------------------------

    def own(self, backend: BackendFeature | None = None) -> VhostVdpa:
        """Take the backend features offered (or these), and the ownership."""
        self.c.set_backend_features(self.facts.backend if backend is None else backend)
        self.c.set_owner()
        return self.c

    def negotiate(self, features: int | None = None) -> None:
        """Bring the device from a reset to FEATURES_OK."""
        wanted = int(self.facts.features) if features is None else features
        self.c.set_status(STARTED)
        self.c.set_features(wanted)
        self.c.set_status(READY)
        status = self.c.get_status()
        demand(Status.FEATURES_OK in status, f"FEATURES_OK was not accepted: status {names(status)}")

    def prepare(self, features: int | None = None) -> None:
        """Own the device, map the memory, and negotiate: what comes before queues."""
        self.own()
        self.map()
        self.negotiate(features)

    def restart(self) -> None:
        """Reset, map again and negotiate: without IOTLB_PERSIST a parent may forget its maps over a reset."""
        self.reset()
        self.unmap()
        self.map()
        self.negotiate()

    def arena(self, number: int = 0, size: int = SIZE) -> Arena:
        """Return the memory of this number, of ``size`` bytes when it is new; all of them lie at the same IOVA."""
        if number not in self._arenas:
            self._arenas[number] = Arena(self.iova, size)
        return self._arenas[number]

    def memory_at(self, iova: int, size: int = HUGE_PAGE) -> Arena:
        """Return more memory, to be mapped at ``iova``; it is given back with the device."""
        arena = Arena(iova, size)
        self._stack.callback(arena.memory.close)
        return arena

    @property
    def iova(self) -> int:
        """Where :meth:`arena` is mapped."""
        at = max(int(DEFAULT_GPA), -(-self.facts.first // HUGE_PAGE) * HUGE_PAGE)
        if at + SIZE - 1 > self.facts.last:
            at = max(-(-self.facts.first // HUGE_PAGE), 1) * HUGE_PAGE
        if at + SIZE - 1 > self.facts.last:
            raise CannotTell(f"the IOVA range {self.facts.first:#x}-{self.facts.last:#x} is too small")
        return at

    def map(self, arena: Arena | None = None, asid: int = 0) -> None:
        """Map memory in a batch of its own."""
        arena = arena or self.arena()
        allow_pinning(arena.size)
        self.message(IotlbType.BATCH_BEGIN, asid)
        self.message(IotlbType.UPDATE, asid, arena.iova, arena.size, arena.memory.hva)
        self.message(IotlbType.BATCH_END, asid)

    def unmap(self, arena: Arena | None = None, asid: int = 0) -> None:
        """Unmap memory in a batch of its own."""
        arena = arena or self.arena()
        self.message(IotlbType.BATCH_BEGIN, asid)
        self.message(IotlbType.INVALIDATE, asid, arena.iova, arena.size)
        self.message(IotlbType.BATCH_END, asid)

    def message(
        self, kind: IotlbType, asid: int = 0, iova: int = 0, size: int = 0, uaddr: int = 0, perm: Access = Access.RW
    ) -> None:
        """Write one IOTLB message as it is."""
        self.c.write_iotlb([IotlbMessage(kind, asid, iova, size, uaddr, int(perm))])

    def update(self, place: Place, asid: int = 0, perm: Access = Access.RW) -> None:
        """Map one place by an UPDATE without a batch."""
        allow_pinning(place.size)
        self.message(IotlbType.UPDATE, asid, place.iova, place.size, place.hva, perm)

    def ring_size(self, *indices: int, most: int = RING) -> int:
        """Return a ring size that these queues can have, at most ``most`` unless their smallest is larger."""
        sizes = [self.facts.ring_sizes[i] for i in indices if i < len(self.facts.ring_sizes)]
        return max(self.facts.ring_least, min([most, *(sizes or [self.facts.ring_max])]))

    def queue(self, index: int, num: int | None = None, base: int = 0, arena: Arena | None = None) -> Queue:
        """Return queue ``index`` with a ring of its own; the device does not know of it before :meth:`set_up`."""
        num = num or self.ring_size(index)
        queue = Queue(index, num, (arena or self.arena()).allocate(SplitLayout(num).size), base)
        self.queues.append(queue)
        return queue

    def set_up(self, queue: Queue, base: int | None = 0, enable: bool = True) -> None:
        """Give the device a queue: NUM, BASE (not with None), ADDR, KICK, CALL, and enable it."""
        c = self.c
        c.set_vring_num(queue.index, queue.num)
        if base is not None:
            self.set_base(queue.index, base)
        c.set_vring_addr(queue.index, queue.desc, queue.avail, queue.used)
        c.set_vring_kick(queue.index, queue.kick_fd)
        c.set_vring_call(queue.index, queue.call_fd)
        if enable:
            c.set_vring_enable(queue.index, True)

    def bind(self, groups: Mapping[int, int]) -> None:
        """Bind groups to address spaces."""
        for group, asid in groups.items():
            self.c.set_group_asid(group, asid)

    def driver_ok(self) -> None:
        """Write DRIVER_OK and read it back."""
        self.c.set_status(RUNNING)
        status = self.c.get_status()
        demand(
            Status.DRIVER_OK in status and Status.NEEDS_RESET not in status,
            f"DRIVER_OK was not accepted: status {names(status)}",
        )

    def reset(self) -> None:
        """Write status 0."""
        self.c.set_status(Status(0))

    # -- what rules ask again and again ---------------------------------------------------

    def errno_of(self, act: Callable[[], object]) -> int:
        """Return what the kernel answers: 0, or the errno."""
        try:
            act()
        except KernelError as e:
            return e.errno or 0
        return 0

    def refused(self, act: Callable[[], object], numbers: Sequence[int], what: str) -> str:
        """Demand that a request is refused with one of these errnos; return with which."""
        got = self.errno_of(act)
        wanted = " or ".join(os.strerror(n) for n in numbers)
        demand(got, f"{what}: accepted, and should be refused ({wanted})")
        demand(got in numbers, f"{what}: {os.strerror(got)}, not {wanted}")
        return f"{what}: {os.strerror(got)}"

    def refused_by_core(self, act: Callable[[], object], what: str) -> str:
        """Demand EINVAL for what newer kernels refuse; :class:`CannotTell` on one that leaves it to the parent.

        vhost_vdpa compares with DRIVER_OK and its note of a suspension since Linux 6.9.
        """
        if not (number := self.errno_of(act)):
            raise CannotTell(f"{what}: accepted; this kernel leaves it to the parent, newer ones refuse it with EINVAL")
        demand(number == errno.EINVAL, f"{what}: {os.strerror(number)}, not {os.strerror(errno.EINVAL)}")
        return f"{what}: {os.strerror(number)}"

    def status_becomes(self, bits: Status, seconds: float = PATIENCE_S) -> bool:
        """Wait until the status has these bits."""
        end = time.monotonic() + seconds
        while not self.c.get_status() & bits:
            if time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True

    @property
    def group_of(self) -> tuple[int, ...]:
        """The queues' groups; :class:`NotOffered` where the parent has none."""
        if self.facts.groups is None:
            raise NotOffered("the parent does not implement get_vq_group")
        return self.facts.groups

    def base(self, queue: int) -> int:
        """Return a queue's base; :class:`NotOffered` for a parent that cannot return it."""
        try:
            return self.c.get_vring_base(queue)
        except KernelError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise
            raise NotOffered("the parent cannot return a queue's base (get_vq_state)") from e

    def set_base(self, queue: int, base: int) -> None:
        """Set a queue's base; :class:`NotOffered` for a parent that starts at 0 only."""
        try:
            self.c.set_vring_base(queue, base)
        except KernelError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise
            raise NotOffered("the parent starts queues at 0 only (set_vq_state)") from e

    def kind_needed(self) -> None:
        """Raise :class:`CannotTell` for a kind of device without a test driver in this package."""
        if self.facts.device_id not in (NET, BLOCK):
            raise CannotTell(f"this package does not have a test driver for {self.facts.kind}")
