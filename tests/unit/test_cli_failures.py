"""Errors leave the command line as a sentence, a next step and a status, whatever went wrong and when."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import pyvhostvdpa
import pyvhostvdpa.cli.examples
from pyvhostvdpa.cli import failure, main

# that which the tests import, installed or in the tree
WHERE = Path(pyvhostvdpa.__path__[0]).parent
CACHE = tempfile.TemporaryDirectory(prefix="pycache-")
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(WHERE),
    "PYTHONUNBUFFERED": "",
    # as an installed package is: compiled
    "PYTHONDONTWRITEBYTECODE": "",
    "PYTHONPYCACHEPREFIX": CACHE.name,
}
EXAMPLES = sorted(p.stem for p in Path(pyvhostvdpa.cli.examples.__path__[0]).glob("[!_]*.py"))
IMPORT_FAILS = """
import sys

class Fails:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise {error}

sys.meta_path.insert(0, Fails())
from pyvhostvdpa.cli import main
sys.exit(main({arguments!r}))
"""
HEAVY = ("argparse", "pyvhostvdpa.cli.commands", "pyvhostvdpa.host.mgmt", "pyvhostvdpa.migration.session", "psutil")
OUT_OF = {
    "descriptors": (f"OSError({errno.EMFILE}, 'Too many open files')", "may not open more files", "ulimit -n"),
    "memory": ("MemoryError()", "not enough memory", "free memory"),
    "mappings": (
        "ImportError('libx.so: failed to map segment from shared object')",
        "not enough memory",
        "free memory",
    ),
    "threads": ('RuntimeError("can\'t start new thread")', "not enough memory", "free memory"),
    "parts": ("ModuleNotFoundError(\"No module named 'cffi'\")", "cannot be loaded", "pip install"),
}


def run(
    argv: Sequence[str],
    stdout: int | None = subprocess.PIPE,
    before: Callable[[], None] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        preexec_fn=before,
        cwd="/",
        env={**ENVIRONMENT, **environment},
    )


def command(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return run(["-m", "pyvhostvdpa", *arguments], **options)  # type: ignore[arg-type]


def explained(done: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """Return what was printed to standard error, and check that it contains no traceback."""
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == status, done.stderr
    assert "next: " in done.stderr
    return done.stderr


# -- while modules are loaded -----------------------------------------------------------


@pytest.mark.parametrize("module", HEAVY)
def test_interrupt_during_an_import_is_status_130(module: str) -> None:
    script = IMPORT_FAILS.format(module=module, error="KeyboardInterrupt", arguments=["migrate", "a", "b"])
    done = run(["-c", script])
    assert done.stderr.startswith("vhost-vdpa: interrupted; ")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 130


@pytest.mark.parametrize("module", HEAVY)
@pytest.mark.parametrize("lack", OUT_OF)
def test_lack_during_an_import_is_explained(module: str, lack: str) -> None:
    error, what, hint = OUT_OF[lack]
    done = run(["-c", IMPORT_FAILS.format(module=module, error=error, arguments=["migrate", "a", "b"])])
    said = explained(done)
    assert what in said
    assert hint in said


def test_memory_error_that_python_lost_is_explained_where_memory_is_limited() -> None:
    fails = IMPORT_FAILS.format(
        module="pyvhostvdpa.cli.migrate",
        error="SystemError('error return without exception set')",
        arguments=["migrate"],
    )
    done = run(["-c", fails], before=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)))
    assert "not enough memory" in explained(done)
    assert "Traceback" in run(["-c", fails]).stderr, "without a limit it is a fault of the program"


@pytest.mark.parametrize("most", range(5, 23))
def test_receive_with_few_descriptors_is_explained(most: int, tmp_path: Path) -> None:
    done = command(
        "receive",
        "/dev/null",
        "--listen",
        f"unix:{tmp_path}/there",
        before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)),
    )
    said = explained(done)
    assert "may not open more files" in said or "not a vhost-vdpa character device" in said


@pytest.mark.parametrize("mebibytes", range(24, 151, 6))
def test_receive_with_little_address_space_is_explained(mebibytes: int, tmp_path: Path) -> None:
    size = mebibytes << 20

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    if run(["-c", "import runpy"], before=limit).returncode:
        # Python itself does not start with so little
        return
    done = command("receive", "/dev/null", "--listen", f"unix:{tmp_path}/there", before=limit)
    said = explained(done)
    assert "not enough memory" in said or "not a vhost-vdpa character device" in said


# -- standard streams -----------------------------------------------------------------


BUFFERED = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])


@BUFFERED
@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["list", "-j"], ["help", "start"], ["help", "migrate"]]
)
def test_output_to_a_full_device_is_explained(arguments: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        said = explained(command(*arguments, stdout=full.fileno(), PYTHONUNBUFFERED=unbuffered))
    assert "standard output: No space left on device" in said


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "-j"], ["migrate", "a", "b"]])
def test_closed_output_is_explained(arguments: list[str]) -> None:
    said = explained(command(*arguments, stdout=None, before=lambda: os.close(1)))
    assert "standard output is closed" in said


@BUFFERED
@pytest.mark.parametrize("arguments", [["list", "-j"], ["help", "api"]])
def test_reader_that_leaves_ends_the_command_silently(arguments: list[str], unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = command(*arguments, stdout=write, PYTHONUNBUFFERED=unbuffered)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1


def test_json_does_not_mix_with_words_when_standard_error_is_closed() -> None:
    done = command("list", "-j", before=lambda: os.close(2))
    assert done.returncode == 0
    assert done.stdout.startswith("{")
    empty = command("list", before=lambda: os.close(2))
    assert (empty.returncode, empty.stdout) == (0, "")


@BUFFERED
@pytest.mark.parametrize(("word", "status"), [("list", 0), ("migrate", 2), ("probe", 1)])
def test_standard_error_that_is_full_does_not_change_the_status(word: str, status: int, unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pyvhostvdpa", word, *(["/dev/null"] if word == "probe" else [])],
            stderr=full,
            stdout=subprocess.PIPE,
            check=False,
            cwd="/",
            env={**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == status


@pytest.mark.parametrize("page", ["start", "benchmarks", "ladder", "migration"])
def test_pages_print_where_only_ascii_is_possible(page: str) -> None:
    done = command("help", page, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


def test_a_message_prints_where_only_ascii_is_possible() -> None:
    done = command("migrate", "/nö…", "/b", PYTHONIOENCODING="ascii")
    assert "..." in explained(done)


# -- everything else ----------------------------------------------------------------


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e400", "1e300", "infinity", "99999999999999T"])
@pytest.mark.parametrize("option", ["--memory", "--write", "--limit"])
def test_a_size_that_no_machine_has_is_wrong_usage(option: str, text: str) -> None:
    done = command("migrate", "a", "b", f"{option}={text}")
    assert "not a size" in explained(done, status=2)


@pytest.mark.parametrize("option", ["--pairs", "--downtime", "--frame-size"])
def test_a_number_beyond_reason_is_wrong_usage(option: str) -> None:
    for text in ("9" * 12, "9" * 5000, "\N{ARABIC-INDIC DIGIT THREE}"):
        assert "not a number from 1 to" in explained(command("migrate", "a", "b", option, text), status=2)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_without_its_argument_prints_its_usage(name: str) -> None:
    done = run(["-m", f"pyvhostvdpa.cli.examples.{name}"])
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a"), "/a: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied"),
        (OSError(errno.ENFILE, "x"), "this machine may not open more files"),
        (BlockingIOError(errno.EAGAIN, "x"), "no further process or thread"),
    ],
)
def test_any_oserror_is_explained_with_a_next_step(
    error: OSError, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failure.explain(error) == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert "next: " in printed


def test_a_mistake_of_the_program_is_not_hidden() -> None:
    assert failure.explain(AssertionError()) is None
    assert failure.explain(TypeError()) is None


def test_main_returns_the_status_of_a_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "/dev/null"]) == 1
    assert "next: " in capsys.readouterr().err


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_name_that_somebody_else_chose_cannot_control_the_terminal(
    stream: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "vdpa0\x1b[2J\x9b31m\x07\tnext\n"
    with failure.Streams():
        if stream == "stdout":
            print(name, end="")
        else:
            failure.report(name.rstrip())
    assert getattr(capsys.readouterr(), "out" if stream == "stdout" else "err") == "vdpa0?[2J?31m?\tnext\n"
