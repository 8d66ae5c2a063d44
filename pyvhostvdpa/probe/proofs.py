# SPDX-License-Identifier: MIT
"""What a device really does, found out with descriptors of our own.

A feature bit is a claim: three are always set, a batch that failed is silent
(drivers/vhost/vdpa.c:vhost_vdpa_process_iotlb_msg), and SUSPEND succeeds on a
device that does nothing. So each proof puts a small guest on the device and
looks at what its rings say: they move, or they do not.

Nothing is ever left unmapped under a running queue: some parents reach
physical memory through an address space without maps
(drivers/vdpa/vdpa_sim/vdpa_sim.c:vdpasim_reset_map). What must not be
reached is other memory, mapped at the same IOVA.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from .._cdefs import ffi, lib
from ..base.errors import MissingFeature, NotProved, VhostVdpaError
from ..base.uapi import BackendFeature, Status, names
from ..chardev.door import VhostVdpa
from ..chardev.iotlb import Iotlb, Limits
from ..guest.nic import FRAME_BUFFER, GuestNic, NicOptions, NicPair
from ..memory.guest import DEFAULT_GPA, HUGE_PAGE, Gpa, GuestMemory
from ..net.features import Feature
from ..virtqueue.layout import GuestQueue, indices

GUEST_SIZE = 2 * HUGE_PAGE
MUST_MOVE_S = 3.0
"""Seconds that a device may take to do what it must, unless another patience is asked for."""
MUST_REST_S = 0.15
"""How long a device is watched doing nothing."""
FRAMES = 8
"""Frames per proof on a device that sends them away instead of back."""
_SLICE_NS = 10_000_000
_STARTED = Status.ACKNOWLEDGE | Status.DRIVER
_READY = _STARTED | Status.FEATURES_OK


@dataclass(frozen=True, slots=True)
class Proof:
    """Whether a feature did what it says, and what was seen."""

    feature: BackendFeature
    holds: bool
    seen: str


@dataclass(frozen=True, slots=True)
class Subject:
    """The device to prove things of: what to negotiate, and where its queues' groups are.

    ``patience`` is how many seconds it may take to do what it must: a slow device does not lie.
    """

    chardev: VhostVdpa
    features: Feature
    usable: BackendFeature
    limits: Limits
    data_groups: frozenset[int]
    desc_groups: frozenset[int]
    ring_size: int
    patience: float = MUST_MOVE_S


class ProofGuest:
    """One RX/TX pair in memory of its own; ``buffers`` may lie in other memory at the same addresses."""

    def __init__(
        self,
        rings: GuestMemory,
        ring_size: int,
        buffers: GuestMemory | None = None,
        patience: float = MUST_MOVE_S,
    ) -> None:
        self.memory, self.patience = rings, patience
        self.nic = GuestNic(rings, NicOptions(ring_size=ring_size, frame_size=64))
        self.pair: NicPair = self.nic.pairs[0]
        self.c: Any = self.pair.c
        if buffers is not None:
            size = ring_size * FRAME_BUFFER
            self.c.rx_hva = ffi.cast("uint8_t *", buffers.hva(self.c.rx_gpa, size))
            self.c.tx_hva = ffi.cast("uint8_t *", buffers.hva(self.c.tx_gpa, size))

    @property
    def queues(self) -> tuple[GuestQueue, GuestQueue]:
        """RX, then TX."""
        return self.pair.queues

    def used(self) -> tuple[int, int]:
        """Return both used indices: what the device has finished."""
        rx, tx = self.queues
        return indices(rx, self.memory)[1], indices(tx, self.memory)[1]

    def work(self, seconds: float, enough: Callable[[], bool]) -> bool:
        """Send and receive until it is ``enough``; False if ``seconds`` pass first."""
        # a device that does not loop back gets a few frames a time, no more
        self.c.window = self.c.sent - self.c.received + FRAMES
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            lib.nic_run(self.c, time.monotonic_ns() + _SLICE_NS)
            if enough():
                return True
        return False

    def moves(self) -> str:
        """Return what moved; :class:`NotProved` if the device finishes no TX descriptor."""
        before, received = self.used(), self.c.received
        if not self.work(self.patience, lambda: self.used()[1] != before[1]):
            raise NotProved(f"no descriptor was finished within {self.patience:g} s")
        self.work(MUST_REST_S, lambda: bool(self.c.received > received))
        if self.c.corrupted or self.c.ring_errors:
            raise NotProved(f"{self.c.corrupted + self.c.ring_errors} frames came back with other bytes")
        back = self.c.received - received
        finished = (self.used()[1] - before[1]) & 0xFFFF
        return (
            f"{finished} descriptors finished, {back} frames came back whole"
            if back
            else (f"{finished} descriptors finished; frames went out and not back")
        )

    def rests(self) -> None:
        """Kick and watch; :class:`NotProved` if anything moves."""
        before = self.used()
        if self.work(MUST_REST_S, lambda: self.used() != before):
            raise NotProved("descriptors were finished where none may be")

    def close(self) -> None:
        """Close its eventfds."""
        self.nic.close()


class Bench:
    """The device with maps and guests, from one reset to the next."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.c = subject.chardev
        self.iotlb = Iotlb(self.c, subject.limits)
        self._stack = ExitStack()
        self.gpa = _free_gpa(subject.limits)

    def memory(self) -> GuestMemory:
        """Return new guest memory; all of it lies at the same addresses."""
        return self._stack.enter_context(GuestMemory([(self.gpa, GUEST_SIZE)]))

    def guest(self, rings: GuestMemory, buffers: GuestMemory | None = None) -> ProofGuest:
        """Return a guest in ``rings``."""
        guest = ProofGuest(rings, self.subject.ring_size, buffers, self.subject.patience)
        self._stack.callback(guest.close)
        return guest

    def map(self, memory: GuestMemory, asid: int = 0, batched: bool = True) -> None:
        """Map memory, IOVA = GPA, in place of what is there."""
        space = self.iotlb.space(asid)
        region = memory.regions[0]
        if not batched:
            space.map(region.gpa, region.memory.hva, region.size)
            return
        with space.batch() as batch:
            for old in space.mappings:
                batch.unmap(old.iova, old.size)
            batch.map(region.gpa, region.memory.hva, region.size)

    def reset(self) -> None:
        """Reset the device."""
        self.c.set_status(Status(0))

    def start(
        self, guest: ProofGuest, groups: Mapping[int, int] | None = None, renew: bool = True, enable: bool = True
    ) -> None:
        """Reset and start the device on a guest's queues, each group in its address space.

        ``renew`` writes the maps again after the reset, for devices that forget them.
        """
        c = self.c
        self.reset()
        if renew:
            self.iotlb.map_again()
        c.set_status(_STARTED)
        c.set_features(int(self.subject.features))
        c.set_status(_READY)
        if not c.get_status() & Status.FEATURES_OK:
            raise MissingFeature(f"{c.path} refused the features {names(self.subject.features)}")
        for group, asid in (groups or {}).items():
            c.set_group_asid(group, asid)
        for queue in guest.queues:
            self._set_up(guest, queue, enable)
        c.set_status(_READY | Status.DRIVER_OK)
        self.kick(guest)

    def _set_up(self, guest: ProofGuest, queue: GuestQueue, enable: bool) -> None:
        c = self.c
        c.set_vring_num(queue.index, queue.num)
        c.set_vring_base(queue.index, indices(queue, guest.memory)[1])
        c.set_vring_addr(queue.index, queue.desc, queue.avail, queue.used)
        c.set_vring_kick(queue.index, queue.kick)
        c.set_vring_call(queue.index, queue.call)
        if enable:
            c.set_vring_enable(queue.index, True)

    def kick(self, guest: ProofGuest) -> None:
        """Notify both queues."""
        for queue in guest.queues:
            os.eventfd_write(queue.kick, 1)

    def close(self) -> None:
        """Reset, unmap, give the memory back."""
        try:
            self.reset()
            for asid in range(self.subject.limits.as_num):
                space = self.iotlb.space(asid)
                with space.batch() as batch:
                    for mapping in space.mappings:
                        batch.unmap(mapping.iova, mapping.size)
        finally:
            self._stack.close()


def _free_gpa(limits: Limits) -> Gpa:
    first = max(DEFAULT_GPA, -(-limits.first // HUGE_PAGE) * HUGE_PAGE)
    if first + GUEST_SIZE - 1 <= limits.last:
        return Gpa(first)
    low = max(-(-limits.first // HUGE_PAGE), 1) * HUGE_PAGE
    if low + GUEST_SIZE - 1 > limits.last:
        raise MissingFeature(f"the IOVA range {limits.first:#x}-{limits.last:#x} is too small for a proof")
    return Gpa(low)


def _map(bench: Bench) -> str:
    memory = bench.memory()
    guest = bench.guest(memory)
    bench.map(memory, batched=False)
    bench.start(guest)
    return f"through one UPDATE: {guest.moves()}"


def _batch(bench: Bench) -> str:
    old, new = bench.memory(), bench.memory()
    guest = bench.guest(new)
    bench.map(old)
    bench.map(new)
    bench.start(guest)
    return f"unmapped and mapped again in one batch: {guest.moves()}"


def _asid(bench: Bench) -> str:
    guests = []
    for asid in (0, 1):
        memory = bench.memory()
        bench.map(memory, asid)
        guests.append(bench.guest(memory))
    for asid, guest in enumerate(guests):
        other = guests[1 - asid]
        bench.reset()
        before = other.used()
        bench.start(guest, dict.fromkeys(bench.subject.data_groups | bench.subject.desc_groups, asid))
        guest.moves()
        if other.used() != before:
            raise NotProved(f"bound to ASID {asid}, the device wrote to the memory mapped in ASID {1 - asid}")
    return "the same IOVA led to other memory in ASID 0 and in ASID 1"


def _suspend(bench: Bench) -> str:
    guest = _running(bench)
    bench.c.suspend()
    guest.rests()
    rx, tx = guest.queues
    bases = [bench.c.get_vring_base(queue.index) for queue in (rx, tx)]
    guest.rests()
    if bases != [bench.c.get_vring_base(queue.index) for queue in (rx, tx)]:
        raise NotProved("the bases moved while suspended")
    avail, used = indices(tx, guest.memory)
    return f"nothing moved while suspended; TX base {bases[1]}, used index {used}, avail index {avail}"


def _resume(bench: Bench) -> str:
    guest = _running(bench)
    bench.c.suspend()
    guest.rests()
    bench.c.resume()
    bench.kick(guest)
    return f"after suspend and resume: {guest.moves()}"


def _running(bench: Bench) -> ProofGuest:
    memory = bench.memory()
    guest = bench.guest(memory)
    bench.map(memory)
    bench.start(guest)
    guest.moves()
    return guest


def _enable_late(bench: Bench) -> str:
    memory = bench.memory()
    guest = bench.guest(memory)
    bench.map(memory)
    bench.start(guest, enable=False)
    guest.rests()
    for queue in guest.queues:
        bench.c.set_vring_enable(queue.index, True)
    bench.kick(guest)
    return f"queues enabled after DRIVER_OK, at rest until then: {guest.moves()}"


def _persist(bench: Bench) -> str:
    guest = _running(bench)
    bench.start(guest, renew=False)
    return f"after a reset, nothing mapped again: {guest.moves()}"


def _desc_asid(bench: Bench) -> str:
    rings, buffers = bench.memory(), bench.memory()
    guest = bench.guest(rings, buffers)
    bench.map(buffers, 0)
    bench.map(rings, 1)
    data = dict.fromkeys(bench.subject.data_groups, 0)
    bench.start(guest, {**data, **dict.fromkeys(bench.subject.desc_groups, 0)})
    guest.rests()
    bench.start(guest, {**data, **dict.fromkeys(bench.subject.desc_groups, 1)})
    return f"rings in ASID 1 only, buffers in ASID 0 only: {guest.moves()}"


_PROOFS: tuple[tuple[BackendFeature, Callable[[Bench], str]], ...] = (
    (BackendFeature.IOTLB_MSG_V2, _map),
    (BackendFeature.IOTLB_BATCH, _batch),
    (BackendFeature.IOTLB_ASID, _asid),
    (BackendFeature.SUSPEND, _suspend),
    (BackendFeature.RESUME, _resume),
    (BackendFeature.ENABLE_AFTER_DRIVER_OK, _enable_late),
    (BackendFeature.DESC_ASID, _desc_asid),
    (BackendFeature.IOTLB_PERSIST, _persist),
)


@contextmanager
def _bench(subject: Subject) -> Iterator[Bench]:
    bench = Bench(subject)
    try:
        yield bench
    finally:
        bench.close()


def prove(subject: Subject) -> Sequence[Proof]:
    """Try each usable feature on an open, owned device and return what was seen. Leaves the device reset.

    Sends a few broadcast frames of an experimental EtherType (0x88b5) per
    feature. What a feature does wrong is its proof's ``seen``; what keeps all
    of them from being tried is raised.
    """
    found = []
    for feature, proof in _PROOFS:
        if feature in subject.usable:
            found.append(_try(subject, feature, proof))
    return found


def _try(subject: Subject, feature: BackendFeature, proof: Callable[[Bench], str]) -> Proof:
    with _bench(subject) as bench:
        try:
            return Proof(feature, True, proof(bench))
        except VhostVdpaError as e:
            return Proof(feature, False, str(e))
