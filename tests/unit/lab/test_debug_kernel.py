"""A kernel that watches itself: its configuration, how it is started, and what of its log counts."""

import os
import shutil
import subprocess

import pytest

from labkit import archive, kernel, kernel_log, kernel_source, uml
from labkit.chroot import contained
from labkit.errors import LabError
from labkit.session import Request, Session
from labkit.uml_config import DEBUG

SOUND = "\n".join(uml.WATCHING)


def test_settings_are_lines_of_a_configuration():
    text = kernel_source.configuration({"KASAN": "y", "STATIC_LINK": "n", "VDPA": "m"})
    assert text == "CONFIG_KASAN=y\n# CONFIG_STATIC_LINK is not set\nCONFIG_VDPA=m\n"


def test_kernel_configuration_names_rejected_options():
    text = kernel_source.configuration({**DEBUG.settings, "KASAN": "n"})
    assert kernel_source.lacking(text, DEBUG.required) == ["CONFIG_KASAN=y"]


@pytest.mark.parametrize("setting", ["KASAN", "PROVE_LOCKING", "DEBUG_ATOMIC_SLEEP", "DEBUG_KMEMLEAK"])
def test_debug_kernel_checks_memory_locks_and_leaks(setting):
    assert DEBUG.required[setting] == "y"


REPORTS = (
    "BUG: KASAN: slab-out-of-bounds in hwsim_copy+0x12/0x80 [vdpa_hwsim]",
    "WARNING: possible circular locking dependency detected",
    "WARNING: CPU: 0 PID: 12 at lib/refcount.c:28 refcount_warn_saturate+0x1/0x2",
    "BUG: sleeping function called from invalid context at kernel/locking/mutex.c:585",
    "BUG: MAX_LOCKDEP_ENTRIES too low!",
    "kmemleak: Kernel memory leak detector disabled",
    "INFO: task kworker/u4:1:33 blocked for more than 120 seconds.",
    "Oops: general protection fault, probably for non-canonical address",
)
QUIET = (
    "KernelAddressSanitizer initialized",
    "Lock dependency validator: Copyright (c) 2006 Red Hat, Inc., Ingo Molnar",
    "vdpa_hwsim: loading out-of-tree module taints kernel.",
    "kmemleak: Kernel memory leak detector initialized (mem pool available: 39000)",
)


@pytest.mark.parametrize("line", REPORTS)
def test_a_report_is_a_finding(line):
    assert kernel_log.reports(["something else", f"[   12.3] {line}"]) == [f"[   12.3] {line}"]


def test_debug_kernel_boot_messages_are_not_errors():
    assert kernel_log.reports(QUIET) == []
    assert uml.findings("\n".join(QUIET), "") == []


def test_a_kernel_that_does_not_watch_is_a_finding():
    assert len(uml.findings("Linux version 6.12", "")) == len(uml.WATCHING)


LEAKS = """unreferenced object 0x100 (size 64):
  backtrace (crc 0):
    kmalloc+0x1/0x2
    hwsim_dev_add+0x10/0x20 [vdpa_hwsim]
unreferenced object 0x200 (size 32):
  backtrace (crc 0):
    some_init+0x1/0x2
"""


def test_a_leak_counts_if_the_module_made_it():
    found = uml.findings(SOUND, LEAKS)
    assert found[0] == "unreferenced object 0x100 (size 64):"
    assert not any("some_init" in line for line in found)


def test_the_command_is_quoted_and_gets_the_labs_variables():
    text = uml.configuration(Request(command=["a b", "c"], environment={"X": "1 2"}))
    assert "'X=1 2' 'a b' c" in text
    assert "PYVHOSTVDPA_LAB_ACCEL=uml" in text


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("busybox"), reason="mounting takes root, and busybox")
def test_the_command_runs_in_the_project_though_something_is_mounted_over_where_it_lies(tmp_path, monkeypatch):
    over, shared, run = tmp_path / "over", tmp_path / "shared", tmp_path / "run"
    for folder in (over, shared, run):
        folder.mkdir()
    (shared / "file").write_text("the project's")
    monkeypatch.setattr(uml, "PROJECT", over / "a project")
    monkeypatch.setattr(uml, "SHARED", str(shared))
    monkeypatch.setattr(uml, "RUN", str(run))
    config = tmp_path / "config.sh"
    config.write_text(uml.configuration(Request(command=["cat", "file"])))
    script = f"mount -t tmpfs over {over}; . {config}; lab_mounts && lab_command"
    done = subprocess.run(contained(["sh", "-ec", script]), capture_output=True, text=True, check=True)
    assert done.stdout == "the project's"
    assert (run / "begun").exists()


def left(folder, **texts):
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("status", [0, 3])
def test_a_kernel_without_reports_leaves_the_commands_status(cache, tmp_path, capsys, status):
    folder = left(tmp_path, begun="", status=f"{status}\n", log=SOUND, leaks="")
    assert uml.judge(Session(cache=cache), folder) == status
    said = capsys.readouterr().err
    assert "nothing to report" in said
    assert (f"the command ended with status {status}" in said) is bool(status)


def test_a_command_that_never_began_is_an_error(cache, tmp_path):
    with pytest.raises(LabError, match="the command never began"):
        uml.judge(Session(cache=cache), left(tmp_path, status="2\n", log=SOUND, leaks=""))


def test_a_kernel_that_ends_early_is_an_error(cache, tmp_path):
    with pytest.raises(LabError, match="ended before the command did"):
        uml.judge(Session(cache=cache), left(tmp_path, begun="", log=SOUND))


def test_kernel_report_is_an_error_even_if_the_command_succeeds(cache, tmp_path):
    with pytest.raises(LabError, match="reports 1 errors"):
        uml.judge(Session(cache=cache), left(tmp_path, begun="", status="0\n", log=f"{SOUND}\n{REPORTS[0]}", leaks=""))


def test_the_latest_kernel_is_the_one_that_the_archive_named(cache):
    for release in ("6.12.9+deb13-amd64", "7.2.1+deb13-amd64"):
        folder = cache.kernels / release
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(f'{{"version": "{release}"}}')
    assert kernel.find(cache, archive.LATEST) is None
    cache.latest_kernel.write_text("6.12.9+deb13-amd64\n")
    found = kernel.find(cache, archive.LATEST)
    assert found is not None
    assert found.release == "6.12.9+deb13-amd64"
