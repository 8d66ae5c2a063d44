"""Real devices for the tests: vdpa_sim_net of the running kernel, loaded as a test needs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyvhostvdpa.migration.source import SendOptions

MACS = ("52:54:91:a1:b2:c1", "52:54:91:a1:b2:c2")
DEVICES = ("/dev/vhost-vdpa-0", "/dev/vhost-vdpa-1")
SMALL = 32 << 20
SLOW_STREAM = SendOptions(downtime=10.0)
"""For what is not about how soon memory converges: on an emulated machine with all its CPUs busy that takes long."""
SYSFS = Path("/sys/bus/vdpa/devices")
VDUSE_NET = Path(__file__).parents[2] / "tools" / "vduse_net.py"


def command(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True, text=True)


def remove_devices() -> None:
    """Delete every device but those of a daemon."""
    for device in sorted(SYSFS.iterdir()):
        if "vduse" not in device.resolve().parts:
            command("vdpa", "dev", "del", device.name)


def reload(**parameters: int) -> None:
    """Reload vdpa_sim with module parameters, and add two net devices."""
    remove_devices()
    command("modprobe", "-r", "vdpa_sim_net")
    command("modprobe", "-r", "vdpa_sim")
    command("modprobe", "vdpa_sim", *(f"{key}={value}" for key, value in parameters.items()))
    command("modprobe", "vdpa_sim_net")
    for number, mac in enumerate(MACS):
        command("vdpa", "dev", "add", "name", f"vdpa{number}", "mgmtdev", "vdpasim_net", "mac", mac)
    wait_for(lambda: all(Path(device).exists() for device in DEVICES), "the devices' nodes")


def chardev(name: str) -> str:
    """The node of a device, by its vdpa name."""
    wait_for(lambda: list((SYSFS / name).glob("vhost-vdpa-*")), f"the node of {name}")
    [node] = (SYSFS / name).glob("vhost-vdpa-*")
    wait_for(Path(f"/dev/{node.name}").exists, f"/dev/{node.name}")
    return f"/dev/{node.name}"


@contextmanager
def vduse(name: str) -> Iterator[str]:
    """A VDUSE net device for the block; its node."""
    command("modprobe", "vduse")
    wait_for(Path("/dev/vduse/control").exists, "/dev/vduse/control")
    with subprocess.Popen([sys.executable, str(VDUSE_NET), f"{name}=52:54:91:a1:b2:f7"]) as daemon:
        wait_for(lambda: _added(name), f"{name} to be added")
        try:
            yield chardev(name)
        except BaseException:
            daemon.kill()
            raise
        command("vdpa", "dev", "del", name)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(10) == 0


def _added(name: str) -> bool:
    return subprocess.run(["vdpa", "dev", "add", "name", name, "mgmtdev", "vduse"], check=False).returncode == 0


def wait_for(condition: object, what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


def open_fds() -> dict[str, str]:
    """What each descriptor is open on."""
    targets = {}
    for fd in os.listdir("/proc/self/fd"):
        # the one that was read through is gone
        with suppress(FileNotFoundError):
            targets[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return targets
