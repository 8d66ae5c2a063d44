"""The command line: what goes where, which status comes out."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from labkit import accelerator, cli, host, output, pair, soak
from labkit.errors import EXIT_PIPE, LabError

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
    (cache.root / "x").write_bytes(b"x" * 100000)
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


def test_variables_for_the_command(monkeypatch):
    monkeypatch.setenv("MINE", "1")
    monkeypatch.delenv("OTHER", raising=False)
    assert cli.parse_environment(["MINE", "OTHER", "A=b=c"]) == {"MINE": "1", "A": "b=c"}


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
