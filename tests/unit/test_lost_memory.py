"""Memory of a file that its owner makes shorter: this process goes on, and says how much was lost."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import fcntl, mmap, os, signal
from pyvhostvdpa.memory.mapped import FileMemory
fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
os.ftruncate(fd, 1 << 20)
memory = FileMemory(fd, 0x1000, 0x4000)
memory.buffer[:4] = b"kept"
"""
"""What each process begins with."""


def run(script: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", before + BEGIN + script], capture_output=True, text=True, check=False, timeout=60
    )


def test_what_is_behind_the_new_end_reads_as_zeros_and_is_counted() -> None:
    done = run("""
os.ftruncate(fd, 0x2000)
print(bytes(memory.buffer[:4]), bytes(memory.buffer[0x1000:0x1004]), memory.lost)
memory.buffer[0x3ffc:] = b"last"
print(bytes(memory.buffer[0x3ffc:]), memory.lost)
""")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["b'kept' b'\\x00\\x00\\x00\\x00' 4096", "b'last' 8192"]


def test_memory_that_was_closed_is_not_guarded_any_more() -> None:
    done = run("""
memory.close()
again = FileMemory(fd, 0, 0x1000)
print(memory.lost, again.lost)
os.ftruncate(fd, 0)
again.buffer[0]
print(again.lost)
""")
    assert (done.returncode, done.stdout.splitlines()) == (0, ["0 0", "4096"])


@pytest.mark.parametrize(
    "harm",
    [
        """
other = os.memfd_create("other")
os.ftruncate(other, 4096)
page = mmap.mmap(other, 4096)
os.ftruncate(other, 0)
page[0]
""",
        "os.kill(os.getpid(), signal.SIGBUS)",
    ],
    ids=["other memory", "a signal that was sent"],
)
@pytest.mark.parametrize("before", ["", "import faulthandler; faulthandler.enable()\n"], ids=["default", "reported"])
def test_any_other_bus_error_ends_the_process_as_before(harm: str, before: str) -> None:
    done = run(harm, before)
    assert done.returncode == -signal.SIGBUS
    # an emulator of another processor adds a line of its own
    reported = [line for line in done.stderr.splitlines() if not line.startswith("qemu: ")]
    assert bool(reported) == bool(before)


def test_a_bitmap_that_becomes_shorter_takes_marks_that_nobody_reads() -> None:
    done = run("""
from pyvhostvdpa.memory.guest import GuestMemory
from pyvhostvdpa.memory.log import SharedLog, log_size
ram = GuestMemory([(0, 1 << 20)])
bitmap = os.memfd_create("log", os.MFD_ALLOW_SEALING)
os.ftruncate(bitmap, log_size(ram))
ram.start_dirty_log()
log = SharedLog(ram, bitmap, log_size(ram))
os.ftruncate(bitmap, 0)
ram.mark_all()
print(log.publish() > 0)
log.close()
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_more_lost_pages_than_a_process_may_have_mappings_are_replaced_in_one_piece() -> None:
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    done = run(f"""
pages = 2 * ({most} + 100)
os.ftruncate(fd, pages * 4096)
whole = FileMemory(fd, 0, pages * 4096)
os.ftruncate(fd, 0)
view = whole.buffer
print(sum(view[at * 4096] for at in range(0, pages, 2)), whole.lost >= pages * 4096)
""")
    assert (done.returncode, done.stdout) == (0, "0 True\n")


def test_threads_that_stop_devices_survive_it_too() -> None:
    """A signal that is blocked when an access fails ends the process, whoever would handle it."""
    done = run("""
from pyvhostvdpa._cdefs import ffi, lib
os.ftruncate(fd, 0)
jobs = ffi.new("struct device_job[]", 2)
rings, starts, base = ffi.new("struct vring[2]"), ffi.new("struct vring_start[2]"), ffi.new("uint32_t[2]")
heads, used = ffi.new("uint16_t[32]"), ffi.new("struct vring_used_elem[32]")
at = ffi.cast("uint8_t *", memory.hva)
bases = ffi.new("uint32_t *[2]", [base, base + 1])
for number in range(2):
    page = at + 0x2000 * number
    rings[number].num = 16
    rings[number].desc = ffi.cast("struct vring_desc *", page)
    rings[number].avail = ffi.cast("struct vring_avail *", page + 256)
    rings[number].used = ffi.cast("struct vring_used *", page + 4096)
    starts[number].avail, starts[number].used = heads + 16 * number, used + 16 * number
    jobs[number].ring_count, jobs[number].rings, jobs[number].starts = 1, rings + number, starts + number
    jobs[number].bases = bases + number
crew = lib.crew_make(2)
for round in range(20):
    lib.crew_run(crew, jobs, 2)
lib.crew_end(crew)
print(memory.lost > 0)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
