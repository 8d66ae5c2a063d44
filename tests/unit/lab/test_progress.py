"""Steps: what is printed, what goes to the log, and which message a failure gets."""

import os
import time
from pathlib import Path

import pytest

from labkit.errors import LabError
from labkit.progress import Progress, diagnose, seconds


def test_output_goes_to_the_log_and_lines_to_stderr(tmp_path, capfd):
    log = tmp_path / "log"
    assert Progress().call("saying hello", ["echo", "hello"], log) == "hello\n"
    assert log.read_text() == "hello\n"
    out, err = capfd.readouterr()
    assert out == ""
    assert "saying hello: done" in err


def test_failure_shows_the_last_lines(tmp_path):
    with pytest.raises(LabError) as caught:
        Progress().call("breaking", ["sh", "-c", "seq 1 100; exit 3"], tmp_path / "log")
    assert "status 3" in caught.value.why
    assert "| 100" in caught.value.why
    assert "| 50\n" not in caught.value.why
    assert str(tmp_path / "log") in caught.value.why
    assert caught.value.next_step


# A stand-in for apt and pip: real messages of these programs, for trouble that is not real.
@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("unshare: cannot change root filesystem propagation: Invalid argument", "not a mount point"),
        ("E: Failed to fetch http://x/y.deb  Hash Sum mismatch", "checksum"),
        ("E: Failed to fetch http://x/y.deb  File has unexpected size (1 != 2). Mirror sync in progress?", "checksum"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "checksum"),
        ("Err:1 http://deb.debian.org trixie  Temporary failure resolving 'deb.debian.org'", "network"),
        ("W: Failed to fetch http://x  Could not connect to x:80 (1.2.3.4), connection timed out", "network"),
        ("dpkg: error: failed to write: No space left on device", "disk is full"),
        ("W: GPG error: The following signatures couldn't be verified because ... NO_PUBKEY 6ED0E7B8", "not signed"),
        ("E: Release file for http://x/InRelease is not valid yet", "clock"),
        ("E: dpkg was interrupted, you must manually run 'dpkg --configure -a'", "interrupted"),
        ("ssl.SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED]", "certificate"),
        ("unshare: unshare failed: Operation not permitted", "root"),
    ],
)
def test_known_troubles_are_named(tmp_path, said, why):
    with pytest.raises(LabError) as caught:
        Progress().call("fetching", ["sh", "-c", 'echo "$0"; exit 100', said], tmp_path / "log")
    assert why in caught.value.why
    assert caught.value.next_step


def test_unknown_trouble_is_not_explained_away():
    assert diagnose("Segmentation fault") is None


def test_interrupted_step_leaves_no_process(tmp_path):
    pid_file = tmp_path / "pid"

    class Interrupting(Progress):
        def _tick(self, title, elapsed, detail):
            if pid_file.exists():
                raise KeyboardInterrupt

    progress = Interrupting()
    progress.live = True
    with pytest.raises(KeyboardInterrupt):
        progress.call("sleeping", ["sh", "-c", f"sleep 60 & echo $! > {pid_file}; wait"], tmp_path / "log")
    pid = int(pid_file.read_text())
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.02)
    os.kill(pid, 9)
    pytest.fail("the step's process outlived it")


@pytest.mark.parametrize(
    ("value", "text"), [(1.26, "1.3 s"), (59.6, "60 s"), (163.4, "2 min 43 s"), (179.9, "3 min 0 s")]
)
def test_durations(value, text):
    assert seconds(value) == text
