"""Virtual machines in the lab's VM: what they need, QEMU's monitor, the log of its calls, the account of frames."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from labkit import devices, machines, vm
from labkit.errors import LabError
from labkit.guest_kernel import REQUIRED, SETTINGS
from labkit.session import PROJECT
from labkit.vmm import Vmm, wrapper
from labvm import calls, machine, network
from labvm.backends import SERVE, Attachment, attached
from labvm.machine import GuestMachine, command_line, vhost_user, vhost_vdpa
from labvm.move import Peer
from labvm.network import Sim
from labvm.qmp import Console, Qmp, QmpError


def test_request_has_virtual_machines_and_passes_options_on():
    request = machines.request(["--qemu", "10.0", "--json"], "6.12", True, None)
    assert request.command == ["python3", "-m", "labvm", "--qemu", "10.0", "--json"]
    assert (request.vmm, request.icount, request.devices) == (True, True, ("vdpa_sim_net:0", "vdpa_hwsim:0"))
    assert request.environment["PYTHONPATH"].endswith(f":{PROJECT}/tools")


def test_back_ends_are_compared_in_virtual_time():
    assert machines.request(["--compare"], "6.12", False, None).icount
    assert not machines.request([], "6.12", False, None).icount


def test_kept_folder_is_shared_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    request = machines.request(["--keep=logs"], "6.12", False, None)
    assert request.command[-1] == f"--keep={tmp_path}/logs"
    assert request.shares == [tmp_path / "logs"]


def test_unknown_options_are_refused_before_a_vm_boots(capsys):
    with pytest.raises(SystemExit):
        machines.request(["--profile=none", "--nonsense"], "6.12", False, None)
    assert "--nonsense" in capsys.readouterr().err


def test_help_has_the_options_of_the_program_in_the_vm():
    assert "--compare" in machines.options()


def test_options_of_run_are_refused():
    with pytest.raises(LabError, match="vm takes no --devices"):
        machines.request(["--devices=vduse:2"], "6.12", False, None)


def test_qemu_its_guest_and_user_mode_linux_are_below_one_folder(tmp_path):
    made = Vmm(*(tmp_path / name for name in ("qemu", "guest", "uml")))
    assert made.mounts() == {f"/opt/vmm/{name}": tmp_path / name for name in ("qemu", "guest", "uml")}


def test_images_are_mounted_after_the_disks(tmp_path):
    mounts = {"/opt/vmm/qemu": tmp_path / "q", "/opt/vmm/guest": tmp_path / "g"}
    asked = vm.Spec(
        command=["true"],
        folder=tmp_path,
        kernel=tmp_path,
        boot_modules=[],
        busybox=tmp_path,
        disks=[tmp_path / "root"],
        devices=devices.parse(["none"]),
        console_log=tmp_path / "log",
        mounts=mounts,
    )
    script = vm.configuration(asked)
    assert "/dev/vdb /opt/vmm/qemu" in script
    assert "/dev/vdc /opt/vmm/guest" in script


def test_wrapper_gives_newer_qemu_its_own_libraries():
    assert "LD_LIBRARY_PATH=/x/usr/lib/x86_64-linux-gnu exec /x/usr/bin/qemu-system-x86_64" in wrapper("/x")
    assert "LD_LIBRARY_PATH" not in wrapper("")


def test_required_settings_are_set():
    assert {name: SETTINGS[name] for name in REQUIRED} == REQUIRED


@pytest.mark.parametrize("netdev", [vhost_vdpa("/dev/vhost-vdpa-0"), vhost_user("/run/serve")])
def test_both_ends_of_a_move_are_the_same_machine(tmp_path, netdev, monkeypatch):
    monkeypatch.setattr("labvm.machine.counter_khz", lambda: 1_000_000)
    near, far = (command_line("11.1", tmp_path, name, netdev, GuestMachine()) for name in ("source", "destination"))
    assert [word.replace("destination", "source") for word in far] == near
    assert "tsc_early_khz=1000000" in near[near.index("-append") + 1]
    assert "share=on" in near[near.index("-object") + 1]


def record(begin, end, request, sent=b"", minor=0, result=0, error=0):
    return calls.RECORD.pack(begin, end, 7, 8, request, minor, 2, result, error, 0, sent.ljust(40, b"\0"), b"\0" * 40)


def write_log(path, *records, count=None):
    head = struct.pack("<QQQ", calls.MAGIC, 64, len(records) if count is None else count)
    path.write_bytes(head.ljust(calls.HEADER, b"\0") + b"".join(records))
    return path


SUSPEND, ENABLE, STATUS = 0xAF7D, 0x4008AF75, 0x4001AF72


def test_a_move_is_read_from_the_calls_of_both_devices(tmp_path):
    on, off = struct.pack("<II", 0, 1), struct.pack("<II", 0, 0)
    source = write_log(
        tmp_path / "source",
        *(record(10, 11, ENABLE, on), record(100, 110, SUSPEND), record(120, 130, ENABLE, off)),
        *(record(140, 150, ENABLE, on), record(155, 156, STATUS)),
        *(record(1000, 1010, SUSPEND), record(1020, 1100, STATUS), record(9000, 9001, STATUS)),
    )
    destination = write_log(
        tmp_path / "destination",
        *(record(500, 501, STATUS), record(1200, 1210, STATUS), record(1300, 1400, ENABLE, on, minor=1)),
    )
    move = calls.move(calls.read(source), calls.read(destination), migrating_ns=50, paused_ns=1105, resumed_ns=1150)
    assert (move.switch, move.stop, move.start) == ((100, 150), (1000, 1100), (1200, 1400))
    assert (move.dt1_ms, move.dt2_ms, move.start_ms) == (5e-05, 1e-04, 2e-04)


def test_a_device_that_was_never_switched_has_no_downtime_1(tmp_path):
    log = calls.read(write_log(tmp_path / "log", record(100, 110, SUSPEND)))
    assert calls.move(log, [], 50, 120, 130) == calls.Move(None, (100, 110), None)
    assert calls.move(log, [], 111, 120, 130) == calls.Move(None, None, None)


def test_a_full_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match="6 calls are missing"):
        calls.read(write_log(tmp_path / "log", count=70))


def test_messages_have_the_names_of_their_type(tmp_path):
    sent = struct.pack("<IIQQQBB", 2, 1, 0x1000, 0x2000, 0x3000, 3, 2)
    [call] = calls.read(write_log(tmp_path / "log", record(1, 2, 0, sent)))
    assert call.name == "IOTLB_UPDATE"
    assert call.lost_cpu == 2
    assert call.message() == {"asid": 1, "iova": 0x1000, "size": 0x2000, "uaddr": 0x3000, "perm": 3, "type": 2}


def test_overlapping_calls_are_counted_once():
    made = [calls._call(b, e, 0, 0, STATUS, 0, 0, 0, 0, 0, b"\0" * 40, b"") for b, e in ((0, 10), (5, 20), (40, 50))]
    assert calls.busy_ns(made, 2, 45) == 18 + 5


@pytest.fixture
def library(tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("no compiler")
    source, made = PROJECT / "tools/labvm/calls.c", tmp_path / "calls.so"
    subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", made, source], check=True)
    return made


def test_preloaded_library_knows_when_a_program_did_not_wait(tmp_path, library):
    log = tmp_path / "log"
    program = "import select, time\np = select.poll()\nfor _ in 'abc': p.poll(50); time.sleep(0.02)\np.poll(1)"
    environment = {**os.environ, "LD_PRELOAD": str(library), "VDPA_CALLS": str(log)}
    for more, count in (({}, 0), ({"VDPA_WORK": "1"}, 3)):
        subprocess.run([sys.executable, "-c", program], env={**environment, **more}, check=True)
        made = calls.read(log)
        assert [call.name for call in made] == [calls.WORK] * count
        assert all(call.end_ns - call.begin_ns >= 20_000_000 for call in made)
    assert calls.on_device(log) == []


def test_silent_program_is_described_by_its_threads_and_by_who_has_the_cpu():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        said = machine._threads(busy.pid)
        busy.kill()
    assert "R (running)" in said
    assert "compact_stall" in said
    [spent] = [line for line in said.splitlines() if line.startswith("Spent(name='python") and "policy='0'" in line][:1]
    assert int(spent.partition("user=")[2].partition(",")[0]) > 20


def test_preloaded_library_writes_nothing_for_other_files(tmp_path, library):
    """What it writes for a device is tested on one: tests/kernel/test_machines.py."""
    log = tmp_path / "log"
    environment = {**os.environ, "LD_PRELOAD": str(library), "VDPA_CALLS": str(log)}
    command = ["dd", "if=/dev/zero", f"of={tmp_path}/out", "bs=72", "count=3"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert (tmp_path / "out").stat().st_size == 216
    assert calls.read(log) == []


ACCOUNT = """
#include "traffic.h"
static struct account account;
int main(void)
{
	static struct line line;
	unsigned long long number, at, wrong;
	struct frame frame;
	while (scanf("%llu %llu %llu", &number, &at, &wrong) == 3) {
		frame_fill(&frame, number, 64);
		frame.fill[3] ^= wrong;
		account_add(&account, &frame, 64, at);
	}
	line_add(&line, "{");
	line_account(&line, &account, 6);
	line_gaps(&line, &account);
	line_add(&line, "}");
	line_write(&line);
	return 0;
}
"""


LINES = """
#include <fcntl.h>
#include <unistd.h>
#include "traffic.h"
static struct line told;
int main(void)
{
	int number, refused = 0;
	fcntl(1, F_SETFL, O_NONBLOCK);
	for (number = 0; number < 3000; number++) {
		line_flush(&told);
		if (!line_takes(&told, 64)) {
			refused++;
			continue;
		}
		line_add(&told, "line %d, which is not short", number);
		line_write(&told);
	}
	fprintf(stderr, "%d\\n", refused);
	while (told.length) {
		line_flush(&told);
		usleep(1000);
	}
	return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")
def test_a_full_console_gets_each_line_once_when_it_takes_more(tmp_path):
    source, program = tmp_path / "lines.c", tmp_path / "lines"
    source.write_text(LINES)
    subprocess.run(["gcc", "-Wall", "-I", PROJECT / "tools/labvm", "-o", program, source], check=True)
    with subprocess.Popen([program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout
        assert running.stderr
        # nothing is read before all is said
        refused = int(running.stderr.readline())
        lines = running.stdout.read().splitlines()
    numbers = [int(line.removeprefix("line ").partition(",")[0]) for line in lines]
    assert numbers == list(range(len(lines)))
    assert 0 < refused == 3000 - len(lines)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")
def test_account_of_frames_knows_what_was_lost_repeated_and_late(tmp_path):
    source, program = tmp_path / "account.c", tmp_path / "account"
    source.write_text(ACCOUNT)
    subprocess.run(["gcc", "-Wall", "-I", PROJECT / "tools/labvm", "-o", program, source], check=True)
    arrivals = [(0, 100, 0), (1, 110, 0), (3, 120, 0), (2, 125, 0), (2, 130, 0), (5, 200, 0), (4, 210, 1)]
    given = "\n".join(" ".join(map(str, arrival)) for arrival in arrivals)
    done = subprocess.run([program], input=given, capture_output=True, text=True, check=True)
    account = json.loads(done.stdout)
    assert {name: account[name] for name in ("received", "lost", "duplicated", "reordered", "corrupted")} == {
        "received": 6,
        "lost": 1,
        "duplicated": 1,
        "reordered": 1,
        "corrupted": 1,
    }
    assert account["longest_gap_ns"] == 70
    assert account["gaps"] == [[100, 10], [110, 10], [120, 5], [125, 5], [130, 70]]


def numbered(number):
    """Return a frame as the guest sends it."""
    content = struct.pack("<Q", number) + bytes((number + i) & 255 for i in range(48))
    total = 2166136261
    for byte in content:
        total = (total ^ byte) * 16777619 & 0xFFFFFFFF
    return struct.pack("<II", 0x56444D31, total) + content


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")
def test_other_end_of_the_wire_knows_every_gap_that_it_is_asked_for(tmp_path):
    program, address = tmp_path / "vm-peer", f"127.{os.getpid() >> 16 & 255}.{os.getpid() >> 8 & 255}.77"
    subprocess.run(["gcc", "-Wall", "-o", program, PROJECT / "tools/labvm/peer.c"], check=True)
    with (
        subprocess.Popen([program, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        far = Peer(process)
        far.read()
        assert far.gap(1, 2) is None
        sender.connect((address, 7001))
        for number in range(100):
            time.sleep(0.02 if number == 30 else 0.002 if number != 60 else 0)
            sender.send(numbered(number))
            sender.recv(2000)
        gaps = far.report()["udp"]["gaps"]
        begin, length = max(gaps, key=lambda gap: gap[1])
        assert far.gap(begin + 1, begin + 2) == [begin, length]
        assert far.gap(begin - 1, begin + length + 1) == [begin, length]
        assert far.gap(begin + length, begin + length + 1)[0] == begin + length
        last = begin + length
        found = {}
        while gap := far.gap(last, last + 1):
            found[tuple(gap)] = last = gap[0] + gap[1]
        assert len(found) >= 68
        assert min(length for _, length in found) < min(length for _, length in gaps)
        process.stdin.close()


class Monitor:
    """A stand-in for QEMU's monitor: answers with what it was given."""

    def __init__(self, path, *answers):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.asked = []
        self._answers = [{"QMP": {}}, {"return": {}}, *answers]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        end, _ = self._listener.accept()
        with end:
            for answer in self._answers:
                end.sendall(b"".join(json.dumps(part).encode() + b"\r\n" for part in self._parts(answer)))
                if answer is not self._answers[-1]:
                    data = end.recv(4096)
                    if not data:
                        return
                    self.asked.append(json.loads(data))

    @staticmethod
    def _parts(answer):
        return answer if isinstance(answer, list) else [answer]

    def close(self):
        self._thread.join()
        self._listener.close()


def test_monitor_keeps_events_that_come_before_an_answer(tmp_path):
    stamp = {"seconds": int(time.time()), "microseconds": 0}
    event = {"event": "MIGRATION", "timestamp": stamp, "data": {"status": "setup"}}
    monitor = Monitor(tmp_path / "qmp", [event, {"return": {"status": "running"}}], {"error": {"desc": "no such"}})
    qmp = Qmp(str(tmp_path / "qmp"))
    try:
        assert qmp.command("query_status") == {"status": "running"}
        found = qmp.find("MIGRATION", status="setup")
        assert found is not None
        assert abs(found.at_ns - time.monotonic_ns()) < 3e9
        with pytest.raises(QmpError, match="migrate-set-parameters: no such"):
            qmp.command("migrate_set_parameters", max_bandwidth=1)
        with pytest.raises(QmpError, match="closed its monitor"):
            qmp.poll(5)
    finally:
        qmp.close()
        monitor.close()
    assert monitor.asked[-1] == {"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 1}}


def test_a_process_that_ends_before_its_monitor_is_there_is_reported(tmp_path):
    with pytest.raises(QmpError, match="ended before"):
        Qmp(str(tmp_path / "none"), 5.0, lambda: False)


def test_patience_with_a_process_is_not_used_up_while_it_waits_for_a_disk(tmp_path):
    asked = []

    def reads() -> bool:
        asked.append(None)
        return len(asked) < 20

    with pytest.raises(QmpError, match="cannot be connected to"):
        Qmp(str(tmp_path / "none"), 0.0, reads=reads)
    assert len(asked) >= 20


def test_console_tells_reports_from_what_the_kernel_prints(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "console"))
        listener.listen()
        console = Console(str(tmp_path / "console"))
        end, _ = listener.accept()
        with end:
            end.sendall(b'[    0.1] Linux\r\n{"guest": "up"}\r\n{"half')
            console.poll(5)
            end.sendall(b'": 1}\n')
            console.poll(5)
            console.send("stop")
            assert end.recv(100) == b"stop\n"
        assert (console.reports, console.other) == ([{"guest": "up"}, {"half": 1}], ["[    0.1] Linux"])
        console.close()


def test_events_of_serve_are_read_with_their_times_and_half_a_line_waits(tmp_path):
    log = tmp_path / "source.serve"
    at = "2026-11-30T04:00:00.250000+00:00"
    told = [{"time": at, "event": name} for name in ("peer-not-ready", "peer-ready", "running")]
    log.write_text("Warning: something\n" + "".join(f"{json.dumps(each)}\n" for each in told) + '{"time": "2026')
    attachment = Attachment([], tmp_path / "calls", log=log)
    assert [event["event"] for _, event in attachment.events()] == ["peer-not-ready", "peer-ready", "running"]
    offset = time.clock_gettime_ns(time.CLOCK_REALTIME) - time.monotonic_ns()
    assert abs(attachment.events()[0][0] + offset - 1_796_011_200_250_000_000) < 1_000_000
    assert attachment.told("peer-ready", "peer-not-ready") == told[1]
    assert attachment.told("peer-gone") is None
    assert attachment.trouble() == ""
    log.write_text(json.dumps({"time": at, "event": "device-failed", "error": "too many runs"}) + "\n")
    assert attachment.trouble() == "serve: too many runs"
    assert Attachment([], tmp_path / "calls").events() == []


def test_serve_knows_where_its_guest_goes_next(tmp_path, monkeypatch):
    made = []

    class Process:
        returncode = None

        def __init__(self, argv, **_):
            made.append(argv)
            (tmp_path / "qemu0.sock").touch()

        def poll(self):
            return None

        def send_signal(self, number):
            pass

        def wait(self, seconds=None):
            pass

    monkeypatch.setattr("labvm.backends.subprocess.Popen", Process)
    with attached(SERVE, Sim("vm0", "/dev/vhost-vdpa-0"), tmp_path, "qemu0", "qemu1") as attachment:
        assert attachment.netdev == vhost_user(str(tmp_path / "qemu0.sock"))
    [argv] = made
    assert argv[argv.index("--peer-listen") + 1] == f"unix:{tmp_path}/qemu0.peer"
    assert argv[argv.index("--peer") + 1] == f"unix:{tmp_path}/qemu1.peer"


@pytest.mark.parametrize("there", [True, False])
def test_a_guest_has_huge_pages_where_the_kernel_has_them(tmp_path, monkeypatch, there):
    reserved = tmp_path / "nr_hugepages"
    if there:
        reserved.write_text("4")
    monkeypatch.setattr(network, "RESERVED", reserved)
    monkeypatch.setattr(network, "COMPACT", tmp_path / "compact")
    monkeypatch.setattr(machine, "counter_khz", lambda: 1)
    with network.huge_pages(64 << 20):
        assert not there or reserved.read_text() == "36"
    assert not there or reserved.read_text() == "4"
    words = " ".join(command_line("10.0", tmp_path, "qemu", [], GuestMachine()))
    assert ("hugetlb=on" in words) is there
