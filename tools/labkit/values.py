"""Values that users give: read and checked before anything is fetched, built or booted."""

import contextlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from labkit.cache import size
from labkit.errors import LabError

UNITS = {"": 1 << 20, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
"""QEMU's: a number without a unit is MiB."""
LEAST_MEMORY = 256 << 20
"""The VM's kernel and its initial RAM file system do not fit in much less."""
MOST_CPUS = 255
MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP = Path("/proc/self/cgroup")


def memory(text: str) -> int:
    """Return a number of bytes; LabError if it is not one, or not enough for a VM, or more than this machine has."""
    found = re.fullmatch(r"(\d+)([kmgt]?)(?:i?b)?", text.strip().lower())
    if not found:
        raise LabError(f"--memory {text}: this is not a size", "A size is a number and one of M, G, T.", "--memory 4G")
    wanted = int(found[1]) * UNITS[found[2]]
    if wanted < LEAST_MEMORY:
        raise LabError(
            f"--memory {text}: a VM needs at least {LEAST_MEMORY >> 20}M",
            "Its kernel does not start with less.",
            "--memory 4G",
        )
    check_memory(wanted, f"--memory {text}")
    return wanted


def check_memory(wanted: int, what: str) -> None:
    """Refuse a VM that this machine cannot hold: QEMU would not start, or be killed on the way."""
    have, whose = machine_memory()
    if wanted > have:
        raise LabError(
            f"{what}: a VM with {size(wanted)} of memory does not fit",
            f"{whose} {size(have)}.",
            f"--memory {max(LEAST_MEMORY, have // 2) >> 20}M",
        )


def side_by_side(wanted: int, each: str) -> int:
    """Return how many of the `wanted` VMs fit on this machine at a time, one at least.

    Each needs a processor of its own, and `each` of memory, as given to --memory, with as much to spare.
    """
    have, _ = machine_memory()
    return max(1, min(wanted, len(os.sched_getaffinity(0)), have // (2 * memory(each))))


def machine_memory() -> tuple[int, str]:
    """Return the bytes of memory and swap that this machine has or a control group allows, and which of them it is."""
    values = dict(re.findall(r"^(\w+): +(\d+) kB", MEMINFO.read_text(), re.MULTILINE))
    total = (int(values["MemTotal"]) + int(values.get("SwapTotal", 0))) << 10
    limit = cgroup_limit()
    if limit is not None and limit < total:
        return limit, "The control group of this process allows"
    return total, "Memory and swap of this machine are"


def cgroup_limit() -> int | None:
    """Return the lowest memory limit of this process's control groups (version 2); None if no limit is visible."""
    try:
        own = CGROUP.read_text().strip().rpartition(":")[2].lstrip("/")
    except OSError:
        return None
    limits = []
    folder = CGROUPS / own
    while True:
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((folder / "memory.max").read_text()))
        if folder in (CGROUPS, folder.parent):
            return min(limits, default=None)
        folder = folder.parent


def cpus(number: int) -> int:
    """Return a number of CPUs that a VM can have."""
    if not 1 <= number <= MOST_CPUS:
        raise LabError(f"--cpus {number}: a VM has 1 to {MOST_CPUS} CPUs", "", "--cpus 2")
    return number


def duration(option: str, value: float | None, unit: str = "seconds") -> float | None:
    """Return a time that can be waited for."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise LabError(
            f"{option} {value:g}: this is not a time to wait", f"It is a number of {unit} above 0.", f"{option} 60"
        )
    return value


def variables(words: Sequence[str], environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Read the values of --env; a name alone takes this process's value."""
    source = os.environ if environ is None else environ
    result = {}
    for word in words:
        name, given, value = word.partition("=")
        if not name or "\0" in word:
            raise LabError(f"--env {word}: there is no name", "It is NAME=VALUE, or NAME alone.", "--env NAME=VALUE")
        if given:
            result[name] = value
        elif name in source:
            result[name] = source[name]
    return result
