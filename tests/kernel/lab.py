"""Real devices for the tests: vdpa_sim_net of the running kernel, loaded as a test needs it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

MACS = ("52:54:91:a1:b2:c1", "52:54:91:a1:b2:c2")
DEVICES = ("/dev/vhost-vdpa-0", "/dev/vhost-vdpa-1")
SMALL = 32 << 20


def command(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True, text=True)


def reload(**parameters: int) -> None:
    """Load vdpa_sim anew with module parameters, and two net devices."""
    for name in sorted(os.listdir("/sys/bus/vdpa/devices")):
        command("vdpa", "dev", "del", name)
    command("modprobe", "-r", "vdpa_sim_net")
    command("modprobe", "-r", "vdpa_sim")
    command("modprobe", "vdpa_sim", *(f"{key}={value}" for key, value in parameters.items()))
    command("modprobe", "vdpa_sim_net")
    for number, mac in enumerate(MACS):
        command("vdpa", "dev", "add", "name", f"vdpa{number}", "mgmtdev", "vdpasim_net", "mac", mac)
    wait_for(lambda: all(Path(device).exists() for device in DEVICES), "the devices' nodes")


def wait_for(condition: object, what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))
