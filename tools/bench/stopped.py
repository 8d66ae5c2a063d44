"""What the stopped phase of a migration costs by the size of guest memory, natively: no VM, no device.

python3 tools/bench/stopped.py [GIB …]

Memory is allocated as a guest's is: private, for devices that are known to pin it, or shared, for all others. It is
watched, and a few pages of it are written. Then the steps of the stopped phase that look at memory are timed, the
shortest of some runs of each. Printed too is what the guest is not stopped for: the last look at all of shared memory,
by which its page tables are moved aside, and the end of the watch, behind the hand-over.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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


def make_looks_short(tracker: DirtyTracker, memory: GuestMemory, sender: PageSender) -> None:
    """Do what comes before the last short round."""
    c_map = tracker.look_at_used(PageSet(memory))
    if c_map is not None:
        sender.read_through(c_map)


class Times(NamedTuple):
    """Of a size of memory, in ms."""

    aside: float
    collect: float
    send: float
    end: float


def measure(gib: int, private: bool) -> Times:
    """Return what the steps take for so much memory."""
    near, far = socket.socketpair()
    reader = threading.Thread(target=drain, args=(far,))
    reader.start()
    with GuestMemory([(DEFAULT_GPA, gib * GIB)], private=private) as memory, Channel(near) as channel:
        tracker, sender = DirtyTracker(memory), PageSender(memory, channel, None)
        tracker.start()
        tracker.collect()
        aside = took(partial(make_looks_short, tracker, memory, sender))
        collects, sends = [], []
        for _ in range(RUNS):
            left, by_devices = PageSet(memory), PageSet(memory)
            write(memory)
            drained = took(partial(tracker.drain_into, left, by_devices))
            collects.append(drained + took(partial(tracker.scan_into, left)))
            sends.append(took(partial(sender.send, left)))
        ended = took(tracker.stop)
    reader.join()
    return Times(aside, min(collects), min(sends), ended)


def main() -> None:
    """Print a line for each kind of memory and size, and what each further GiB costs."""
    sizes = [int(word) for word in sys.argv[1:]] or [1, 2, 4, 8]
    print("             the guest runs  it is stopped              it runs elsewhere")
    print("memory   GiB  last look ms  collect ms  last round ms   end of the watch ms")
    costs = []
    for kind, private in (("private", True), ("shared", False)):
        found = {}
        for gib in sizes:
            t = measure(gib, private)
            found[gib] = t.collect + t.send
            print(f"{kind:7}  {gib:3}  {t.aside:12.3f}  {t.collect:10.3f}  {t.send:13.3f}  {t.end:20.3f}", flush=True)
        first, last = sizes[0], sizes[-1]
        if last > first:
            costs.append(f"{(found[last] - found[first]) / (last - first):.3f} ms in {kind} memory")
    if costs:
        print(f"each further GiB costs the stopped phase {', '.join(costs)}")


if __name__ == "__main__":
    main()
