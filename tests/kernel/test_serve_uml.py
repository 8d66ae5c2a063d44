# lab: --vmm
"""User Mode Linux in front of ``vhost-vdpa serve``: its virtio_uml speaks vhost-user, with orders of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import hwsim
import lab
import pytest
from machine import Serve

HOME = Path("/opt/vmm/uml")
NEAR, FAR = "10.9.1.1", "10.9.1.2"
ANSWERS = 20
END = "the guest ends"
INIT = f"""#!/bin/sh
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
for time in 1 2; do
    modprobe -d {HOME} virtio_net
    ip address add {NEAR}/24 dev eth0
    ip link set eth0 up
    echo "address $(cat /sys/class/net/eth0/address)"
    ping -c {ANSWERS} -i 0.05 -W 20 -s 1000 {FAR}
    modprobe -d {HOME} -r virtio_net
done
echo {END}
busybox poweroff -f
"""
"""The first program, whose root is that of the VM. A driver that is unloaded stops its rings."""


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder whose files are huge pages: a device takes 2,048 runs of pages, and small ones of 64 MiB are more."""
    folder = Path("/dev/shm/uml")
    folder.mkdir(mode=0o700, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "huge=always,mode=700", "uml", str(folder)], check=True)
    Path("/proc/sys/vm/compact_memory").write_text("1")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Linux:
    """A kernel that is a process; its console is kept."""

    def __init__(self, folder: Path, memory: Path, *arguments: str) -> None:
        init = folder / "init"
        init.write_text(INIT)
        init.chmod(0o755)
        root = ["rootfstype=hostfs", "rootflags=/", "ro", f"init={init}"]
        # with addresses at random it adds the gap behind its own program to its memory, some 100 MiB
        words = ["setarch", "-R", f"{HOME}/linux", "mem=64M", *root, "con=null", "con0=fd:0,fd:1", "panic=-1"]
        environment = {**os.environ, "HOME": str(folder), "TMPDIR": str(memory), "LD_PRELOAD": f"{HOME}/xstate.so"}
        # its console is two pipes: it waits for them by epoll, which takes neither a file nor /dev/null
        self._process = subprocess.Popen(
            [*words, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        self.console: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.console.append(line)

    def ended(self) -> bool:
        return self._process.poll() is not None or f"{END}\n" in self.console

    def close(self) -> None:
        # at times it spins when it should power off, and what it runs are processes of their own
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._reader.join()
        self._process.communicate()


@contextmanager
def linux(folder: Path, memory: Path, *arguments: str) -> Iterator[Linux]:
    made = Linux(folder, memory, *arguments)
    try:
        yield made
    finally:
        made.close()
        # shown if the test fails
        print("".join(made.console))


def test_answers_come_through_also_to_a_driver_that_is_loaded_again(tmp_path: Path, memory: Path) -> None:
    near = hwsim.add("near", wire="Y")
    server = None
    try:
        with hwsim.kernel_driver(), hwsim.interface("far", FAR, wire="Y") as far:
            server = Serve(near.chardev, tmp_path, "--front-end", "uml")
            with linux(tmp_path, memory, f"virtio_uml.device={server.path}:1") as guest:
                lab.wait_for(guest.ended, "the end of the guest", 240)
            told = "".join(guest.console)
            lab.wait_for(lambda: server.status()["front_end"] is None, "the front-end to be gone")
            assert server.status()["failed"] is None
            events = server.end()
            names = [each["event"] for each in events]
            assert [names.count(each) for each in ("running", "reset")] == [2, 2], events
            assert not {"refused", "device-failed"} & set(names), events
            assert re.findall(r"(\d+) received", told) == [str(ANSWERS)] * 2
            # it is the device's own, which filters by it
            assert re.findall(r"^address (\S+)", told, re.MULTILINE) == [near.mac.hex(":")] * 2
            assert [sim.read("state")["fault"] for sim in (near, far.sim)] == ["", ""]
            assert int(near.read("stats")["vq0.packets"]) >= 2 * ANSWERS
    finally:
        if server is not None:
            server.close()
        hwsim.remove(near.name)
