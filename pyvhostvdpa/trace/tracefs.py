# SPDX-License-Identifier: MIT
"""A separate tracing instance: probes on the vhost-vdpa driver and a buffer, all of it removed at the end.

The instance's name carries the process that made it. The next recording removes the instance of a killed one: the
kernel refuses to remove an instance whose files are open, so a running recording is not touched.

Source: Documentation/trace/ftrace.rst ("Instances"), kernel/trace/trace.c (``instance_rmdir``: EBUSY while in use).
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..base.closing import Closing
from ..base.errors import MissingFeature, VhostVdpaError
from .probes import IOCTL_WITH_WORDS, PROBES, KernelProbe
from .ringbuffer import Decoder, Format, Record

PREFIX = "pyvhostvdpa_"
"""What the name of every instance and of every group of probes begins with."""

_MOUNTS = Path("/proc/self/mounts")
_PLACES = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
_LOCKDOWN = Path("/sys/kernel/security/lockdown")
_FTRACE = Path("/proc/sys/kernel/ftrace_enabled")
_SYMBOLS = Path("/proc/kallsyms")
_SETTLE_NS = 2_000_000
"""A record may become readable this long after its time was taken: its writer cannot be preempted, its CPU can."""

KIB_MOST = 64 << 10
"""KiB of buffer per CPU at most: 400,000 calls."""
KIB_IN_ALL = 256 << 10
"""KiB of buffer over all CPUs at most."""
_KIB_LEAST = 256


def find(mounts: Path = _MOUNTS) -> Path:
    """Return where tracefs is mounted; MissingFeature says what keeps a recording from using it."""
    try:
        mounted = [line.split()[1] for line in mounts.read_text().splitlines() if line.split()[2] == "tracefs"]
    except OSError:
        mounted = []
    roots = [Path(place) for place in (*mounted, *_PLACES) if os.path.isdir(f"{place}/events")]
    if roots:
        return roots[0]
    if os.geteuid():
        raise _not_root()
    raise MissingFeature("tracefs is not mounted", hint="mount -t tracefs nodev /sys/kernel/tracing")


def _not_root() -> MissingFeature:
    return MissingFeature(
        "recording other processes' calls needs root: only root may use tracefs",
        hint="the same command as root (sudo)",
    )


def _explained(error: OSError, what: str) -> VhostVdpaError:
    """Return what an error of tracefs means: what refused it, and the next command."""
    if error.errno in (errno.EPERM, errno.EACCES):
        with contextlib.suppress(OSError):
            mode = _LOCKDOWN.read_text()
            if "[none]" not in mode:
                return MissingFeature(
                    f"kernel lockdown forbids tracing ({mode.strip()})",
                    hint="boot without lockdown=confidentiality, or with Secure Boot off",
                )
        if os.geteuid():
            return _not_root()
        return MissingFeature(
            f"{what} was refused: this process is root without the right to trace (CAP_SYS_ADMIN, or a container)",
            hint="the same command on the host, outside the container",
        )
    return VhostVdpaError(f"{what} failed: {os.strerror(error.errno or errno.EIO)}", hint="vhost-vdpa help watch")


def _append(path: Path, line: str) -> None:
    # truncating the file would remove every process's probes
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


def _started(pid: int | str) -> str:
    """Return when a process was started, in clock ticks since boot; "" without one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def name_of_this_process() -> str:
    """Return the name of this process's instance: no process before or after it has the same."""
    return f"{PREFIX}{os.getpid()}_{_started(os.getpid())}"


def _abandoned(name: str) -> bool:
    pid, _, started = name.removeprefix(PREFIX).partition("_")
    return pid.isdigit() and _started(pid) != started


class Tracefs:
    """tracefs as it is mounted: definitions of probes, and leftovers of killed recordings."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = find() if root is None else root
        listed = [self.root / name for name in ("dynamic_events", "kprobe_events")]
        try:
            self.definitions = next(path for path in listed if path.exists())
        except OSError as e:
            raise _explained(e, "reading tracefs") from e
        except StopIteration:
            if os.geteuid() and not os.access(self.root, os.R_OK | os.X_OK):
                raise _not_root() from None
            raise MissingFeature(
                "this kernel has no kprobes (it was built without CONFIG_KPROBE_EVENTS and CONFIG_FPROBE_EVENTS)",
                hint="another kernel; a distribution's own has them",
            ) from None

    def remove_abandoned(self) -> list[str]:
        """Remove the leftovers of killed recordings; return the names of their instances."""
        # groups before instances: a recording makes its instance first, so one that begins now is in use
        groups = sorted({group for group, _ in self._defined()})
        removed = []
        for name in sorted(os.listdir(self.root / "instances")):
            if name.startswith(PREFIX) and _abandoned(name):
                try:
                    os.rmdir(self.root / "instances" / name)
                except OSError:
                    # its files are open: a recording in another PID namespace
                    continue
                removed.append(name)
        in_use = set(os.listdir(self.root / "instances"))
        for group in groups:
            if group.startswith(PREFIX) and _abandoned(group) and group not in in_use:
                self.undefine(group)
        return removed

    def _defined(self) -> Iterator[tuple[str, str]]:
        """Yield group and name of every probe there is."""
        for line in self.definitions.read_text().splitlines():
            group, _, name = line.split()[0].partition(":")[2].partition("/")
            yield group, name

    def define_all(self, group: str, probes: Iterable[KernelProbe]) -> dict[str, str]:
        """Define probes; return the forms that the kernel took, by name. One that it does not take is an error."""
        forms: dict[str, str] = {}
        for probe in probes:
            if probe.at_end and probe.name.removesuffix("_end") not in forms:
                continue
            form = self.define(group, probe)
            if form:
                forms[probe.name] = form
        if "ioctl" in forms and not any("a3=" in forms.get(name, "") for name in ("ioctl", "ioctl_end")):
            self.undefine(group, "ioctl")
            forms["ioctl"] = self.define(group, IOCTL_WITH_WORDS)
        return forms

    def define(self, group: str, probe: KernelProbe) -> str:
        """Define a probe in the first form that the kernel takes, and return that; "" if it is optional and refused."""
        for definition in probe.definitions(group):
            try:
                _append(self.definitions, definition + "\n")
            except OSError as e:
                if e.errno in (errno.EPERM, errno.EACCES, errno.EROFS):
                    raise _explained(e, "setting a probe") from e
                continue
            return definition
        if probe.optional:
            return ""
        raise self._refused(probe)

    def _refused(self, probe: KernelProbe) -> VhostVdpaError:
        with contextlib.suppress(OSError), open(_SYMBOLS, encoding="ascii") as symbols:
            if not any(f" {probe.function}\t" in line or f" {probe.function}\n" in line for line in symbols):
                return MissingFeature(
                    f"the kernel has no function {probe.function}: the module vhost_vdpa is not loaded",
                    hint="modprobe vhost_vdpa",
                )
        return MissingFeature(
            f"the kernel refuses every form of a probe on {probe.function}",
            hint=f"tail {self.root}/error_log says why",
        )

    def undefine(self, group: str, only: str = "") -> None:
        """Remove all probes of a group, or only one."""
        for each, name in list(self._defined()):
            if each == group and only in ("", name):
                with contextlib.suppress(OSError):
                    _append(self.definitions, f"-:{group}/{name}\n")


class _Buffer:
    """One CPU's part of the buffer."""

    def __init__(self, folder: Path, kib: int) -> None:
        self._kib = kib
        self._file = os.open(folder / "trace_pipe_raw", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._stats = folder / "stats"

    def pages(self, size: int) -> Iterator[bytes]:
        """Yield what is in it, at most as much as it holds."""
        found = 0
        while found >> 10 < self._kib:
            try:
                page = os.read(self._file, size)
            except BlockingIOError:
                break
            if not page:
                break
            found += len(page)
            yield page

    def lost(self) -> int:
        """Return how many records did not fit."""
        counts = dict(line.split(": ", 1) for line in self._stats.read_text().splitlines() if ": " in line)
        return sum(int(counts.get(name, 0)) for name in ("overrun", "commit overrun", "dropped events"))

    def close(self) -> None:
        os.close(self._file)


@dataclass(frozen=True, slots=True)
class Drained:
    """What was taken out of the buffer: pages, and the time up to which nothing older can still come."""

    horizon: int
    pages: list[bytes]


class Instance(Closing):
    """A tracing instance with every probe, recording from its construction on.

    Raises MissingFeature where tracing is not possible; the hint is the next command.
    """

    def __init__(
        self, tracefs: Tracefs | None = None, kib: int | None = None, probes: tuple[KernelProbe, ...] = PROBES
    ) -> None:
        self._tracefs = tracefs or Tracefs()
        self.name = name_of_this_process()
        self.forms: dict[str, str] = {}
        """Each probe in the form that the kernel took."""
        self._buffers: list[_Buffer] = []
        self._kept: list[Record] = []
        self._closed = False
        self._made = False
        """Whether this object made the instance: another of this process has the same name."""
        self._folder = self._tracefs.root / "instances" / self.name
        try:
            if _FTRACE.exists() and _FTRACE.read_text().strip() == "0":
                raise MissingFeature("function tracing is switched off", hint="sysctl kernel.ftrace_enabled=1")
            self._tracefs.remove_abandoned()
            os.mkdir(self._folder)
            self._made = True
            self._set_up(kib, probes)
        except OSError as e:
            self.close()
            raise _explained(e, f"setting up {self._folder}") from e
        except BaseException:
            self.close()
            raise

    def _set_up(self, kib: int | None, probes: tuple[KernelProbe, ...]) -> None:
        self.forms = self._tracefs.define_all(self.name, probes)
        events = self._folder / "events" / self.name
        formats = [Format(name, (events / name / "format").read_text()) for name in self.forms]
        self._decoder = Decoder(formats)
        self._set("trace_clock", "mono")
        # new records are dropped when it is full, rather than older ones: what was read stays whole
        self._set("options/overwrite", "0")
        with contextlib.suppress(OSError):
            self._set("options/record-tgid", "1")
        self._page = self._page_size()
        cpus = sorted((self._folder / "per_cpu").glob("cpu*"))
        # it has its size from the beginning: while one is resized, the kernel drops records and counts none of them
        # (kernel/trace/trace.c:__tracing_resize_ring_buffer stops the tracer)
        if kib is None:
            room = min(KIB_IN_ALL, _quarter_of_memory_kib()) // max(1, len(cpus))
            kib = max(_KIB_LEAST, min(KIB_MOST, room))
        self._set("buffer_size_kb", str(kib))
        self._buffers = [_Buffer(cpu, kib) for cpu in cpus]
        self._set(f"events/{self.name}/enable", "1")

    def _set(self, name: str, value: str) -> None:
        (self._folder / name).write_text(value)

    def _page_size(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int((self._folder / "buffer_subbuf_size_kb").read_text()) << 10
        return os.sysconf("SC_PAGE_SIZE")

    @property
    def lost(self) -> int:
        """How many records did not fit into the buffer so far."""
        return sum(buffer.lost() for buffer in self._buffers) if not self._closed else self._lost_at_end

    def stop(self) -> None:
        """Record nothing from now on; what was recorded can still be read."""
        self._set(f"events/{self.name}/enable", "0")

    def drain(self) -> Drained:
        """Take everything out of the buffer. Nothing is decoded yet, so that the buffer is empty again soon."""
        horizon = time.monotonic_ns() - _SETTLE_NS
        return Drained(horizon, [page for buffer in self._buffers for page in buffer.pages(self._page)])

    def records(self, drained: Drained, everything: bool = False) -> list[Record]:
        """Return what was recorded up to a drain, in order of time over all CPUs.

        What is younger than its horizon is kept for the next call unless ``everything`` is asked for: another CPU may
        still have something older.
        """
        found = self._kept
        for page in drained.pages:
            found.extend(self._decoder.page(page))
        found.sort(key=lambda record: record.t)
        count = len(found)
        while count and not everything and found[count - 1].t > drained.horizon:
            count -= 1
        self._kept = found[count:]
        return found[:count]

    def process_of(self, thread: int) -> int:
        """Return the process of a thread, also of one that has ended; the thread itself if nothing is known."""
        try:
            for line in Path(f"/proc/{thread}/status").read_text().splitlines():
                if line.startswith("Tgid:"):
                    return int(line.split()[1])
        except OSError:
            with contextlib.suppress(OSError):
                for line in (self._tracefs.root / "saved_tgids").read_text().splitlines():
                    if line.split()[0] == str(thread):
                        return int(line.split()[1])
        return thread

    def close(self) -> None:
        """Remove everything that was made in tracefs. Idempotent."""
        if self._closed:
            return
        self._lost_at_end = 0
        with contextlib.suppress(OSError):
            self._lost_at_end = sum(buffer.lost() for buffer in self._buffers)
        self._closed = True
        for buffer in self._buffers:
            buffer.close()
        if not self._made:
            return
        # should the folder have to stay, since someone reads in it, nothing is recorded there
        with contextlib.suppress(OSError):
            self._set(f"events/{self.name}/enable", "0")
        with contextlib.suppress(OSError):
            os.rmdir(self._folder)
        with contextlib.suppress(OSError):
            self._tracefs.undefine(self.name)


def _quarter_of_memory_kib() -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) // 4
    return KIB_MOST
