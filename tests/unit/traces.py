"""A trace made by hand: a sample of the shape of one, not of figures."""

from __future__ import annotations

from collections.abc import Mapping

from pyvhostvdpa.trace.recorder import DeviceTrace, Trace

MS = 1_000_000
GUEST = 64 << 20
IDENTITY, TRANSLATED, RING, BUFFER = 0x10_0000, 0x4000_0000, 0x1000, 0x9000
A, B = "/dev/vhost-vdpa-0", "/dev/vhost-vdpa-1"


class Recorder:
    """Calls one after the other, each of a given duration, with 10 us between them."""

    def __init__(self, device: DeviceTrace, at: int) -> None:
        self.device = device
        self.at = at

    def call(self, event: str, ms: float = 0.01, result: int = 0, **fields: int | str) -> None:
        begin = self.at + 10_000
        self.at = begin + int(ms * MS)
        self.device.record(begin, self.at, event, fields, result)

    def note(self, event: str, fields: Mapping[str, int | str]) -> None:
        self.at += 10_000
        self.device.record(self.at, self.at, event, fields, None)

    def message(self, kind: str, asid: int, iova: int = 0, size: int = 0, ms: float = 0.01) -> None:
        fields: dict[str, int | str] = {"asid": asid}
        if size:
            fields |= {"iova": iova, "size": size}
        if kind == "UPDATE":
            fields |= {"uaddr": 0x7F00_0000_0000 + iova, "perm": 3}
        self.call(f"IOTLB_{kind}", ms, 72, **fields)

    def batch(self, kind: str, asid: int, maps: list[tuple[int, int]], ms: float) -> None:
        self.message("BATCH_BEGIN", asid)
        for iova, size in maps:
            self.message(kind, asid, iova, size)
        self.message("BATCH_END", asid, ms=ms)


def attach(recorder: Recorder) -> None:
    recorder.call("open", fd=7)
    recorder.call("VHOST_SET_OWNER")
    recorder.call("VHOST_VDPA_GET_IOVA_RANGE", first=0, last=(1 << 64) - 1)
    recorder.batch("UPDATE", 0, [(IDENTITY, GUEST), (0x1000_0000, 0x1000)], 20)
    recorder.call("VHOST_VDPA_SET_STATUS", status=3)
    recorder.call("VHOST_VDPA_SET_STATUS", status=11)
    recorder.call("VHOST_VDPA_SET_STATUS", status=15)


def downtime_1(recorder: Recorder) -> None:
    with recorder.device.in_phase("dt1.stop"):
        recorder.call("VHOST_VDPA_SUSPEND", 2.5)
        for index in (0, 1):
            recorder.call("VHOST_GET_VRING_BASE", index=index, num=100 + index)
        recorder.call("VHOST_VDPA_SET_STATUS", 10, status=0)
        recorder.batch("INVALIDATE", 0, [(IDENTITY, GUEST), (0x1000_0000, 0x1000)], 30)
    recorder.at += 500_000
    with recorder.device.in_phase("dt1.start"):
        recorder.note("shadow_vqs", {"queues": "0 1 2"})
        recorder.call("VHOST_SET_FEATURES", features=0x300000000)
        recorder.call("VHOST_VDPA_SET_STATUS", status=3)
        recorder.call("VHOST_VDPA_SET_STATUS", status=11)
        recorder.call("VHOST_VDPA_SET_GROUP_ASID", index=2, num=1)
        for index in (0, 1):
            recorder.call("VHOST_SET_VRING_NUM", index=index, num=256)
            recorder.call("VHOST_SET_VRING_BASE", index=index, num=0)
            recorder.message("UPDATE", 1, RING + 0x3000 * index, 0x2000, 25)
            recorder.message("UPDATE", 1, RING + 0x3000 * index + 0x2000, 0x1000, 25)
            recorder.call("VHOST_SET_VRING_ADDR", index=index, desc=0x1000, avail=0x2000, used=0x3000)
            recorder.call("VHOST_SET_VRING_KICK", index=index, fd=20 + index)
            recorder.call("VHOST_SET_VRING_CALL", index=index, fd=30 + index)
        recorder.batch("UPDATE", 0, [(TRANSLATED, GUEST)], 40)
        recorder.call("VHOST_VDPA_SET_STATUS", 12, status=15)
        recorder.call("VHOST_VDPA_SET_VRING_ENABLE", index=2, num=1)
        recorder.note("vhost_vdpa_net_load_mq", {"ncurqps": 1})
        recorder.note("vhost_vdpa_net_load_cmd", {"class": 4, "cmd": 0, "data_num": 1, "data_size": 2})
        recorder.at += 3 * MS
        recorder.note("vhost_vdpa_net_load_cmd_retval", {"class": 4, "cmd": 0, "r": 0})
        for index in (0, 1):
            recorder.call("VHOST_VDPA_SET_VRING_ENABLE", 0.5, index=index, num=1)
        recorder.call("VHOST_VDPA_SET_CONFIG_CALL", fd=-1)


def downtime_2(recorder: Recorder) -> None:
    with recorder.device.in_phase("dt2.stop"):
        recorder.note("vhost_vdpa_net_data_eval_flush", {"qindex": 0, "svq_switch": 0, "flush_map": True})
        recorder.call("VHOST_VDPA_SUSPEND", 2.5)
        for index in (0, 1):
            recorder.note("vhost_vdpa_get_vring_base", {"index": index, "num": 7, "svq": True})
        recorder.call("VHOST_VDPA_SET_STATUS", 10, status=0)
        recorder.note("vhost_vdpa_maybe_flush_map", {"registered": True, "flush_map": True, "iotlb_persistent": False})
        recorder.batch("INVALIDATE", 1, [(RING, 0x2000), (RING + 0x2000, 0x1000)], 25)
        recorder.message("INVALIDATE", 1, RING + 0x3000, 0x3000, 25)
        recorder.call("VHOST_VDPA_SET_CONFIG_CALL", result=-9, fd=-1)


def migration() -> Trace:
    """Two devices, switched and stopped one after the other."""
    trace = Trace()
    first, second = Recorder(trace.device(A), 1_000_000_000), Recorder(trace.device(B), 1_100_000_000)
    for recorder in (first, second):
        attach(recorder)
    first.at = max(first.at, second.at)
    for step in (downtime_1, downtime_2):
        step(first)
        second.at = first.at + MS
        step(second)
        first.at = second.at + 100 * MS
    return trace
