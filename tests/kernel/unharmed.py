"""The means to see that a kernel was not harmed: its log, and the memory that it uses."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from labkit import kernel_log

READ_SECONDS = 0.2


@contextlib.contextmanager
def watched_kernel() -> Iterator[None]:
    """The kernel's log, which holds its last lines only and so is read all the time, has no report of an error."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(log, 0, os.SEEK_END)
    # a process, for what is watched here may fork, and a thread would not do with that
    fork = multiprocessing.get_context("fork")
    ended, found = fork.Event(), fork.SimpleQueue()

    def watch() -> None:
        reports: list[str] = []
        last = False
        while not last:
            last = ended.wait(READ_SECONDS)
            reports += kernel_log.reports(_messages(log))
        found.put(reports)

    watcher = fork.Process(target=watch)
    watcher.start()
    os.close(log)
    try:
        yield
    finally:
        ended.set()
        reports = found.get()
        watcher.join()
        watcher.close()
        found.close()
    assert reports == []


def _messages(log: int) -> Iterator[str]:
    """What was logged since."""
    while True:
        try:
            yield os.read(log, 8192).decode(errors="replace").partition(";")[2]
        except BlockingIOError:
            return
        except BrokenPipeError:
            yield "BUG: lines of the kernel's log were lost before they were read"


@dataclass(frozen=True)
class Usage:
    """Memory in use by the kernel: kB by kind, and objects by slab cache."""

    kilobytes: dict[str, int]
    objects: dict[str, int]

    @classmethod
    def now(cls) -> Usage:
        """Take a sample when all that waits to be freed is."""
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        # what was freed of the kernel's own addresses is kept until there is much of it, or until the protection of
        # some changes (mm/vmalloc.c:_vm_unmap_aliases): that of a module's code does as it is loaded
        subprocess.run(["modprobe", "dummy", "numdummies=0"], check=True)
        subprocess.run(["modprobe", "-r", "dummy"], check=True)
        time.sleep(2)
        memory = {name: int(rest.split()[0]) for name, _, rest in _fields("/proc/meminfo")}
        kinds = ("SUnreclaim", "SReclaimable", "Percpu", "PageTables", "KernelStack", "VmallocUsed", "Shmem")
        rows = [line.split() for line in Path("/proc/slabinfo").read_text().splitlines()[2:]]
        return cls({kind: memory[kind] for kind in kinds}, {row[0]: int(row[1]) for row in rows})

    def growth(self, before: Usage) -> tuple[dict[str, int], dict[str, int]]:
        """What there is more of now than before: kB, objects."""
        kilobytes = {kind: amount - before.kilobytes[kind] for kind, amount in self.kilobytes.items()}
        objects = {name: count - before.objects.get(name, 0) for name, count in self.objects.items()}
        return ({k: v for k, v in kilobytes.items() if v > 0}, {k: v for k, v in objects.items() if v > 0})


def _fields(path: str) -> list[tuple[str, str, str]]:
    return [line.partition(":") for line in Path(path).read_text().splitlines()]
