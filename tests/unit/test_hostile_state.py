"""State from a source that means harm: refused by the name of its field before READY, or it runs."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_world import LAYOUT, Path_, World, cohere, full, plain, put

import pyvhostvdpa
from pyvhostvdpa.base.errors import MissingFeature, StreamCorrupt
from pyvhostvdpa.guest.nic_state import RingPlace, check_place
from pyvhostvdpa.guest.shape import BadState
from pyvhostvdpa.guest.state import DeviceState, GuestState
from pyvhostvdpa.guest.synthetic import SyntheticGuest
from pyvhostvdpa.guest.writer import MAX_RATE
from pyvhostvdpa.memory.guest import DEFAULT_GPA, PAGE_SIZE, GuestMemory
from pyvhostvdpa.net.features import Feature

HARNESS = Path(__file__).with_name("hostile_state.py")
ROOT = HARNESS.parents[2]
CORPUS = ROOT / "tests" / "native" / "corpus" / "state"
INPUTS = int(os.environ.get("PYVHOSTVDPA_FUZZ_INPUTS", "5000"))
END = LAYOUT[1][0] + LAYOUT[1][1]
OUTSIDE = 1 << 45
HUGE = (1 << 64) - 4096


@pytest.fixture(scope="module")
def full_world() -> Iterator[World]:
    world = World(full)
    yield world
    world.memory.close()


@pytest.fixture
def world(full_world: World) -> World:
    """Two pairs, a control queue, indirect tables; memory as its source left it."""
    full_world.reset()
    return full_world


def restored(world: World, device: DeviceState, guest: GuestState | None = None) -> SyntheticGuest:
    """Restore as a destination does, with memory in which each ring is what the state says."""
    cohere(world.memory, device)
    guest = GuestState.decode((guest or world.guest).encode())
    return SyntheticGuest.restore(world.memory, guest, [DeviceState.decode(device.encode())], world.shapes)


def refused(world: World, device: DeviceState, guest: GuestState | None = None) -> str:
    with pytest.raises(StreamCorrupt) as error:
        restored(world, device, guest)
    return str(error.value)


def test_state_of_an_honest_source_is_restored_unchanged(world: World) -> None:
    guest = restored(world, world.device)
    try:
        assert guest.shapes() == world.shapes
        assert guest.state()[1] == [world.device]
    finally:
        guest.detach()


def test_control_ring_larger_than_its_indirect_tables_is_refused(world: World) -> None:
    """The driver would write behind the 4 KiB of tables, here behind guest memory."""
    control = world.device.nic.control
    assert control is not None
    ring = dataclasses.replace(control.ring, num=512)
    hostile = dataclasses.replace(control, ring=ring, command=END - (1 << 16), avail_idx=255, used_idx=255)
    device = put(world.device, ("nic", "control"), hostile)
    assert "num 512: its indirect tables have room for 256 descriptors" in refused(world, device)


FIELDS: dict[str, tuple[Path_, Any, str]] = {
    "pair rx_gpa": (("pairs", 1, "rx_gpa"), OUTSIDE, "pair 1: rx_gpa 0x200000000000+0x8000 is not guest memory"),
    "pair tx_gpa": (("pairs", 0, "tx_gpa"), END - 4096, "pair 0: tx_gpa"),
    "pair tx_table_gpa": (("pairs", 0, "tx_table_gpa"), HUGE, "pair 0: tx_table_gpa"),
    "pair tx_descs": (("pairs", 0, "tx_descs"), 2, "pair 0: tx_descs 2"),
    "pair frame_size": (("pairs", 0, "frame_size"), 2037, "pair 0: frame_size 2037"),
    "pair window": (("pairs", 0, "window"), 1 << 31, "pair 0: window"),
    "pair rx_avail": (("pairs", 0, "rx_avail"), 4711, "pair 0: rx_avail 4711"),
    "pair rx_used": (("pairs", 0, "rx_used"), 1, "virtqueue 0 has used 0, avail 16; its driver has rx_used 1"),
    "pair tx_used": (("pairs", 0, "tx_used"), 60000, "pair 0: tx_avail 8, tx_used 60000"),
    "pair tx_free": (("pairs", 0, "tx_free"), tuple(range(16)), "tx_free 16: more slots than the 16"),
    "pair received": (("pairs", 0, "received"), 9, "pair 0: received 9"),
    "pair highest": (("pairs", 0, "highest"), 9, "highest 9"),
    "pair sent": (("pairs", 0, "sent"), 1 << 63, "pair 0: sent"),
    "pair ring_errors": (("pairs", 0, "ring_errors"), 1 << 63, "pair 0: ring_errors"),
    "pair last_rx": (("pairs", 0, "last_rx"), -(1 << 63), "pair 0: last_rx"),
    "pair gaps": (("pairs", 0, "gaps"), ((-(1 << 63), (1 << 63) - 1),), "pair 0: gaps"),
    "pair gap backwards": (("pairs", 0, "gaps"), ((9, 8),), "pair 0: gaps"),
    "ring desc": (("pairs", 0, "rx", "desc"), OUTSIDE, "virtqueue 0: desc"),
    "ring avail": (("pairs", 0, "tx", "avail"), OUTSIDE, "virtqueue 1: avail"),
    "ring used": (("pairs", 1, "tx", "used"), END - 8, "virtqueue 3: used"),
    "ring index": (("pairs", 0, "rx", "index"), 5, "pair 0 has virtqueues 5 and 1"),
    "ring num": (("pairs", 0, "rx", "num"), 12, "ring size 12 is not a power of two"),
    "control command": (("control", "command"), END - 4096, "control queue: command"),
    "control command unaligned": (("control", "command"), END - (1 << 16) - 1, "control queue: command"),
    "control answer": (("control", "answer"), END, "control queue: answer"),
    "control desc": (("control", "ring", "desc"), OUTSIDE, "virtqueue 4: desc"),
    "control num": (("control", "ring", "num"), 1, "control queue: num 1"),
    "control index": (("control", "ring", "index"), 3, "device 0 does not match the SHAPE section: control_index 3"),
    "control open": (("control", "open"), 1, "control queue: avail_idx 0, used_idx 0, open 1"),
    "control used_idx": (("control", "used_idx"), 1, "control queue: avail_idx 0, used_idx 1"),
    "control missing": (("control",), None, "control_index none here, 4 there"),
    "model missing": (("model",), None, "control driver and control model: one without the other"),
    "model features": (("model", "features"), Feature.VERSION_1, "control model: features"),
    "model pairs": (("model", "pairs"), 3, "control model: 3 pairs in use of 2"),
    "model no pairs": (("model", "pairs"), 0, "control model: 0 pairs in use"),
    "model rss": (("model", "rss"), bytes(60), "control model: rss"),
    "model rss queues": (("model", "rss"), bytes(10) + b"\7\0\0", "control model: rss uses 7 transmit queues of 2"),
    "model rss size": (("model", "rss"), b"\0\0\0\0\xff\x0f\0\0" + bytes(8192) + b"\1\0\0", "a command of 8205 bytes"),
    "model hash_config": (("model", "hash_config"), b"1", "control model: rss or hash_config"),
    "model offloads": (("model", "offloads"), 1 << 40, "control model: offloads"),
    "features": (("features",), 0, "does not match the SHAPE section: features 0 here"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_field_that_no_driver_can_have_is_refused_by_name(world: World, case: str) -> None:
    path, value, words = FIELDS[case]
    assert words in refused(world, put(world.device, ("nic", *path), value))


WRITER: dict[str, tuple[str, int, str]] = {
    "outside": ("writer_gpa", OUTSIDE, "writer_gpa"),
    "too long": ("writer_pages", 65, "writer_gpa"),
    "without end": ("writer_pages", 1 << 63, "writer_gpa"),
    "unaligned": ("writer_gpa", LAYOUT[1][0] + 8, "writer_gpa"),
    "too fast": ("writer_rate", MAX_RATE + 1, "writer_rate"),
}


@pytest.mark.parametrize("case", WRITER)
def test_cpu_that_no_guest_has_is_refused_by_name(world: World, case: str) -> None:
    field, value, words = WRITER[case]
    assert words in refused(world, world.device, dataclasses.replace(world.guest, **{field: value}))


def test_buffers_of_one_pair_inside_those_of_another_are_refused(world: World) -> None:
    first, second = world.device.nic.pairs
    device = put(world.device, ("nic", "pairs"), (first, dataclasses.replace(second, tx_gpa=first.tx_gpa + 64)))
    assert "overlap" in refused(world, device)


def test_cpu_that_writes_the_rings_is_refused(world: World) -> None:
    at = world.device.nic.pairs[0].rx.desc
    assert "overlap" in refused(world, world.device, dataclasses.replace(world.guest, writer_gpa=at))


def test_device_state_without_pairs_is_refused(world: World) -> None:
    device = dataclasses.replace(world.device, queues=(), nic=dataclasses.replace(world.device.nic, pairs=()))
    with pytest.raises(StreamCorrupt, match="pairs: a NIC has at least one"):
        DeviceState.decode(device.encode())
    with pytest.raises(StreamCorrupt, match="pairs: a NIC has at least one"):
        SyntheticGuest.restore(world.memory, world.guest, [device])


def test_state_of_more_devices_than_the_shape_has_is_refused(world: World) -> None:
    with pytest.raises(StreamCorrupt, match="2 devices, the SHAPE section has 1"):
        SyntheticGuest.restore(world.memory, world.guest, [world.device, world.device], world.shapes)


@pytest.mark.parametrize("clock", [-(1 << 63), (1 << 63) - 1, 0], ids=["first", "last", "zero"])
def test_clock_of_go_is_taken_whatever_it_is(world: World, clock: int) -> None:
    """It comes when nothing can be refused any more."""
    ends = ((1 << 61) - 1, 1 << 61)
    pair = dataclasses.replace(world.device.nic.pairs[0], last_rx=1 << 61, gaps=(ends, (-(1 << 61), 5)))
    device = put(world.device, ("nic", "pairs", 0), pair)
    guest = restored(world, device)
    try:
        guest.shift_clock(time.monotonic_ns() - clock)
        guest.run()
        guest.pause()
        assert guest.longest_gap(-(1 << 63), 1 << 63) >= 0
        assert restored(world, guest.state()[1][0]).counts() == guest.counts()
    finally:
        guest.detach()


def test_clock_of_another_host_moves_times_exactly(world: World) -> None:
    pair = dataclasses.replace(world.device.nic.pairs[0], last_rx=5000, gaps=((1000, 3000),))
    guest = restored(world, put(world.device, ("nic", "pairs", 0), pair))
    try:
        guest.shift_clock(-2000)
        assert guest.nics[0].pairs[0].c.last_rx == 3000
        assert guest.nics[0].pairs[0].gaps() == [(-1000, 1000)]
    finally:
        guest.detach()


def test_restore_without_descriptors_left_names_the_limit(world: World) -> None:
    cohere(world.memory, world.device)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, hard))
    try:
        with pytest.raises(MissingFeature, match="Too many open files") as error:
            SyntheticGuest.restore(world.memory, world.guest, [world.device], world.shapes)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "ulimit -n" in error.value.hint


def test_nic_without_control_queue_is_restored() -> None:
    world = World(plain)
    try:
        restored(world, world.device).detach()
    finally:
        world.memory.close()


def harness(*words: str) -> str:
    """Run the harness in a process of its own, which a crash of the driver ends."""
    command = [sys.executable, "-X", "faulthandler", str(HARNESS), *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(pyvhostvdpa.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
    return done.stdout


def test_random_states_are_refused_or_run() -> None:
    """The soak test `restore` runs the same harness under libFuzzer."""
    assert harness("-r", str(INPUTS), "1").startswith(f"{INPUTS} inputs")


@pytest.mark.parametrize("name", ["control_tables", "no_pairs"])
def test_state_that_once_crashed_a_destination_is_refused(name: str) -> None:
    assert harness(str(CORPUS / name)).startswith("1 inputs, 0 of them accepted")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"desc": DEFAULT_GPA + 8}, "not aligned"),
        ({"avail": DEFAULT_GPA + 0x1001}, "not aligned"),
        ({"used": DEFAULT_GPA + 0x2002}, "not aligned"),
        ({"desc": DEFAULT_GPA + PAGE_SIZE * 16 - 16}, "desc .* is not guest memory"),
        ({"avail": DEFAULT_GPA + PAGE_SIZE * 16 - 4}, "avail .* is not guest memory"),
        ({"used": DEFAULT_GPA + PAGE_SIZE * 16 - 4}, "used .* is not guest memory"),
    ],
)
def test_ring_that_no_driver_can_have_there_is_refused(change: dict[str, int], words: str) -> None:
    good = RingPlace(0, 8, DEFAULT_GPA, DEFAULT_GPA + 0x1000, DEFAULT_GPA + 0x2000)
    with GuestMemory([(DEFAULT_GPA, 16 * PAGE_SIZE)]) as memory:
        check_place(memory, good)
        with pytest.raises(BadState, match=words):
            check_place(memory, dataclasses.replace(good, **change))
