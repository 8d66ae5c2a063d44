"""User Mode Linux as a home: its kernel, what it is told, what it refuses, which tests it runs."""

import json
import socket
import subprocess
from pathlib import Path

import pytest

from labkit import cli, devices, mutants, uml_config, uml_home, uml_kernel, uml_tests, vm
from labkit.errors import LabError
from labkit.session import PROJECT, Request
from labkit.testing import KERNEL, Selection
from labkit.uml_kernel import UmlKernel


def home(tmp_path):
    return uml_home.Uml(UmlKernel(tmp_path / "kernel"), None, None)


def spec(tmp_path, **changes):
    values = {
        "command": ["echo", "it's", "$HOME"],
        "folder": Path("/"),
        "kernel": Path("/k"),
        "boot_modules": [],
        "busybox": Path("/bin/busybox"),
        "disks": [],
        "devices": devices.parse(["vdpa_sim_net:1"]),
        "console_log": tmp_path / "console",
        "mode": "uml",
        "memory": "512M",
        "home": home(tmp_path),
    }
    return vm.Spec(**{**values, **changes})


def test_plain_kernel_has_the_devices_and_does_not_watch_itself():
    assert uml_config.PLAIN.required["VDPA_SIM_NET"] == "m"
    assert not {"KASAN", "PROVE_LOCKING", "DEBUG_KMEMLEAK"} & uml_config.PLAIN.settings.keys()


@pytest.mark.parametrize("flavour", [uml_config.PLAIN, uml_config.DEBUG], ids=lambda flavour: flavour.name)
def test_what_is_required_is_set(flavour):
    assert {name: flavour.settings[name] for name in flavour.required} == dict(flavour.required)


def test_builds_of_both_kinds_lie_apart():
    kinds = uml_config.PLAIN, uml_config.DEBUG
    assert len({flavour.folder for flavour in kinds}) == len({flavour.name for flavour in kinds}) == 2


def test_folders_are_bound_and_images_are_disks(tmp_path):
    mounts = {"/opt/vmm/qemu": Path("/cache/a/image"), "/opt/vmm/guest": Path("/cache/b/image")}
    lines = vm.configuration(spec(tmp_path, shares=[Path("/a b")], mounts=mounts)).splitlines()
    assert "    busybox mkdir -p '/a b'; must busybox mount --bind /lab/share0 '/a b'" in lines
    assert any("mount -t ext4 -o ro,noatime /dev/ubda /opt/vmm/qemu" in line for line in lines)
    assert any("mount -t ext4 -o ro,noatime /dev/ubdb /opt/vmm/guest" in line for line in lines)


def test_an_entry_of_the_iotlb_maps_a_small_page(tmp_path):
    assert "must modprobe vhost_vdpa max_iotlb_entries=1000000" in vm.configuration(spec(tmp_path))


def test_ports_are_serial_lines_and_images_read_only_disks(tmp_path):
    near, far = socket.socketpair()
    with near, far:
        mine = spec(tmp_path, mounts={"/opt/vmm/qemu": Path("/cache/a/image")})
        words = uml_home.command_line(mine, {1: far})
        assert f"ssl1=fd:{far.fileno()}" in words
    assert "ubd0r=/lab/image0/image" in words
    assert "mem=512M" in words


def test_kernel_that_ends_itself_by_a_signal_ends_its_namespace():
    words = uml_kernel.as_child(["sh", "-c", "kill -ABRT $$"])
    done = subprocess.run(words, capture_output=True, timeout=20, check=False)
    assert done.returncode == 128 + 6


class Script(vm.Qemu):
    """A home whose machines are a script that knows the ports' descriptors as $1, $2 and $3."""

    program = "the script"

    def __init__(self, text):
        self.text, self.left = text, 0

    def start(self, _spec, ends, _shell):
        numbers = [str(end.fileno()) for end in ends.values()]
        argv = ["bash", "-c", self.text, "script", *numbers]
        return subprocess.Popen(argv, pass_fds=[end.fileno() for end in ends.values()], stdin=subprocess.DEVNULL)

    def leave(self):
        self.left += 1


def test_a_machine_is_what_its_home_starts(tmp_path):
    script = Script('echo booted >&$1; echo started >&$1; printf out >&$2; echo "exit 3 3 0" >&$1; sleep 20')
    out = []
    assert vm.run_once(spec(tmp_path, home=script), out.append, out.append) == 3
    assert b"".join(out) == b"out"
    assert script.left == 1


def test_a_machine_that_ends_early_is_named(tmp_path):
    with pytest.raises(LabError, match="the script's status 4"):
        vm.run_once(spec(tmp_path, home=Script("exit 4")), print, print)


@pytest.mark.parametrize(
    "words",
    [
        ["--icount"],
        ["--accel", "tcg"],
        ["--cpus", "2"],
        ["--devices", "vdpa_sim_net:2", "--devices", "vduse:1"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("action", ["run", "test", "soak"])
def test_what_it_cannot_be_is_refused_before_anything_is_built(cache, action, words, capsys):
    last = {"run": ["--", "true"], "test": [f"{KERNEL}/test_door.py"], "soak": ["mutants"]}[action]
    assert cli.main([action, "--machine", "uml", *words, *last]) == 125
    said = capsys.readouterr().err
    assert "--machine uml takes no" in said
    assert "next: " in said
    assert not cache.root.exists()


@pytest.mark.parametrize("action", ["shell", "pair"])
def test_sub_commands_for_virtual_machines_alone_have_no_such_option(action, capsys):
    with pytest.raises(SystemExit):
        cli.parse([action, "--machine", "uml"])
    assert "unrecognized arguments: --machine" in capsys.readouterr().err


def test_one_cpu_may_be_asked_for():
    asked = cli.request(cli.parse(["run", "--machine", "uml", "--cpus", "1", "--", "true"]), ["true"])
    assert (asked.machine, asked.cpus) == ("uml", 1)


def test_machine_is_an_option_of_the_lab_not_of_pytest():
    options = cli.parse(["test", "--machine", "uml", "--vmm", f"{KERNEL}/test_door.py", "-k", "some"])
    assert (options.machine, options.vmm, options.rest) == ("uml", True, [f"{KERNEL}/test_door.py", "-k", "some"])


@pytest.fixture
def left_out(monkeypatch):
    listed = {f"{KERNEL}/test_bad.py": "It takes two CPUs.", f"{KERNEL}/test_door.py::test_bad": "So does it."}
    monkeypatch.setattr(uml_tests, "LEFT_OUT", listed)


WITHOUT = [f"--ignore={KERNEL}/test_bad.py", f"--deselect={KERNEL}/test_door.py::test_bad"]


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ([], [KERNEL]),
        (["-k", "some"], [KERNEL, "-k", "some"]),
        ([f"{KERNEL}/"], [f"{KERNEL}/"]),
        ([f"{KERNEL}/test_door.py", "-x"], [f"{KERNEL}/test_door.py", "-x"]),
    ],
)
def test_all_of_the_tests_are_those_that_can_run(left_out, given, then):
    assert uml_tests.arguments(given) == [*then, *WITHOUT]
    assert Selection([*then, *WITHOUT]).parts == [KERNEL]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([f"{KERNEL}/test_bad.py::test_one"], "It takes two CPUs"),
        ([f"{KERNEL}/test_door.py::test_bad"], "So does it"),
        (["tests/unit"], "Only tests on a device"),
        (["tests/icount"], "Only tests on a device"),
        (["install"], "needs no device"),
    ],
)
def test_what_it_cannot_run_is_refused_with_the_reason(left_out, given, why):
    with pytest.raises(LabError) as caught:
        uml_tests.arguments(given)
    assert why in caught.value.why


def test_what_is_left_out_exists():
    for name in uml_tests.LEFT_OUT:
        file, _, test = name.partition("::")
        assert f"def {test}" in (PROJECT / file).read_text()


class OneMachine:
    """A session that remembers the plans and limits of machines, each of which does all that it is given."""

    def __init__(self):
        self.boots, self.progress = [], self

    def say(self, text):
        pass

    def run(self, request, _):
        plan, results = (Path(word) for word in request.command[-2:])
        names = [step["name"] for step in json.loads(plan.read_text())]
        assert all(uml_tests.without()[0] in step["tests"] for step in json.loads(plan.read_text()))
        self.boots.append((names, request.timeout))
        lines = [json.dumps({"name": name, "status": int(name != mutants.BASELINE)}) for name in names]
        results.write_text("\n".join(lines))


def test_each_mutant_has_a_machine_of_its_own_and_little_time(tmp_path, monkeypatch):
    run = mutants.Run.__new__(mutants.Run)
    run.session, run.folder, run.results = OneMachine(), tmp_path, []
    run.request = Request(machine="uml")
    build = type("Build", (), {"built": lambda *_: Path("/m.ko"), "forget_others": lambda _: None})
    monkeypatch.setattr(mutants.Run, "_module_build", lambda *_: build())
    listed = [mutants.Mutant(n, "tools/vdpa_hwsim/f.c", "a", "b", "lab", ["tests/x.py"]) for n in ("one", "two")]
    run._in_vm(None, listed)
    assert [names for names, _ in run.session.boots] == [[mutants.BASELINE], ["one"], ["two"]]
    assert [limit for _, limit in run.session.boots] == [mutants.VM_LIMIT_S, *[mutants.UML_LIMIT_S] * 2]
    assert [result.verdict for result in run.results] == ["killed", "killed"]
