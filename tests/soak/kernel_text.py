# lab: --devices none
"""A kernel changes its own code while its other CPUs run it, as each probe of `watch` does: does the emulator bear it?

QEMU 7.2 ends such a kernel within seconds ("Oops: int3"). So does 10.0 where its threads have to wait for processors,
twice of two times beside another VM. It is the emulator that is tried here, so it is not among the tests of every day,
which would end with their machine.
"""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")


def test_kernel_changes_its_own_code_while_other_cpus_run_it() -> None:
    if not (TRACING / "events").exists():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", str(TRACING)], check=True)
    ended = threading.Event()

    def sleep_often() -> None:
        while not ended.wait(0.0002):
            pass

    others = [threading.Thread(target=sleep_often) for _ in range(2)]
    for thread in others:
        thread.start()
    try:
        for value in ["1", "0"] * 30:
            for group in ("timer", "sched"):
                (TRACING / "events" / group / "enable").write_text(value)
    finally:
        ended.set()
        for thread in others:
            thread.join()
