"""A VM's description: its configuration script and QEMU's command line."""

import selectors
import socket
import subprocess
from pathlib import Path

import pytest

from labkit import devices, kernel_log, qemu, vm
from labkit.errors import LabError, NotBooted


def spec(**changes):
    values = {
        "command": ["echo", "it's", "$HOME"],
        "folder": Path("/"),
        "kernel": Path("/k"),
        "boot_modules": [],
        "busybox": Path("/bin/busybox"),
        "disks": [Path("/root,1.img")],
        "devices": devices.parse(["vdpa_sim_net:1,use_va=0"]),
        "console_log": Path("/log"),
    }
    return vm.Spec(**{**values, **changes})


def test_command_reaches_the_vm_as_it_was_given():
    script = vm.configuration(spec()) + "\nlab_command"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "it's $HOME\n"


def test_environment_of_the_command():
    script = vm.configuration(spec(command=["env"], environment={"TERM": "x y"})) + "\nlab_command"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert "TERM=x y" in done.stdout.splitlines()
    assert "PYVHOSTVDPA_LAB=1" in done.stdout.splitlines()
    assert f"PATH={vm.INSIDE}/bin:" in done.stdout


def test_devices_of_the_vm():
    lines = vm.configuration(spec()).splitlines()
    loads = [line.strip() for line in lines if "modprobe" in line]
    assert loads == ["must modprobe vhost_vdpa", "must modprobe vdpa_sim use_va=0", "must modprobe vdpa_sim_net"]
    assert any("vdpa dev add name vdpa0 mgmtdev vdpasim_net" in line for line in lines)


def hardware(**changes):
    values = {
        "kernel": Path("/k"),
        "initrd_fd": 9,
        "disks": [Path("/root,1.img")],
        "shares": [qemu.Share(Path("/p"), "share0")],
        "ports": {1: 11, 2: 12, 3: 13},
        "console_log": Path("/log"),
    }
    return qemu.Hardware(**{**values, **changes})


def test_disks_are_read_only_and_commas_are_kept():
    argv = qemu.command_line(hardware())
    assert "if=none,id=disk0,file=/root,,1.img,format=raw,readonly=on" in argv


@pytest.mark.parametrize(("mode", "accelerator"), [("kvm", "kvm"), ("tcg", "tcg,thread=multi")])
def test_accelerator(mode, accelerator):
    argv = qemu.command_line(hardware(mode=mode))
    assert argv[argv.index("-accel") + 1] == accelerator
    assert "-icount" not in argv


def test_emulated_vm_with_several_cpus_is_started_by_the_trees_qemu():
    argv = qemu.command_line(hardware(tree=Path("/t")))
    assert argv[: argv.index("-nodefaults")] == [
        *("env", "QEMU_MODULE_DIR=/t/usr/lib/x86_64-linux-gnu/qemu"),
        *("/t/lib64/ld-linux-x86-64.so.2", "--library-path", "/t/usr/lib/x86_64-linux-gnu"),
        *("/t/usr/bin/qemu-system-x86_64", "-L", "/t/usr/share/qemu", "-L", "/t/usr/share/seabios"),
    ]


@pytest.mark.parametrize("mode", ["kvm", "icount"])
def test_other_vms_are_started_by_this_machines_qemu(mode):
    assert qemu.command_line(hardware(mode=mode, tree=Path("/t")))[0] == "qemu-system-x86_64"


def test_virtual_time():
    argv = qemu.command_line(hardware(mode="icount"))
    assert argv[argv.index("-icount") + 1] == "shift=0,sleep=off"


@pytest.mark.parametrize("name", ["init.sh", "main.sh", "uml.sh", "uml-init.sh"])
def test_scripts_of_the_vm_are_well_formed(name):
    subprocess.run(["sh", "-n", str(vm.GUEST / name)], check=True)


def silent(_):
    pass


class Boots:
    """Stands for Machine, whose emulator fails only once in some hundred boots: what each next VM comes to."""

    def __init__(self, spec, *outcomes):
        self.spec, self.outcomes, self.told = spec, list(outcomes), []

    def __call__(self, spec, out, err):
        assert spec is self.spec
        spec.console_log.write_text(f"{len(self.outcomes)} to go")
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def register(self, selector):
        pass

    finished = False

    def check(self):
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        self.finished, self.status = True, outcome

    def run(self, monkeypatch):
        monkeypatch.setattr(vm, "Machine", self)
        return vm.run(self.spec, silent, silent, self.told.append)


def test_emulated_vm_that_does_not_boot_is_started_a_second_time(tmp_path, monkeypatch):
    boots = Boots(spec(console_log=tmp_path / "console"), NotBooted("no boot"), 3)
    assert boots.run(monkeypatch) == 3
    assert boots.told == [f"no boot; starting it again (the console of the first: {tmp_path}/console-not-booted)"]
    assert (tmp_path / "console-not-booted").read_text() == "2 to go"


@pytest.mark.parametrize(
    ("mode", "outcomes"),
    [
        ("tcg", [NotBooted("no boot"), NotBooted("no boot again")]),
        ("tcg", [LabError("booted, and then not")]),
        ("kvm", [NotBooted("no boot")]),
    ],
)
def test_vm_is_not_started_again_after_another_failure(tmp_path, monkeypatch, mode, outcomes):
    boots = Boots(spec(console_log=tmp_path / "console", mode=mode), *outcomes)
    with pytest.raises(LabError) as caught:
        boots.run(monkeypatch)
    assert caught.value is outcomes[-1]
    assert not boots.outcomes


@pytest.mark.parametrize(
    ("status", "console", "kind"),
    [
        (1, "", LabError),
        (0, "", NotBooted),
        (-11, "", NotBooted),
        (1, f"{kernel_log.PANIC}: Attempted to kill init", NotBooted),
    ],
    ids=["QEMU refuses", "the VM ends", "QEMU crashes", "the kernel panics"],
)
def test_a_qemu_that_refuses_its_command_line_is_not_started_again(tmp_path, status, console, kind):
    (tmp_path / "console").write_text(console)
    machine = vm.Machine(spec(console_log=tmp_path / "console"), silent, silent)
    with subprocess.Popen(["sh", "-c", "echo why"], stdout=subprocess.PIPE) as process:
        machine._process = process
        process.wait()
        process.returncode = status
        death = machine._death()
    assert type(death) is kind
    assert "why" in death.why


PANICKED = f"""\
[    1.0] vdpa0: link up
[  1482.2] BUG: unable to handle page fault for address: ffffb2c3
[  1482.2] Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI
[  1482.2] RIP: 0010:eventfd_signal_mask+0x1f/0x90
[  1482.2]  vhost_vdpa_virtqueue_cb+0x25/0x40 [vhost_vdpa]
[  1482.3] {kernel_log.PANIC}: Fatal exception in interrupt
[  1482.3] Kernel Offset: disabled
"""


def test_a_panic_is_shown_with_the_report_before_it_and_the_last_line_of_output(tmp_path):
    (tmp_path / "console").write_text(PANICKED)
    machine = vm.Machine(spec(console_log=tmp_path / "console"), silent, silent)
    ours, theirs = socket.socketpair()
    machine._sockets[qemu.OUT] = ours
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as process, theirs, ours:
        for piece in (b"tests/kernel/test_one.py ...\ntests/kernel/te", b"st_two.py .."):
            theirs.sendall(piece)
            machine.receive(selectors.DefaultSelector(), qemu.OUT)
        machine._process = process
        process.wait()
        death = machine._death()
    assert death.why.splitlines() == [
        "the command's output ends with: tests/kernel/test_two.py ..",
        *(f"| {line}" for line in PANICKED.splitlines()[1:]),
    ]


def test_a_long_report_before_a_panic_is_shown_from_its_first_lines_on_that_fit():
    lines = [*(f"BUG: {number}" for number in range(50)), kernel_log.PANIC, "trace", "end", "more"]
    shown = [*(f"BUG: {number}" for number in range(41, 50)), kernel_log.PANIC, "trace", "end"]
    assert kernel_log.end(lines, 2, 10) == shown
    assert kernel_log.end(lines[:50], 2, 10) == ["BUG: 48", "BUG: 49"]
    assert kernel_log.end(["a", kernel_log.PANIC, "b"], 2, 10) == [kernel_log.PANIC, "b"]


@pytest.mark.parametrize(("reached", "after", "kind"), [("", 91, NotBooted), ("booted", 181, LabError)])
def test_a_vm_has_its_time_to_boot_and_to_begin(reached, after, kind):
    machine = vm.Machine(spec(), silent, silent)
    if reached:
        machine._report(reached)
    machine.check()
    machine._begin -= after
    with pytest.raises(LabError) as caught:
        machine.check()
    assert type(caught.value) is kind
