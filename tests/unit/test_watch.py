"""From the kernel's pages to events: the buffer's format, calls put together by thread, and what is in the way."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from traces import MS, A
from vmm import Vmm, stop_for_good, switch

from pyvhostvdpa.base.errors import VhostVdpaError
from pyvhostvdpa.base.uapi import IOCTLS
from pyvhostvdpa.trace import clocks, live, tracefs
from pyvhostvdpa.trace.narrate import Narrator
from pyvhostvdpa.trace.recorder import Event, Trace
from pyvhostvdpa.trace.ringbuffer import Decoder, Format, Record
from pyvhostvdpa.trace.sessions import Followers
from pyvhostvdpa.trace.watch import CALLER, Assembler, Surroundings

FORMAT = """\
name: ioctl
ID: 1663
format:
	field:unsigned short common_type;	offset:0;	size:2;	signed:0;
	field:unsigned char common_flags;	offset:2;	size:1;	signed:0;
	field:unsigned char common_preempt_count;	offset:3;	size:1;	signed:0;
	field:int common_pid;	offset:4;	size:4;	signed:1;

	field:unsigned long __probe_ip;	offset:8;	size:8;	signed:0;
	field:u32 rdev;	offset:16;	size:4;	signed:0;
	field:s64 ret;	offset:20;	size:8;	signed:1;
	field:__data_loc char[] comm;	offset:28;	size:4;	signed:1;

print fmt: "(%lx) rdev=%u", REC->__probe_ip, REC->rdev
"""


def record(pid: int, rdev: int, ret: int, comm: bytes = b"qemu\0") -> bytes:
    fixed = struct.pack("=HBBiQIqI", 1663, 0, 0, pid, 0, rdev, ret, 32 | len(comm) << 16)
    return (fixed + comm).ljust(40, b"\0")


def entry(delta: int, data: bytes) -> bytes:
    return struct.pack("=I", len(data) // 4 | delta << 5) + data


def page(t: int, *entries: bytes, flags: int = 0) -> bytes:
    data = b"".join(entries)
    return (struct.pack("=QQ", t, len(data) | flags) + data).ljust(4096, b"\0")


def decoder() -> Decoder:
    return Decoder([Format("ioctl", FORMAT)])


def test_records_have_their_thread_values_and_times() -> None:
    found = list(decoder().page(page(1000, entry(5, record(77, 3, -14)), entry(7, record(78, 4, 0, b"x\0")))))
    assert [(r.t, r.thread, r.name, r.values["rdev"], r.values["ret"], r.values["comm"]) for r in found] == [
        (1005, 77, "ioctl", 3, -14, "qemu"),
        (1012, 78, "ioctl", 4, 0, "x"),
    ]


def test_long_times_padding_and_foreign_records_are_followed() -> None:
    extend = struct.pack("=II", 30 | 1 << 5, 2)
    absolute = struct.pack("=II", 31 | 9 << 5, 1)
    discarded = struct.pack("=II", 29 | 3 << 5, 12) + bytes(8)
    long = struct.pack("=II", 0 | 4 << 5, 44) + record(79, 5, 0)
    foreign = entry(1, struct.pack("=HBBi", 9, 0, 0, 1))
    entries = (entry(0, record(77, 3, 0)), extend, entry(1, record(77, 3, 0)), discarded, long, foreign, absolute,
               entry(1, record(77, 3, 0)), struct.pack("=I", 29))  # fmt: skip
    top = 1 << 60
    times = [r.t - top for r in decoder().page(page(top + 100, *entries))]
    second = 100 + 1 + (2 << 27) + 1
    assert times == [100, second, second + 3 + 4, (1 << 27) + 9 + 1]


def test_dropped_records_are_counted_from_the_page_header() -> None:
    one = entry(0, record(77, 3, 0))
    counting = decoder()
    stored = bytearray(page(1, one, flags=1 << 31 | 1 << 30))
    stored[16 + len(one) : 24 + len(one)] = struct.pack("=q", 17)
    assert len(list(counting.page(bytes(stored)))) == 1
    assert counting.missed == 17
    list(counting.page(page(1, one, flags=1 << 31)))
    assert counting.missed == 18


def test_format_without_an_id_is_refused() -> None:
    with pytest.raises(ValueError, match="no ID"):
        Format("ioctl", "name: ioctl\n")


# -- calls ---------------------------------------------------------------------


RDEV = 244 << 20


class Kernel:
    """Writes records as the probes do."""

    def __init__(self) -> None:
        self.t = 1_000
        self.records: list[Record] = []

    def put(self, name: str, thread: int, **values: int | str) -> None:
        self.t += 10
        self.records.append(Record(self.t, thread, name, dict(values)))

    def ioctl(self, name: str, thread: int, argument: bytes = b"", ret: int = 0, rdev: int = RDEV) -> None:
        words = struct.unpack("=4Q", argument.ljust(32, b"\0"))
        self.put("ioctl", thread, rdev=rdev, cmd=IOCTLS[name].request)
        self.put("ioctl_end", thread, ret=ret, **{f"a{place}": word for place, word in enumerate(words)})

    def message(self, thread: int, ret: int = 72, **values: int) -> None:
        self.put("write", thread, rdev=RDEV, count=72)
        if values:
            self.put("message", thread, **({"asid": 0, "iova": 0, "size": 0, "uaddr": 0, "perm": 0} | values))
        self.put("write_end", thread, ret=ret)

    def open(self, thread: int, ret: int = 0) -> None:
        self.put("open", thread, rdev=RDEV, comm="qemu")
        self.put("open_end", thread, ret=ret)


def assembler(wanted: Callable[[str, int], bool] = lambda device, pid: True) -> Assembler:
    """Threads of one process have the same tens."""
    return Assembler(Surroundings(lambda thread: thread // 10 * 10, lambda pid, file: "", wanted))


def events(kernel: Kernel) -> list[tuple[str, dict[str, int | str], int | None]]:
    return [(e.event, dict(e.fields), e.result) for e in assembler().events(kernel.records)]


def test_arguments_are_named_as_the_door_names_them() -> None:
    kernel = Kernel()
    kernel.open(100)
    kernel.ioctl("VHOST_GET_FEATURES", 100, struct.pack("=Q", 0x300CB182B))
    kernel.ioctl("VHOST_SET_VRING_ADDR", 100, struct.pack("=IIQQQ", 1, 0, 0x1000, 0x3000, 0x2000))
    kernel.ioctl("VHOST_SET_VRING_CALL", 100, struct.pack("=Ii", 1, -1))
    kernel.ioctl("VHOST_GET_VRING_BASE", 100, struct.pack("=II", 1, 77))
    kernel.ioctl("VHOST_SET_VRING_NUM", 100, struct.pack("=II", 99, 4), -105)
    kernel.ioctl("VHOST_VDPA_GET_VRING_SIZE", 100, struct.pack("=II", 99, 4), -95)
    kernel.ioctl("VHOST_VDPA_GET_STATUS", 100, b"\x0f")
    kernel.ioctl("VHOST_VDPA_GET_STATUS", 100, b"\x0f", -5)
    kernel.ioctl("VHOST_VDPA_GET_CONFIG", 100, struct.pack("=II6s", 0, 6, b"abcdef"))
    kernel.ioctl("VHOST_VDPA_GET_IOVA_RANGE", 100, struct.pack("=QQ", 0, (1 << 64) - 1))
    kernel.ioctl("VHOST_SET_MEM_TABLE", 100, struct.pack("=II", 0, 0))
    kernel.ioctl("VHOST_VDPA_SUSPEND", 100, b"garbage")
    assert events(kernel) == [
        ("open", {"pid": 100, "comm": "qemu"}, 0),
        ("VHOST_GET_FEATURES", {"features": 0x300CB182B}, 0),
        ("VHOST_SET_VRING_ADDR", {"index": 1, "desc": 0x1000, "avail": 0x2000, "used": 0x3000}, 0),
        ("VHOST_SET_VRING_CALL", {"index": 1, "fd": -1}, 0),
        ("VHOST_GET_VRING_BASE", {"index": 1, "num": 77}, 0),
        ("VHOST_SET_VRING_NUM", {"index": 99, "num": 4}, -105),
        ("VHOST_VDPA_GET_VRING_SIZE", {"index": 99}, -95),
        ("VHOST_VDPA_GET_STATUS", {"status": 15}, 0),
        ("VHOST_VDPA_GET_STATUS", {}, -5),
        ("VHOST_VDPA_GET_CONFIG", {"off": 0, "len": 6}, 0),
        ("VHOST_VDPA_GET_IOVA_RANGE", {"first": 0, "last": (1 << 64) - 1}, 0),
        ("VHOST_SET_MEM_TABLE", {"nregions": 0}, 0),
        ("VHOST_VDPA_SUSPEND", {}, 0),
    ]


def test_what_a_request_reads_is_unknown_where_its_argument_is_recorded_at_the_begin() -> None:
    """Kernels before 6.9: what lies there then is whatever the caller had in that memory."""
    kernel = Kernel()
    kernel.open(100)
    for name, argument in (
        ("VHOST_GET_FEATURES", struct.pack("=Q", 0x7FFD_1234_5678)),
        ("VHOST_GET_VRING_BASE", struct.pack("=II", 2, 99)),
        ("VHOST_VDPA_GET_IOVA_RANGE", struct.pack("=QQ", 1, 2)),
        ("VHOST_SET_FEATURES", struct.pack("=Q", 6)),
        ("VHOST_SET_VRING_BASE", struct.pack("=II", 2, 7)),
    ):
        words = struct.unpack("=4Q", argument.ljust(32, b"\0"))
        begin = {f"a{place}": word for place, word in enumerate(words)}
        kernel.put("ioctl", 100, rdev=RDEV, cmd=IOCTLS[name].request, **begin)
        kernel.put("ioctl_end", 100, ret=0)
    assert events(kernel)[1:] == [
        ("VHOST_GET_FEATURES", {}, 0),
        ("VHOST_GET_VRING_BASE", {"index": 2}, 0),
        ("VHOST_VDPA_GET_IOVA_RANGE", {}, 0),
        ("VHOST_SET_FEATURES", {"features": 6}, 0),
        ("VHOST_SET_VRING_BASE", {"index": 2, "num": 7}, 0),
    ]


def test_name_of_a_program_cannot_forge_a_line() -> None:
    kernel = Kernel()
    kernel.put("open", 100, rdev=RDEV, comm="x\r\n[0] y\x1b[1m")
    kernel.put("open_end", 100, ret=0)
    assert events(kernel) == [("open", {"pid": 100, "comm": "x??[0] y?[1m"}, 0)]


def test_messages_have_what_their_type_gives_a_meaning_to() -> None:
    kernel = Kernel()
    kernel.open(100)
    kernel.message(100, type=2, asid=1, iova=0x1000, size=0x2000, uaddr=0x7000, perm=3)
    kernel.message(100, type=3, iova=0x1000, size=0x2000, ret=-14)
    kernel.message(100, type=5)
    kernel.message(100, type=9)
    kernel.message(100, ret=-22)
    assert events(kernel)[1:] == [
        ("IOTLB_UPDATE", {"asid": 1, "iova": 0x1000, "size": 0x2000, "uaddr": 0x7000, "perm": 3}, 72),
        ("IOTLB_INVALIDATE", {"asid": 0, "iova": 0x1000, "size": 0x2000}, -14),
        ("IOTLB_BATCH_BEGIN", {"asid": 0}, 72),
        ("IOTLB_9", {"asid": 0, "iova": 0, "size": 0}, 72),
        ("write", {"size": 72}, -22),
    ]


def test_calls_of_threads_that_overlap_are_matched_by_thread() -> None:
    kernel = Kernel()
    kernel.open(100)
    kernel.put("ioctl", 101, rdev=RDEV, cmd=IOCTLS["VHOST_VDPA_SUSPEND"].request, a0=0)
    kernel.put("ioctl", 102, rdev=RDEV + 1, cmd=IOCTLS["VHOST_VDPA_RESUME"].request, a0=0)
    kernel.put("ioctl_end", 102, ret=0)
    kernel.put("ioctl_end", 101, ret=-5)
    found = list(assembler().events(kernel.records))
    assert [(e.device, e.event, e.result) for e in found if e.result is not None][1:] == [
        ("/dev/vhost-vdpa-1", "VHOST_VDPA_RESUME", 0),
        ("/dev/vhost-vdpa-0", "VHOST_VDPA_SUSPEND", -5),
    ]
    assert found[-1].t_begin < found[-2].t_begin


def test_another_process_that_makes_the_calls_is_noted() -> None:
    kernel = Kernel()
    kernel.open(100)
    kernel.ioctl("VHOST_SET_OWNER", 101)
    kernel.ioctl("VHOST_VDPA_SUSPEND", 205)
    kernel.ioctl("VHOST_VDPA_SUSPEND", 103)
    found = [(e.event, e.fields.get("pid")) for e in assembler().events(kernel.records)]
    assert found[1:] == [
        ("VHOST_SET_OWNER", None),
        (CALLER, 200),
        ("VHOST_VDPA_SUSPEND", None),
        (CALLER, 100),
        ("VHOST_VDPA_SUSPEND", None),
    ]


def test_process_that_was_not_asked_for_is_left_out() -> None:
    kernel = Kernel()
    kernel.open(100)
    kernel.ioctl("VHOST_SET_OWNER", 205)
    found = list(assembler(lambda device, pid: pid == 100).events(kernel.records))
    assert [e.event for e in found] == ["open"]


def test_calls_with_a_part_missing_are_counted() -> None:
    kernel = Kernel()
    kernel.put("ioctl_end", 100, ret=0)
    kernel.put("ioctl_end", 100, ret=0)
    kernel.put("ioctl", 101, rdev=RDEV, cmd=IOCTLS["VHOST_SET_OWNER"].request, a0=0)
    kernel.ioctl("VHOST_SET_OWNER", 101)
    kernel.put("write", 102, rdev=RDEV, count=72)
    kernel.put("ioctl_end", 102, ret=0)
    kernel.put("ioctl", 103, rdev=RDEV, cmd=IOCTLS["VHOST_VDPA_SUSPEND"].request, a0=0)
    under_test = assembler()
    assert [e.event for e in under_test.events(kernel.records) if e.result is not None] == ["VHOST_SET_OWNER"]
    assert under_test.begun_before == 1
    assert under_test.unmatched == 3
    assert under_test.unfinished() == [(103, A, "VHOST_VDPA_SUSPEND")]


def test_message_whose_record_is_missing_is_counted() -> None:
    kernel = Kernel()
    for result in (72, -22):
        kernel.put("write", 100, rdev=RDEV, count=72)
        kernel.put("write_end", 100, ret=result)
    under_test = assembler()
    list(under_test.events(kernel.records))
    assert under_test.unmatched == 1, "one was taken by the kernel, one refused"


def test_unknown_request_and_unknown_file_are_recorded_as_they_are() -> None:
    kernel = Kernel()
    kernel.put("ioctl", 100, file=0xFFFF0, cmd=0xDEAD, a0=0)
    kernel.put("ioctl_end", 100, ret=-25)
    found = [e for e in assembler().events(kernel.records) if e.result is not None]
    assert [(e.device, e.event, e.result) for e in found] == [("file 0xffff0", "ioctl 0xdead", -25)]


def test_address_of_a_file_that_was_closed_may_be_another_devices() -> None:
    """Kernels whose probes report nothing but a file's address: the next file may get the same one."""
    device = {"now": "/dev/vhost-vdpa-0"}
    known: dict[int, str] = {}
    under_test = Assembler(
        Surroundings(
            lambda thread: thread,
            lambda pid, file: known.setdefault(file, device["now"]),
            forget=lambda file: known.pop(file, None) and None,
        )
    )
    kernel = Kernel()
    for name in ("ioctl", "release"):
        kernel.put(name, 100, file=0xFFFF0, cmd=IOCTLS["VHOST_SET_OWNER"].request, a0=0)
        kernel.put(f"{name}_end", 100, ret=0)
    assert {e.device for e in under_test.events(kernel.records)} == {"/dev/vhost-vdpa-0"}
    device["now"] = "/dev/vhost-vdpa-1"
    kernel = Kernel()
    kernel.put("ioctl", 200, file=0xFFFF0, cmd=IOCTLS["VHOST_SET_OWNER"].request, a0=0)
    kernel.put("ioctl_end", 200, ret=0)
    assert {e.device for e in under_test.events(kernel.records)} == {"/dev/vhost-vdpa-1"}


def test_number_of_a_thread_may_be_another_process_s_when_it_opens_a_device() -> None:
    process = {"now": 1}
    under_test = Assembler(Surroundings(lambda thread: process["now"], lambda pid, file: ""))
    kernel = Kernel()
    kernel.open(100)
    assert [e.fields["pid"] for e in under_test.events(kernel.records)] == [1]
    process["now"], kernel = 2, Kernel()
    kernel.open(100)
    assert [e.fields["pid"] for e in under_test.events(kernel.records)] == [2]


def test_every_request_can_be_decoded() -> None:
    kernel = Kernel()
    for name in IOCTLS:
        kernel.ioctl(name, 100)
    found = [e.event for e in assembler().events(kernel.records) if e.result is not None]
    assert found == list(IOCTLS)


class Slow(tracefs.Instance):
    """An instance of which each drain gives one page; what is drained is decoded to nothing."""

    lost = 0

    def __init__(self, pages: int) -> None:
        self.left, self.decoded = pages, 0

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass

    def drain(self) -> tracefs.Drained:
        taken = min(self.left, 1)
        self.left -= taken
        return tracefs.Drained(0, [b""] * taken)

    def records(self, drained: tracefs.Drained, everything: bool = False) -> list[Record]:
        self.decoded += len(drained.pages)
        return []


def test_end_of_a_recording_takes_everything_out_of_the_buffer() -> None:
    instance = Slow(5)
    with live.Watch(instance=instance, period=3600) as watch:
        watch.stop()
    assert (instance.left, instance.decoded) == (0, 5)


def test_thread_that_reads_the_buffer_is_the_only_one_with_low_priority() -> None:
    """What is recorded may run on the only processor there is."""
    seen: list[tuple[int, int, int]] = []
    before = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)

    class Noting(Slow):
        def drain(self) -> tracefs.Drained:
            thread = threading.get_native_id()
            seen.append((thread, os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)))
            return super().drain()

    with live.Watch(instance=Noting(0), period=0.001):
        while not seen:
            time.sleep(0.001)
    reader, policy, nice = seen[0]
    assert reader != threading.get_native_id()
    assert (policy, nice) == (os.SCHED_BATCH, 19)
    assert (os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)) == before


def test_priority_of_a_thread_that_followed_a_recording_is_what_it_was() -> None:
    def priority() -> tuple[int, int]:
        return os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)

    before = priority()
    with live.standing_back():
        assert priority() == (os.SCHED_BATCH, 19)
    assert priority() == before


# -- clocks and lines ----------------------------------------------------------------


def clock(boot: str, realtime: int, error: float | None = 2.0) -> dict[str, object]:
    return {"clock": {"host": boot, "boot_id": boot, "realtime_minus_monotonic_ns": realtime, "max_error_ms": error}}


def one(t: int) -> Trace:
    trace = Trace()
    trace.append(Event(t, t + 10, A, "", "VHOST_VDPA_SUSPEND", {}, 0))
    return trace


def test_recordings_of_two_hosts_are_put_on_the_first_clock() -> None:
    joined = clocks.join([("a", one(5_000), clock("x", 1_000)), ("b", one(7_000), clock("y", -1_500))])
    assert [(e.device, e.t_begin) for e in joined.trace.events] == [(f"b:{A}", 4_500), (f"a:{A}", 5_000)]
    assert [(c["offset_ns"], c["uncertain_ms"]) for c in joined.clocks] == [(0, 0.0), (-2_500, 4.0)]


def test_recordings_of_one_boot_have_one_clock() -> None:
    joined = clocks.join([("a", one(5_000), clock("x", 1_000)), ("b", one(7_000), clock("x", 1_900))])
    assert [(e.device, e.t_begin) for e in joined.trace.events] == [(A, 5_000), (A, 7_000)]
    assert joined.clocks[1]["offset_ns"] == 0


def test_recording_without_a_clock_is_not_joined_with_another_host() -> None:
    with pytest.raises(VhostVdpaError, match="what its clock was"):
        clocks.join([("a", one(1), clock("x", 1)), ("b", one(2), {})])
    with pytest.raises(VhostVdpaError, match="what its clock was"):
        clocks.join([("a", one(1), {}), ("b", one(2), {})])
    assert len(clocks.join([("a", one(1), {})]).trace.events) == 1


def test_unsynchronised_host_makes_the_offset_uncertain() -> None:
    joined = clocks.join([("a", one(1), clock("x", 1)), ("b", one(2), clock("y", 1, None))])
    assert joined.clocks[1]["uncertain_ms"] is None


def lines(trace: Trace) -> Iterator[str]:
    narrator, followers = Narrator(), Followers()
    for event in trace.events:
        yield from (words for _, words in narrator.lines(event, *followers.feed(event)))
    yield from (words for _, words in narrator.idle())


def running() -> tuple[Trace, Vmm]:
    """A recording of a program that has started its device, and has been idle for 5 s."""
    trace = Trace()
    vmm = Vmm(trace, A)
    vmm.open()
    vmm.start()
    vmm.wait(5_000)
    return trace, vmm


def test_stop_whose_last_call_takes_seconds_is_one_line() -> None:
    trace, vmm = running()
    stop_for_good(vmm)
    last = max(n for n, event in enumerate(trace.events) if event.event == "IOTLB_INVALIDATE")
    narrator, followers = Narrator(), Followers()
    for event in trace.events[:last]:
        list(narrator.lines(event, *followers.feed(event)))
    later = trace.events[last].t_begin + 5_000 * MS
    assert list(narrator.idle(later, busy={A})) == []
    assert [words.split(":")[1].split()[0] for _, words in narrator.idle(later)] == ["unmapped", "stopped"]


def test_watch_prints_the_life_of_a_device_line_by_line() -> None:
    trace, vmm = running()
    switch(vmm, 100 * MS)
    vmm.wait(5_000)
    stop_for_good(vmm)
    vmm.close()
    assert [line.removeprefix("vhost-vdpa-0: ").partition(":")[0] for line in lines(trace)] == [
        "opened by qemu (pid 100)",
        "backend features IOTLB_MSG_V2 IOTLB_BATCH IOTLB_ASID SUSPEND; offered and not taken",
        "features 0x300cb182b",
        "mapped 1,024 MiB in 4 messages",
        "started in passthrough, 3 queues",
        "suspended",
        "unmapped 1,024 MiB in 2 messages",
        "stopped",
        "features 0x300cb182b",
        "mapped 1,024 MiB in 8 messages",
        "started with shadow rings, 3 queues",
        "switched to shadow rings, DT1",
        "suspended",
        "unmapped 1,024 MiB in 8 messages",
        "stopped",
        "closed",
    ]
