"""What tracing costs: the same switches with the door as it is, and with one that keeps no record."""

from __future__ import annotations

import fcntl
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import hwsim
import pytest
from hw_guest import HwGuest

import pyvhostvdpa.device.opened
from pyvhostvdpa import Trace, VhostVdpa
from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.uapi import IOCTLS, BackendFeature, MessageFormat
from pyvhostvdpa.chardev.message import IotlbMessage
from pyvhostvdpa.net.features import CONTROL, SUPPORTED
from pyvhostvdpa.trace.recorder import DeviceTrace, Fields

PAIRS = 2
ROUNDS = 7
LIMIT = 0.02


class Marks(DeviceTrace):
    """Records begin and end of each phase as well."""

    def __init__(self, name: str) -> None:
        super().__init__(Trace(), name)
        self.marks: dict[str, tuple[int, int]] = {}

    @contextmanager
    def in_phase(self, phase: str) -> Iterator[None]:
        begin = time.monotonic_ns()
        with super().in_phase(phase):
            yield
        self.marks[phase] = (begin, time.monotonic_ns())


class OnlyMarks(Marks):
    """Records nothing else."""

    def record(self, t_begin: int, t_end: int, event: str, fields: Fields, result: int | None) -> None:
        pass

    def note(self, event: str, **fields: int | str) -> None:
        pass


class TracedDoor(VhostVdpa):
    """The door as it is."""

    def __init__(self, path: str, trace: Trace | None = None) -> None:
        super().__init__(path, trace)
        self.trace: Marks = Marks(path)


class BareDoor(VhostVdpa):
    """Makes the same calls and keeps no record of them."""

    def __init__(self, path: str, trace: Trace | None = None) -> None:
        super().__init__(path, trace)
        self.trace: Marks = OnlyMarks(path)

    def _ioctl(self, name: str, argument: bytearray | None = None, fields: Fields | None = None) -> int:
        return int(fcntl.ioctl(self.fileno(), IOCTLS[name].request, 0 if argument is None else argument))

    def write_iotlb(self, messages: Sequence[IotlbMessage], form: MessageFormat = MessageFormat.V2) -> None:
        raw = ffi.new("struct vhost_msg_v2[]", len(messages))
        for slot, m in zip(raw, messages, strict=True):
            slot.type, slot.asid = form, m.asid
            slot.iotlb.iova, slot.iotlb.size, slot.iotlb.uaddr = m.iova, m.size, m.uaddr
            slot.iotlb.perm, slot.iotlb.type = m.perm, m.type
        times, error = ffi.new("int64_t[]", 2 * len(messages)), ffi.new("int *")
        assert lib.iotlb_write_burst(self.fileno(), raw, len(messages), times, error) == len(messages)
        self._follow_batch(messages)


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, type[VhostVdpa]], HwGuest]]:
    made: list[HwGuest] = []

    def make(name: str, door: type[VhostVdpa]) -> HwGuest:
        monkeypatch.setattr(pyvhostvdpa.device.opened, "VhostVdpa", door)
        sim = hwsim.add(name, PAIRS, mem_scale=512)
        made.append(HwGuest(sim, PAIRS, SUPPORTED | CONTROL, BackendFeature(0), procedure="direct"))
        return made[-1]

    yield make
    for each in made:
        each.close()
        hwsim.remove(each.sim.name)


def switch_and_stop(guest: HwGuest) -> dict[str, int]:
    """DT1 and DT2 of one round, ns, by the marks."""
    trace = guest.device.trace
    assert isinstance(trace, Marks)
    guest.switch_and_stop()
    marks = trace.marks
    return {"DT1": marks["dt1.start"][1] - marks["dt1.stop"][0], "DT2": marks["dt2.stop"][1] - marks["dt2.stop"][0]}


def measure(guests: Sequence[HwGuest], profile: str) -> list[dict[str, float]]:
    """The medians of each guest's DT1 and DT2, taken in turns."""
    for guest in guests:
        guest.sim.write("cost/profile", profile)
    rounds = [[switch_and_stop(guest) for guest in guests] for _ in range(ROUNDS)]
    return [
        {name: statistics.median(each[place][name] for each in rounds) for name in ("DT1", "DT2")}
        for place in range(len(guests))
    ]


def test_tracing_takes_less_than_2_percent_of_a_downtime(guest: Callable[..., HwGuest]) -> None:
    """With the costs of both profiles; without costs it is printed."""
    bare, traced = guest("bare", BareDoor), guest("traced", TracedDoor)
    found: dict[tuple[str, str], float] = {}
    for profile in ("none", "mlx5-2025", "series-2023"):
        without, with_trace = measure([bare, traced], profile)
        for name in ("DT1", "DT2"):
            found[profile, name] = with_trace[name] / without[name] - 1
            print(
                f"{profile:<12} {name}: {without[name] / 1e6:9.3f} ms bare, {with_trace[name] / 1e6:9.3f} ms traced: "
                f"{100 * found[profile, name]:+.2f} %"
            )
    events = traced.device.trace._trace.events
    per_round = len(events) / (3 * ROUNDS)
    print(f"{per_round:.0f} events a round")
    assert per_round > 100
    assert all(share < LIMIT for (profile, _), share in found.items() if profile != "none"), found
