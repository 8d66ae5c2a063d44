"""What drives the vDPA device of a virtual machine: QEMU itself, or `vhost-vdpa serve` behind vhost-user."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from labvm.machine import CALLS, vhost_user, vhost_vdpa
from labvm.network import AS_PROGRAMS_RUN, NotReady, Sim, wait_for

QEMU, SERVE = "vhost-vdpa", "serve"
BACKENDS = (QEMU, SERVE)
READY_S = 120.0


@dataclass
class Attachment:
    """How a QEMU gets at a device: its options, and where the calls on the device are logged."""

    netdev: list[str]
    calls: Path
    process: "subprocess.Popen[bytes] | None" = None
    log: Path | None = None
    """What serve prints."""

    def events(self) -> list[tuple[int, dict[str, Any]]]:
        """Return what serve has reported, each with its time, CLOCK_MONOTONIC in ns; nothing without serve."""
        if self.log is None:
            return []
        offset = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - time.clock_gettime_ns(time.CLOCK_REALTIME)
        # the last line may not be whole yet
        lines = [line for line in self.log.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        told = [json.loads(line) for line in lines if line.startswith("{")]
        return [(round(datetime.fromisoformat(each["time"]).timestamp() * 1e9) + offset, each) for each in told]

    def told(self, *names: str) -> dict[str, Any] | None:
        """Return the last event of serve with one of these names."""
        return next((event for _, event in reversed(self.events()) if event["event"] in names), None)

    def trouble(self) -> str:
        """Return why serve could not do what was asked of it, with what it advises; "" if it could."""
        words = [self.told("device-failed"), self.told("refused")]
        found = [f"{each['error']}; {each.get('hint', '')}".rstrip("; ") for each in words if each]
        return f"serve: {'; '.join(found)}" if found else ""


@contextmanager
def attached(
    backend: str, sim: Sim, folder: Path, name: str, onward: str = "", options: Sequence[str] = ()
) -> Iterator[Attachment]:
    """Prepare a device for a QEMU of this name; what was started for it is ended afterwards.

    ``onward`` is the name of the QEMU that its guest will move to, which may be there later: its back-end gets it.
    ``options`` are serve's.
    """
    if backend == QEMU:
        yield Attachment(vhost_vdpa(sim.chardev), folder / f"{name}.calls")
    elif backend == SERVE:
        with _served(sim, folder, name, onward, options) as attachment:
            yield attachment
    else:
        raise NotReady(f"there is no backend {backend!r}; there are {', '.join(BACKENDS)}")


@contextmanager
def _served(sim: Sim, folder: Path, name: str, onward: str, options: Sequence[str]) -> Iterator[Attachment]:
    path, log, calls = folder / f"{name}.sock", folder / f"{name}.serve", folder / f"{name}.serve.calls"
    argv = [*AS_PROGRAMS_RUN, "prlimit", "--memlock=unlimited"]
    argv += ["vhost-vdpa", "serve", sim.chardev, "--socket-path", str(path), "--json"]
    argv += ["--peer-listen", f"unix:{folder / name}.peer"]
    argv += ["--peer", f"unix:{folder / onward}.peer"] if onward else []
    argv += options
    # one that was killed has left them behind
    for left in (path, folder / f"{path.name}.status"):
        left.unlink(missing_ok=True)
    environment = {**os.environ, "LD_PRELOAD": str(CALLS), "VDPA_CALLS": str(calls), "VDPA_WORK": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        wait_for(lambda: path.exists() or process.poll() is not None, f"the socket of serve on {sim.name}", READY_S)
        if process.poll() is not None:
            raise NotReady(f"vhost-vdpa serve ended with status {process.returncode}: {log.read_text().strip()}")
        yield Attachment(vhost_user(str(path)), calls, process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
