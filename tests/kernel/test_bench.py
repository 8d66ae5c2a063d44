"""Bursts of messages, and the benchmarks of requests, switches and the shadow, on real devices."""

from __future__ import annotations

import json
import subprocess
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hwsim import MakeSim

from pyvhostvdpa import KernelError, MissingFeature, VdpaNetDevice
from pyvhostvdpa.base.uapi import Access, IotlbType
from pyvhostvdpa.bench import requests, shadow, switching
from pyvhostvdpa.chardev.burst import PreparedMessages, send_all
from pyvhostvdpa.chardev.message import IotlbMessage, IotlbWriteError
from pyvhostvdpa.device.net import State
from pyvhostvdpa.memory.guest import PAGE_SIZE
from pyvhostvdpa.memory.mapped import SharedMemory

IOVA = 1 << 30
MANY = 100_000


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most bytes that Python held beyond what it had: exact, where a process grows by whole arenas."""
    found: list[int] = []
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def update(memory: SharedMemory, number: int = 0) -> IotlbMessage:
    return IotlbMessage(
        IotlbType.UPDATE, 0, IOVA + number * PAGE_SIZE, PAGE_SIZE, memory.hva + number * PAGE_SIZE, int(Access.RW)
    )


def back_and_forth(memory: SharedMemory, count: int) -> Iterator[IotlbMessage]:
    """A page mapped and unmapped again and again, in one batch."""
    yield IotlbMessage(IotlbType.BATCH_BEGIN, 0)
    for _ in range((count - 2) // 2):
        yield update(memory)
        yield IotlbMessage(IotlbType.INVALIDATE, 0, IOVA, PAGE_SIZE)
    yield IotlbMessage(IotlbType.BATCH_END, 0)


def test_100000_messages_are_built_and_sent_in_constant_memory(make_sim: MakeSim) -> None:
    with VdpaNetDevice(make_sim().chardev) as device, SharedMemory("test", PAGE_SIZE) as memory:
        events = len(device.trace._trace.events)
        with peak() as grown:
            sent = send_all(device.chardev, back_and_forth(memory, MANY))
        recorded = len(device.trace._trace.events) - events
        print(f"{sent.messages} messages in {sent.ns / 1e6:.0f} ms: {grown[0] >> 10} KiB, {recorded} trace events")
        assert sent.messages == MANY
        assert grown[0] < 256 << 10
        assert device.chardev.batch_asid is None
        device.iotlb.space(0).map(IOVA, memory.hva, PAGE_SIZE)


def test_refused_burst_names_the_message_and_leaves_its_batch_to_be_closed(make_sim: MakeSim) -> None:
    with VdpaNetDevice(make_sim().chardev) as device, SharedMemory("test", 4 * PAGE_SIZE) as memory:
        burst = PreparedMessages(8)
        burst.add(IotlbMessage(IotlbType.BATCH_BEGIN, 0))
        for number in (0, 1, 0, 2):
            burst.add(update(memory, number))
        with pytest.raises(IotlbWriteError) as refused:
            burst.send(device.chardev)
        assert (refused.value.applied, refused.value.rejected) == (3, update(memory, 0))
        assert device.chardev.batch_asid == 0
        device.chardev.write_iotlb([IotlbMessage(IotlbType.BATCH_END, 0)])
        assert device.chardev.batch_asid is None


def test_messages_beyond_one_buffer_are_counted_from_the_first(make_sim: MakeSim) -> None:
    with VdpaNetDevice(make_sim().chardev) as device, SharedMemory("test", 64 * PAGE_SIZE) as memory:
        with pytest.raises(IotlbWriteError) as refused:
            send_all(device.chardev, [*(update(memory, i) for i in range(50)), update(memory, 7)], chunk=16)
        assert refused.value.applied == 50


def test_bench_ioctl_times_each_cheap_request(make_sim: MakeSim) -> None:
    report = requests.run(make_sim().chardev, count=50)
    served = {c.name for c in report.costs if not c.missing}
    assert {
        "VHOST_GET_FEATURES",
        "VHOST_VDPA_GET_CONFIG",
        "VHOST_SET_VRING_ADDR",
        "VHOST_VDPA_SET_GROUP_ASID",
    } <= served
    assert all(0 < c.p50 <= c.p99 <= c.worst for c in report.costs if not c.missing)


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["vhost-vdpa", "bench", *words], capture_output=True, text=True, check=False)


def test_request_that_the_parent_does_not_support_is_reported_and_not_timed(devices: tuple[str, str]) -> None:
    done = bench("ioctl", devices[0], "--json", "--count", "20")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == "pyvhostvdpa/bench-ioctl/1"
    by_name = {row["name"]: row for row in found["ioctls"]}
    assert "not supported" in by_name["VHOST_VDPA_GET_VRING_DESC_GROUP"]["missing"]
    assert by_name["VHOST_VDPA_GET_STATUS"]["count"] == 20


def test_an_argument_that_no_request_has_is_refused(make_sim: MakeSim) -> None:
    with VdpaNetDevice(make_sim().chardev) as device:
        with pytest.raises(ValueError, match="65 bytes"):
            device.chardev.repeat("VHOST_VDPA_GET_CONFIG", bytes(65), 1)
        with pytest.raises(KernelError, match="no such virtqueue"):
            device.chardev.repeat("VHOST_GET_VRING_BASE", (99).to_bytes(8, "little"), 3)


def test_a_switch_is_timed_by_pairs(make_sim: MakeSim) -> None:
    sim = make_sim(pairs=2)
    sim.write("cost/suspend_vq_ns", 20_000_000)
    report = switching.run(sim.chardev, repeat=2)
    found = {(c.operation, c.pairs): c for c in report.costs}
    assert set(found) == {(o, n) for o in switching.OPERATIONS for n in (1, 2)}
    assert found["suspend", 1].ns.median >= 40e6
    assert found["suspend", 2].ns.median >= 80e6
    assert found["suspend", 1].calls == 1
    with pytest.raises(MissingFeature, match="2 queue pairs that can be used, 4 were asked for"):
        switching.run(sim.chardev, (4,))


def test_a_device_without_resume_is_timed_without_it(make_sim: MakeSim) -> None:
    report = switching.run(make_sim(resume="N").chardev, repeat=1)
    assert [c.operation for c in report.costs] == ["start", "suspend", "reset"]


def test_the_shadow_is_compared_with_passthrough(make_sim: MakeSim) -> None:
    report = shadow.run(make_sim().chardev, seconds=0.5, rounds=1, frames=50)
    assert [c.mode for c in report.costs] == [State.PASSTHROUGH, State.SHADOW]
    assert all(len(c.latencies) == 50 and min(c.latencies) > 0 for c in report.costs)
    assert report.ratio > 0
    assert report.to_dict()["modes"][0]["latency_ns"]["frames"] == 50


@pytest.mark.parametrize(
    "words", ["ioctl DEV --count 5", "switch DEV --repeat 1", "svq DEV --seconds 0.3 --frames 9 --repeat 1"]
)
def test_every_benchmark_prints_a_table_and_its_progress(devices: tuple[str, str], words: str) -> None:
    done = bench(*words.replace("DEV", devices[0]).split())
    assert done.returncode == 0, done.stderr
    assert "vdpa_sim, kernel" in done.stdout
    assert done.stderr
