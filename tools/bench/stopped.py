"""What the stopped phase of a migration costs by the size of guest memory, natively: no VM, no device.

python3 tools/bench/stopped.py [GIB …]

Memory is allocated as a guest's is, watched, and a few pages of it are written. Then the steps of the stopped phase
that look at all of memory are timed, the shortest of some runs of each. What follows the hand-over is printed too.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable

from pyvhostvdpa.memory.guest import DEFAULT_GPA, GuestMemory
from pyvhostvdpa.migration.dirty import DirtyTracker, PageSet
from pyvhostvdpa.migration.pages import PageSender
from pyvhostvdpa.migration.stream import Channel

GIB = 1 << 30
RUNS = 7
WRITTEN = 64


def took(act: Callable[[], object]) -> float:
    """Return how many ms an action takes."""
    begin = time.perf_counter_ns()
    act()
    return (time.perf_counter_ns() - begin) / 1e6


def write(memory: GuestMemory) -> None:
    """Write a few pages, spread over all of memory."""
    [region] = memory.regions
    step = region.size // WRITTEN
    for number in range(WRITTEN):
        region.memory.buffer[number * step] = number + 1


def drain(sock: socket.socket) -> None:
    """Read and forget until the end."""
    while sock.recv(1 << 20):
        pass


def measure(gib: int) -> tuple[float, float, float]:
    """Return ms of collecting, of a round with what was collected, and of ending the watch, for so much memory."""
    near, far = socket.socketpair()
    reader = threading.Thread(target=drain, args=(far,))
    reader.start()
    with GuestMemory([(DEFAULT_GPA, gib * GIB)]) as memory, Channel(near) as channel:
        tracker, sender = DirtyTracker(memory), PageSender(memory, channel, None)
        tracker.start()
        tracker.collect()
        collects, sends = [], []
        left = PageSet(memory)
        for _ in range(RUNS):
            write(memory)
            collects.append(took(lambda: left.update(tracker.collect())))
            sends.append(took(lambda: sender.send(left)))
        ended = took(tracker.stop)
    reader.join()
    return min(collects), min(sends), ended


def main() -> None:
    """Print a line for each size, and what each further GiB costs."""
    sizes = [int(word) for word in sys.argv[1:]] or [1, 2, 4, 8]
    print("GiB  collect ms  last round ms  end of the watch ms (behind the hand-over)")
    found = {}
    for gib in sizes:
        collect, send, ended = measure(gib)
        found[gib] = collect + send
        print(f"{gib:3}  {collect:10.3f}  {send:13.3f}  {ended:19.3f}", flush=True)
    if len(sizes) > 1:
        first, last = sizes[0], sizes[-1]
        print(f"each further GiB costs the stopped phase {(found[last] - found[first]) / (last - first):.3f} ms")


if __name__ == "__main__":
    main()
