"""The command line: what goes where, which status comes out."""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from labkit import accelerator, cli, host, in_tree, output, pair, soak, values
from labkit.errors import EXIT_PIPE, LabError
from labkit.session import Session
from labkit.tree import Tree

LAB = Path(cli.__file__).parents[1] / "lab"


def lab(*words, **environment):
    return subprocess.run([LAB, *words], capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_help_names_every_action():
    text = lab("--help").stdout
    for action in cli.ACTIONS:
        assert f"\n    {action} " in text


def test_status_of_an_empty_cache(cache):
    state = json.loads(lab("status", "--json", PYVHOSTVDPA_CACHE=str(cache.root)).stdout)
    assert state["schema"] == "pyvhostvdpa/lab-status/1"
    assert state["kernels"] == []
    assert not state["tree"]["ready"]
    assert "lab setup" in lab("status", PYVHOSTVDPA_CACHE=str(cache.root)).stdout


def test_clean_says_what_it_freed(cache):
    cache.create()
    (cache.logs / "x").write_bytes(b"x" * 100000)
    done = lab("clean", PYVHOSTVDPA_CACHE=str(cache.root))
    assert done.returncode == 0
    assert "kB" in done.stderr
    assert done.stdout == ""
    assert not cache.root.exists()


def test_bad_devices_are_refused_before_anything_is_built(cache):
    done = lab("run", "--devices", "nothing:1", "--", "true", PYVHOSTVDPA_CACHE=str(cache.root))
    assert done.returncode == 125
    assert "Known kinds" in done.stderr
    assert "next:" in done.stderr


BAD_VALUES = {
    "no CPU": (["--cpus", "0"], "--cpus 0: a VM has 1 to 255 CPUs"),
    "CPUs below zero": (["--cpus=-3"], "--cpus -3"),
    "memory that is not a size": (["--memory", "much"], "--memory much: this is not a size"),
    "memory that is not enough": (["--memory", "64"], "a VM needs at least 256M"),
    "memory that no machine has": (["--memory", "999T"], "does not fit"),
    "memory without end": (["--memory", "inf"], "this is not a size"),
    "a variable without a name": (["--env", "=x"], "there is no name"),
    "no time": (["--timeout", "0"], "not a time to wait"),
    "time without end": (["--timeout", "inf"], "not a time to wait"),
    "a time that is no number": (["--timeout", "nan"], "not a time to wait"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_value_is_refused_before_anything_is_built(cache, case, monkeypatch, capsys):
    words, said = BAD_VALUES[case]
    monkeypatch.setattr(Session, "set_up", lambda *_: pytest.fail("a set-up was begun"))
    assert cli.main(["run", *words, "--", "true"]) == 125
    err = capsys.readouterr().err
    assert said in err
    assert "next: --" in err


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_soak_of_no_time_is_refused(cache, minutes, monkeypatch, capsys):
    monkeypatch.setattr(Session, "set_up", lambda *_: pytest.fail("a set-up was begun"))
    assert cli.main(["soak", "svq", f"--minutes={minutes}"]) == 125
    assert "not a time to wait" in capsys.readouterr().err


def test_status_of_another_users_cache_says_who_may_read_it(tmp_path):
    """The lab's files are read from a copy, as this checkout may be out of another user's reach."""
    if os.geteuid() != 0:
        pytest.skip("takes root to become another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(LAB.parent, folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        root = folder / "cache"
        (root / "trees" / Tree.identity()).mkdir(parents=True)
        (root / "kernels").mkdir()
        root.chmod(0o700)
        argv = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", folder / "tools" / "lab", "status"]
        environment = {**os.environ, "PATH": "/usr/bin:/bin", "PYVHOSTVDPA_CACHE": str(root)}
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 125, done.stderr
    assert f"the cache folder {root} cannot be read" in done.stderr
    assert "sudo tools/lab status" in done.stderr
    assert "Traceback" not in done.stderr


FULL = Path("/dev/full")


@pytest.mark.parametrize("words", [["status"], ["status", "--json"], ["soak"]], ids=" ".join)
def test_output_that_cannot_be_written_is_a_sentence(cache, words):
    with FULL.open("w") as full:
        done = subprocess.run([LAB, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 125
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", ">&- 2>&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_files_are_no_traceback(cache, closed):
    done = subprocess.run(["sh", "-c", f"exec {LAB} status {closed}"], capture_output=True, text=True, check=False)
    assert done.returncode == (0 if closed == "2>&-" else 125)
    assert done.stderr == "" if "2>" in closed else "Bad file descriptor" in done.stderr
    assert "Traceback" not in done.stderr


def test_reader_of_status_that_went_away_is_no_traceback(cache):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([LAB, "status"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == EXIT_PIPE
    assert "the reader of the output has gone" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_messages_that_cannot_be_written_are_no_reason_to_fail(cache, unbuffered):
    cache.create()
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with FULL.open("w") as full:
        done = subprocess.run([LAB, "clean"], stdout=subprocess.PIPE, stderr=full, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, b"")
    assert not cache.root.exists()


def test_file_opened_in_place_of_a_closed_standard_output_gets_none_of_it(tmp_path):
    """A socket or file that took number 1 would be sent what was meant for the user."""
    script = (
        "import os, sys; from labkit import output; output.occupy_standard_files()\n"
        "assert os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT) > 2\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "file")]
    environment = {**os.environ, "PYTHONPATH": str(LAB.parent)}
    done = subprocess.run(["sh", "-c", f"exec {shlex.join(words)} <&- >&- 2>&-"], env=environment, check=False)
    assert done.returncode == 0


def test_command_whose_output_finds_the_disk_full():
    with FULL.open("w") as full, pytest.raises(LabError, match="No space left on device"):
        output.writer(full.fileno())(b"x")


INTERRUPTED_IMPORT = """
import runpy, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "labkit.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
runpy.run_module("labkit", run_name="__main__")
"""


def test_interrupt_during_the_imports_is_a_sentence():
    environment = {**os.environ, "PYTHONPATH": str(LAB.parent)}
    words = [sys.executable, "-B", "-c", INTERRUPTED_IMPORT]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (130, "lab: interrupted\n")


def test_pair_that_fits_the_machine_only_once_is_refused(cache, monkeypatch, capsys):
    monkeypatch.setattr(values, "machine_memory", lambda: (6 << 30, "This machine has"))
    monkeypatch.setattr(Session, "set_up", lambda *_: pytest.fail("a set-up was begun"))
    assert cli.main(["pair", "--memory", "4G", "--", "true", "---", "true"]) == 125
    assert "two VMs with --memory 4096M each" in capsys.readouterr().err


def test_unexpected_error_of_the_system_is_a_sentence(cache, monkeypatch, capsys):
    """Stand-in: what no one has thought of."""

    def fails(_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/somewhere")

    monkeypatch.setitem(cli.ACTIONS, "status", fails)
    assert cli.main(["status"]) == 125
    assert capsys.readouterr().err.startswith("lab: /somewhere: Too many open files\n")


def test_run_without_a_command():
    done = lab("run")
    assert done.returncode == 125
    assert "next:" in done.stderr


def test_nothing_is_left_in_the_tree(tmp_path):
    # pytest itself may have compiled what it imported from the tree
    tools = tmp_path / "tools"
    shutil.copytree(LAB.parent, tools, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([tools / "lab", "--help"], capture_output=True, text=True, check=True)
    assert "status" in done.stdout
    subprocess.run([tools / "lab", "status"], capture_output=True, check=False)
    assert not list(tools.rglob("__pycache__"))


def test_command_keeps_its_own_options():
    options = cli.parse(["run", "--timeout", "5", "--", "ls", "-l", "--kernel", "x"])
    assert options.command == ["ls", "-l", "--kernel", "x"]
    assert cli.request(options, options.command).timeout == 5


def test_arguments_for_pytest():
    options = cli.parse(["test", "--kernel", "7.2", "tests/unit", "-k", "a or b", "--accel"])
    assert options.kernel == "7.2"
    assert options.rest == ["tests/unit", "-k", "a or b", "--accel"]
    assert cli.parse(["test", "-x"]).rest == ["-x"]


def test_pair_of_commands():
    assert pair.split(["a", "-x", "---", "b"]) == (["a", "-x"], ["b"])
    for words in ([], ["a"], ["a", "---"], ["a", "---", "b", "---", "c"]):
        with pytest.raises(LabError, match="---"):
            pair.split(words)


def test_prefix_is_put_before_whole_lines():
    got = []
    sink = output.Prefixed("a| ", got.append)
    sink(b"one\ntw")
    sink(b"o\nrest")
    sink.flush()
    assert b"".join(got) == b"a| one\na| two\na| rest\n"


def test_reader_that_went_away():
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(LabError) as caught:
        output.writer(write)(b"x")
    os.close(write)
    assert caught.value.status == EXIT_PIPE


def test_soak_test_names_its_options(tmp_path):
    folder = tmp_path / soak.FOLDER
    folder.mkdir(parents=True)
    (folder / "test_long.py").write_text('"""A long one."""\n# lab: --memory 8G --devices vdpa_sim_net:4\n')
    (folder / "conftest.py").write_text("")
    assert list(soak.available(tmp_path)) == ["long"]
    path = soak.choose(tmp_path, "long")
    assert soak.options(path) == ["--memory", "8G", "--devices", "vdpa_sim_net:4"]
    assert soak.summary(path) == "A long one."
    assert soak.tests(tmp_path, path) == ["tests/soak/test_long.py"]
    with pytest.raises(LabError, match="no soak test"):
        soak.choose(tmp_path, "short")


def test_soak_test_brings_others_along_and_may_be_called_with_dashes(tmp_path):
    folder = tmp_path / soak.FOLDER
    folder.mkdir(parents=True)
    (folder / "very_long.py").write_text("# lab: --debug-kernel\n# also: tests/kernel/a.py tests/kernel/b.py\n")
    path = soak.choose(tmp_path, "very-long")
    assert soak.tests(tmp_path, path) == ["tests/soak/very_long.py", "tests/kernel/a.py", "tests/kernel/b.py"]


def test_soak_test_that_needs_no_device_boots_no_vm(cache, monkeypatch, capfd):
    """On an emulated processor a fuzzer would do a hundredth of what it does here."""
    asked = []
    monkeypatch.setattr(Session, "set_up", lambda *_: None)
    monkeypatch.setattr(Session, "run", lambda *_: pytest.fail("a VM was started"))
    monkeypatch.setattr(in_tree, "run", lambda _, argv, *rest: asked.append((argv, rest)) or 0)
    assert cli.main(["soak", "restore", "--env", "PYVHOSTVDPA_SOAK_SEED=7"]) == 0
    [(argv, (limit, _, environment))] = asked
    assert argv[-1] == "tests/soak/restore.py"
    assert limit is None
    assert environment == {"PYVHOSTVDPA_SOAK_MINUTES": "30", "PYVHOSTVDPA_SOAK_SEED": "7"}


def test_kvm_only_after_a_proof(cache, monkeypatch):
    """Stand-in for a VM's boot: which verdict follows from it, and that it is remembered."""
    cache.create()
    proofs = []
    monkeypatch.setattr(accelerator, "identity", lambda: "this boot")
    monkeypatch.setattr(os, "access", lambda *_: True)
    assert accelerator.decide(cache, "auto", proofs.append).mode == "kvm"
    assert accelerator.decide(cache, "auto", proofs.append).mode == "kvm"
    assert len(proofs) == 1
    monkeypatch.setattr(accelerator, "identity", lambda: "another boot")

    def broken(_):
        raise LabError("QEMU crashed")

    verdict = accelerator.decide(cache, "auto", broken)
    assert verdict.mode == "tcg"
    assert "QEMU crashed" in verdict.why


def test_no_kvm_device(cache, monkeypatch):
    monkeypatch.setattr(accelerator, "DEVICE", Path("/nonexistent"))
    verdict = accelerator.decide(cache, "auto", pytest.fail)
    assert verdict.mode == "tcg"


def test_no_root_no_set_up(monkeypatch, capsys):
    monkeypatch.setattr(host.os, "geteuid", lambda: 1000)
    assert cli.main(["run", "--", "true"]) == 125
    assert "sudo tools/lab run" in capsys.readouterr().err


def test_wrong_option_prints_the_usage_of_its_sub_command(capsys):
    for words in (["demo", "--nonsense"], ["status", "extra"], ["run", "--nonsense", "--", "true"]):
        with pytest.raises(SystemExit) as stopped:
            cli.parse(words)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(f"usage: tools/lab {words[0]} ")


def test_bare_lab_prints_its_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse([])
    assert stopped.value.code == 0
    assert "demo" in capsys.readouterr().out
