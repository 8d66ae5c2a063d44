"""Progress on standard error, and the running of sub-processes whose output goes to a log."""

import contextlib
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from labkit import output
from labkit.errors import LabError

REFRESH_S = 0.2
REMIND_S = 15.0
SHOWN_LOG_LINES = 15

# What a log says, what it means, and what to do about it. The first hit counts.
DIAGNOSES: tuple[tuple[str, str, str], ...] = (
    (
        r"No space left on device|write error: .*space",
        "The disk is full.",
        "free some space (tools/lab clean removes the lab's own cache) and run the same command again",
    ),
    (
        r"Hash Sum mismatch|THESE PACKAGES DO NOT MATCH THE HASHES|File has unexpected size",
        "A download does not have the checksum that its signed index states; it was thrown away.",
        "run the same command again; if it stays, a proxy or mirror on the way serves damaged or old files",
    ),
    (
        r"NO_PUBKEY|is not signed|invalid signature|EXPKEYSIG|signatures couldn't be verified",
        "The package index is not signed by a key that this machine knows.",
        "apt-get update && apt-get install debian-archive-keyring",
    ),
    (
        r"Release file .* (is not valid yet|expired)|certificate is not yet valid",
        "The archive's index is outside its period of validity: this machine's clock may be wrong.",
        "set the clock, then run the same command again",
    ),
    (
        r"Temporary failure resolving|Could not resolve|Name or service not known|Temporary failure in name resolution"
        r"|Could not connect|Connection (failed|refused|timed out)|Network is unreachable|Unable to connect"
        r"|NewConnectionError|Failed to establish a new connection|No route to host|Failed to fetch",
        "The network or the archive cannot be reached.",
        "check the network (http_proxy, https_proxy and apt's own settings are honoured), then run the same again",
    ),
    (
        r"Unable to locate package|has no installation candidate",
        "This machine's package sources do not have it.",
        "Ubuntu: add-apt-repository universe; Debian: add `main` to the sources; then run the same command again",
    ),
    (
        r"dpkg was interrupted|Could not get lock",
        "Another package installation on this machine is at work, or was interrupted.",
        "dpkg --configure -a",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "A server's certificate is not trusted.",
        "export PIP_CERT=/path/to/ca-bundle.crt and run the same command again",
    ),
    (
        r"cannot change root filesystem propagation: Invalid argument",
        "The root directory is not a mount point, as in a plain chroot: mounts cannot be kept apart from the host's.",
        "outside: mount --bind DIR DIR, then chroot DIR (or systemd-nspawn -D DIR), and run the same command again",
    ),
    (
        r"mount: .*(permission denied|must be superuser)|unshare failed: Operation not permitted",
        "Mounting is not permitted here: the lab needs real root (in a container: a privileged one).",
        "run the same command as root on the machine itself",
    ),
)


def diagnose(text: str) -> tuple[str, str] | None:
    """Return (why, next step) for a known trouble that shows in a log's text."""
    for pattern, why, next_step in DIAGNOSES:
        if re.search(pattern, text, re.IGNORECASE):
            return why, next_step
    return None


def seconds(value: float) -> str:
    """Return a duration for humans."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


class Progress:
    """Says on standard error what the lab is doing: one line a step, and a live line on a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = sys.stderr.isatty() and not quiet
        self._shown = False

    def say(self, text: str) -> None:
        """Print one line."""
        self._clear()
        if not self.quiet:
            output.say(f"lab: {text}")

    def _clear(self) -> None:
        if self._shown:
            output.say_live("\r\x1b[K")
            self._shown = False

    def _tick(self, title: str, elapsed: float, detail: str) -> None:
        width = shutil.get_terminal_size((100, 24)).columns - 1
        line = f"lab: {title} … {seconds(elapsed)}  {detail}"
        output.say_live(f"\r\x1b[K{line[:width]}")
        self._shown = True

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step and, when it is done, how long it took."""
        begin = time.monotonic()
        if self.live:
            self._tick(title, 0.0, "")
        else:
            self.say(f"{title} …")
        yield
        self.say(f"{title}: done, {seconds(time.monotonic() - begin)}")

    def call(
        self,
        title: str,
        argv: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        next_step: str = "run the same command again: it continues where it can and redoes the rest",
    ) -> str:
        """Run a command as one step, its output in `log`; return that output."""
        with self.step(title):
            status, text = self._pump(title, argv, log, env)
            if status:
                raise self._failure(title, status, text, log, next_step)
        return text

    def attempt(self, title: str, argv: Sequence[str], log: Path) -> tuple[int, str]:
        """Run a command that may fail as one step, its output in `log`; return its exit status and that output."""
        with self.step(title):
            return self._pump(title, argv, log, None)

    def _pump(self, title: str, argv: Sequence[str], log: Path, env: Mapping[str, str] | None) -> tuple[int, str]:
        log.parent.mkdir(parents=True, exist_ok=True)
        begin = last = time.monotonic()
        text, detail = bytearray(), ""
        with (
            log.open("wb") as sink,
            subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            ) as child,
            selectors.DefaultSelector() as selector,
            _ended(child),
        ):
            assert child.stdout is not None
            selector.register(child.stdout, selectors.EVENT_READ)
            while True:
                if selector.select(REFRESH_S):
                    chunk = os.read(child.stdout.fileno(), 65536)
                    if not chunk:
                        break
                    sink.write(chunk)
                    text += chunk
                    detail = _last_line(text)
                now = time.monotonic()
                if self.live:
                    self._tick(title, now - begin, detail)
                elif now - last > REMIND_S:
                    last = now
                    self.say(f"{title} … {seconds(now - begin)}  {detail[:120]}")
            return child.wait(), text.decode(errors="replace")

    @staticmethod
    def _failure(title: str, status: int, text: str, log: Path, next_step: str) -> LabError:
        tail = "\n".join(f"| {line}" for line in text.splitlines()[-SHOWN_LOG_LINES:])
        known = diagnose(text[-20000:])
        why = known[0] if known else f"The command ended with status {status}."
        return LabError(f"failed: {title}", f"{why}\n{tail}\nwhole log: {log}", known[1] if known else next_step)


@contextlib.contextmanager
def _ended(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """See to it that a child does not outlive the step that it belongs to."""
    try:
        yield
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


def _last_line(text: bytearray) -> str:
    lines = [line for line in re.split(rb"[\r\n]+", bytes(text[-600:])) if line.strip()]
    return lines[-1].decode(errors="replace").strip() if lines else ""
