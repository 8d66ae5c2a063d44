"""Guest memory as virtual machines have it: from GPA 0 on, with holes, in files of another process, across borders."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator

import hwsim
import lab
import pytest

from pyvhostvdpa import GuestMemory, State, VdpaNetDevice
from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.guest.arena import GuestArena, place_queue
from pyvhostvdpa.guest.nic import FRAME_BUFFER, GuestNic, NicOptions
from pyvhostvdpa.guest.traffic import Traffic
from pyvhostvdpa.memory.guest import GUEST_PAGE, FileRegion, Gpa
from pyvhostvdpa.memory.log import SharedLog, log_size
from pyvhostvdpa.virtqueue.layout import GuestQueue

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MODES = [State.PASSTHROUGH, State.SHADOW]
PC = [(Gpa(0), 640 * KIB), (Gpa(1 * MIB), 31 * MIB), (Gpa(4 * GIB), 16 * MIB)]
LAYOUTS = {
    "a PC's, from 0 on": PC,
    "a hole of 1 TiB": [(Gpa(GIB), 16 * MIB), (Gpa(1 << 40), 16 * MIB)],
    "odd pages": [
        (Gpa(GIB + 0x3000), 16 * MIB + 0x5000),
        (Gpa(GIB + 0x8000 + 16 * MIB), 8 * MIB + 0x1000),
        (Gpa(3 * GIB - 0x1000), 8 * MIB),
    ],
}
RING = 32


@pytest.fixture
def hw() -> Iterator[str]:
    device = hwsim.add("hw0", filter="N")
    yield device.chardev
    hwsim.remove(device.name)


def runs(path: str, memory: GuestMemory, mode: State) -> None:
    """Send traffic whose rings and buffers lie in the first region, then in the last."""
    with VdpaNetDevice(path) as device:
        device.attach(memory)
        for region in (memory.regions[0], memory.regions[-1]):
            arena = GuestArena(memory, region.gpa, min(region.size, 4 * MIB))
            nic = GuestNic(memory, NicOptions(ring_size=RING, features=device.features), arena)
            traffic = Traffic(nic)
            try:
                device.start(mode, nic.queues)
                traffic.run()
                lab.wait_for(lambda nic=nic: nic.counts().received >= 300, "300 frames")
                assert traffic.stop_sending(20.0)
                counts = nic.counts()
                assert (counts.lost, counts.duplicated, counts.corrupted) == (0, 0, 0)
                device.check()
            finally:
                traffic.pause()
                device.reset()
                nic.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic_runs_in_any_layout_on_vdpa_hwsim(hw: str, layout: str, mode: State) -> None:
    with GuestMemory(LAYOUTS[layout]) as memory:
        runs(hw, memory, mode)


@pytest.mark.parametrize("mode", MODES)
def test_traffic_runs_from_gpa_0_on_vdpa_sim(devices: tuple[str, str], mode: State) -> None:
    with GuestMemory(PC) as memory:
        runs(devices[0], memory, mode)


@pytest.mark.parametrize("mode", MODES)
def test_traffic_runs_from_gpa_0_in_pinned_memory(pinned: tuple[str, str], mode: State) -> None:
    with GuestMemory(PC) as memory:
        runs(pinned[0], memory, mode)


_OWNER = """
import mmap, os, sys
memory = mmap.mmap(int(sys.argv[1]), 0)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def shared() -> Iterator[tuple[GuestMemory, int]]:
    """Guest memory in a memfd of another process, with the holes of a PC; and that descriptor."""
    fd = os.memfd_create("vm")
    os.ftruncate(fd, 48 * MIB)
    command = [sys.executable, "-c", _OWNER, str(fd)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, pass_fds=[fd]) as owner:
        assert owner.stdout
        assert owner.stdout.readline() == "ready\n"
        pieces = [
            FileRegion(0, 640 * KIB, fd),
            FileRegion(MIB, 15 * MIB, fd, MIB),
            FileRegion(4 * GIB, MIB, fd, 32 * MIB),
        ]
        with GuestMemory.from_files(pieces) as memory:
            yield memory, fd
        assert owner.stdin
        owner.stdin.close()
    os.close(fd)


@pytest.mark.parametrize("mode", MODES)
def test_memory_of_another_process_carries_traffic_on_vdpa_hwsim(
    hw: str, shared: tuple[GuestMemory, int], mode: State
) -> None:
    runs(hw, shared[0], mode)


@pytest.mark.parametrize("mode", MODES)
def test_memory_of_another_process_carries_traffic_on_vdpa_sim(
    devices: tuple[str, str], shared: tuple[GuestMemory, int], mode: State
) -> None:
    runs(devices[0], shared[0], mode)


def test_pages_that_a_device_wrote_are_in_another_process_s_bitmap(hw: str, shared: tuple[GuestMemory, int]) -> None:
    memory, _ = shared
    bitmap = os.memfd_create("vhost-log")
    os.ftruncate(bitmap, log_size(memory))
    try:
        memory.start_dirty_log()
        with SharedLog(memory, bitmap, log_size(memory)) as log:
            runs(hw, memory, State.SHADOW)
            log.publish()
        content = os.pread(bitmap, log_size(memory), 0)
        marked = {(8 * at + bit) * GUEST_PAGE for at, byte in enumerate(content) for bit in range(8) if byte >> bit & 1}
    finally:
        os.close(bitmap)
    assert min(marked) < 640 * KIB
    assert max(marked) >= 4 * GIB
    # the receive buffers: what a frame was written to is marked, and nothing in a hole
    assert sum(page < 640 * KIB for page in marked) >= RING * FRAME_BUFFER // GUEST_PAGE
    assert all(any(r.gpa <= page < r.end for r in memory.regions) for page in marked)


# -- chains as long as the ring, across a border -----------------------------------

FRAME = bytes(12) + b"\xff" * 6 + bytes(6) + b"\x88\xb5" + bytes(range(256)) * 2
BORDER = GIB + 4 * MIB
RX_BUFFER = GIB + 3 * MIB


def write(memory: GuestMemory, gpa: int, data: bytes) -> None:
    ffi.memmove(ffi.cast("char *", memory.hva(gpa, len(data))), data, len(data))


def put(memory: GuestMemory, queue: GuestQueue, parts: list[tuple[int, int]], flags: int) -> None:
    for k, (gpa, size) in enumerate(parts):
        more = k + 1 < len(parts)
        entry = struct.pack("<QIHH", gpa, size, flags | (lib.VRING_DESC_F_NEXT if more else 0), k + 1 if more else 0)
        write(memory, queue.desc + 16 * k, entry)
    write(memory, queue.avail, struct.pack("<HHH", 0, 1, 0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 2])
def test_a_chain_as_long_as_the_ring_crosses_a_border_in_either_mode(hw: str, size: int, mode: State) -> None:
    layout = [(Gpa(GIB), 4 * MIB), (Gpa(BORDER), 4 * MIB)]
    with GuestMemory(layout) as memory, VdpaNetDevice(hw) as device:
        device.attach(memory)
        arena = GuestArena(memory, GIB, 2 * MIB)
        rx, tx = place_queue(arena, 0, size), place_queue(arena, 1, size)
        write(memory, BORDER - 112, FRAME[:112])
        write(memory, BORDER, FRAME[112:])
        put(memory, rx, [(RX_BUFFER, 2048)], lib.VRING_DESC_F_WRITE)
        whole = [(BORDER - 112, len(FRAME))]
        put(memory, tx, whole if size == 1 else [(BORDER - 112, 12), (BORDER - 100, len(FRAME) - 12)], 0)
        try:
            device.start(mode, [rx, tx])
            os.eventfd_write(tx.kick, 1)
            lab.wait_for(lambda: bytes(ffi.buffer(ffi.cast("char *", memory.hva(rx.used)), 4))[2], "the frame")
            device.check()
            received = bytes(ffi.buffer(ffi.cast("char *", memory.hva(RX_BUFFER)), len(FRAME)))
            assert received[12:] == FRAME[12:]
        finally:
            device.close()
            for fd in (rx.kick, rx.call, tx.kick, tx.call):
                os.close(fd)
