"""tracefs for the tests: mounted, and without probes of this package before and after."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyvhostvdpa.trace.tracefs import PREFIX

TRACING = Path("/sys/kernel/tracing")


def made() -> list[str]:
    """What recordings have made in tracefs."""
    lines = (TRACING / "dynamic_events").read_text().splitlines()
    return [*os.listdir(TRACING / "instances"), *(line for line in lines if PREFIX in line)]


@contextmanager
def mounted() -> Iterator[None]:
    """Mount it, if it is not, and see that nothing is left."""
    if not (TRACING / "events").is_dir():
        subprocess.run(["mount", "-t", "tracefs", "nodev", TRACING], check=True)
    assert made() == []
    yield
    assert made() == []
