"""``watch``, ``report`` and ``ladder --with``: the parts that need no kernel."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path

import pytest

from pyvhostvdpa.base.uapi import BackendFeature
from pyvhostvdpa.bench.ladder.measured import measured_row
from pyvhostvdpa.bench.ladder.savings import saved
from pyvhostvdpa.cli import main
from pyvhostvdpa.cli.recording import read
from pyvhostvdpa.trace import live, records
from pyvhostvdpa.trace.recorder import Event, Trace
from pyvhostvdpa.trace.sessions import DeviceSession
from pyvhostvdpa.trace.summary import summarize

RECORDINGS = Path(__file__).parent / "recordings"


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_bytes(gzip.decompress((RECORDINGS / "in-place.jsonl.gz").read_bytes()))
    return path


def test_report_prints_figures_parts_and_advice(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(recording), "--spans"]) == 0
    out = capsys.readouterr().out
    first, _, rest = out.partition("\n\n")
    assert first.startswith("The guest moved from vhost-vdpa-2 to vhost-vdpa-3; stop to run was ")
    assert [line for line in out.partition("DT1 of /dev")[0].splitlines() if len(line) > 80] == []
    assert "DT1 ms" in rest
    assert "what they consist of, ms" in rest
    assert "derived from the calls" in rest
    assert "DT1 of /dev/vhost-vdpa-2" in rest


def test_report_of_a_recording_without_a_move_begins_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "calls.jsonl"
    trace = Trace()
    trace.device("/dev/vhost-vdpa-0").record(0, 1, "VHOST_GET_FEATURES", {"features": 1}, 0)
    for content, answer in (
        (trace, "No migration was recorded: 1 ioctl and 0 IOTLB messages on 1 device."),
        (Trace(), "No call on a vhost-vdpa device was made."),
    ):
        with path.open("w") as file:
            records.write(content, file, {})
        assert main(["report", str(path)]) == 0
        assert capsys.readouterr().out.splitlines()[0] == answer


def test_report_as_json_has_the_schema(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--json", str(recording)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "pyvhostvdpa/watch/1"
    device = found["devices"][0]
    assert set(device) >= {"device", "dt1_ms", "dt2_ms", "stop_to_run_ms", "ioctls", "messages"}
    assert found["lost_events"] == 0
    assert isinstance(found["advice"], list)


def test_report_writes_a_page_that_stands_alone(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["report", str(recording), "--report", str(folder)]) == 0
    page = (folder / "index.html").read_text()
    assert page.count("<svg") >= 3
    assert "http" not in page.replace("http://www.w3.org", "")
    assert json.loads((folder / "watch.json").read_text())["schema"] == "pyvhostvdpa/watch/1"
    assert (folder / "recording.perfetto.json").exists()
    assert str(folder / "index.html") in capsys.readouterr().err
    assert main(["report", str(folder / "recording.jsonl")]) == 0


def test_recordings_of_one_host_are_joined(recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, about = read(str(recording))
    parts = []
    for device in trace.devices():
        part = Trace()
        part.events = [event for event in trace.events if event.device == device]
        parts.append(tmp_path / f"{device.rpartition('/')[2]}.jsonl")
        with parts[-1].open("w") as file:
            records.write(part, file, about)
    assert main(["report", "--json", str(recording)]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main(["report", "--json", *map(str, parts)]) == 0
    joined = json.loads(capsys.readouterr().out)
    assert joined["migrations"] == whole["migrations"]
    assert [each["offset_ns"] for each in joined["recording"]["joined"]] == [0, 0]


def test_recordings_of_two_hosts_may_have_one_file_name(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each host has a /dev/vhost-vdpa-0: neither its name nor the file's is unique."""
    trace, about = read(str(recording))
    assert main(["report", "--json", str(recording)]) == 0
    whole = json.loads(capsys.readouterr().out)["migrations"][0]
    parts = []
    for host, device in zip("ab", trace.devices(), strict=True):
        part = Trace()
        part.events = [e._replace(device="/dev/vhost-vdpa-0") for e in trace.events if e.device == device]
        parts.append(tmp_path / host / "watch.jsonl")
        parts[-1].parent.mkdir()
        with parts[-1].open("w") as file:
            records.write(part, file, about | {"clock": about["clock"] | {"boot_id": host, "max_error_ms": 1.0}})
    assert main(["report", "--json", *map(str, parts)]) == 0
    (joined,) = json.loads(capsys.readouterr().out)["migrations"]
    assert (joined["source"], joined["destination"]) == tuple(f"{host}/watch:/dev/vhost-vdpa-0" for host in "ab")
    assert joined["stop_to_run_ms"] == whole["stop_to_run_ms"]
    folder = tmp_path / "page"
    assert main(["report", *map(str, parts), "--report", str(folder)]) == 0
    page = (folder / "index.html").read_text()
    assert all(f">{host}/watch</text>" in page for host in "ab")
    with pytest.raises(SystemExit):
        main(["report", str(parts[0]), str(parts[0])])


def test_recordings_are_told_apart_whatever_they_are_called(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, about = read(str(recording))
    paths = [tmp_path / "x/a.jsonl", tmp_path / "y/a.jsonl", tmp_path / "y/a.json"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            records.write(trace, file, about | {"clock": about["clock"] | {"boot_id": str(path)}})
    assert main(["report", "--json", *map(str, paths)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["recording"] for each in found["recording"]["joined"]] == ["x/a.jsonl", "y/a.jsonl", "y/a.json"]
    assert len(found["devices"]) == 3 * len(trace.devices())


@pytest.mark.parametrize("path", ["/", "."])
def test_folder_is_not_a_recording(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", path]) == 1
    assert "Is a directory" in capsys.readouterr().err


def test_uncertain_offset_of_clocks_is_said_of_the_figures_too(
    recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, about = read(str(recording))
    with (tmp_path / "other.jsonl").open("w") as file:
        records.write(trace, file, about | {"clock": about["clock"] | {"boot_id": "b", "max_error_ms": None}})
    assert main(["report", str(recording), str(tmp_path / "other.jsonl")]) == 0
    assert "as stop to run is, is as exact as that" in capsys.readouterr().out


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    """A recording of QEMU 11.1, which acknowledges neither DESC_ASID nor IOTLB_PERSIST."""
    path = tmp_path / "qemu.jsonl"
    path.write_bytes(gzip.decompress((RECORDINGS / "qemu-11.1.jsonl.gz").read_bytes()))
    return path


def test_features_that_were_not_acknowledged_have_the_ladder_s_figures(
    qemu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--json", str(qemu)]) == 0
    advice = {each["id"]: each["text"] for each in json.loads(capsys.readouterr().out)["advice"]}
    assert advice["not-acknowledged"].endswith(
        "DT1 20 to 30 s and DT2 20 s for baseline QEMU, 1.7 s and 1.5 s with DESC_ASID and IOTLB_PERSIST."
    )
    assert all("baseline" not in text for name, text in advice.items() if name != "not-acknowledged")


def test_row_that_a_device_cannot_do_is_not_named() -> None:
    always = BackendFeature.IOTLB_MSG_V2 | BackendFeature.IOTLB_BATCH | BackendFeature.IOTLB_ASID
    always |= BackendFeature.SUSPEND
    separate = always | BackendFeature.DESC_ASID

    def said(offered: BackendFeature, taken: BackendFeature) -> str:
        return saved(DeviceSession("", backend_offered=int(offered), backend_acknowledged=int(taken)))

    assert said(separate, always).endswith("2 s and 5 s with DESC_ASID.")
    assert said(separate | BackendFeature.IOTLB_PERSIST, separate).endswith("1.7 s and 1.5 s with IOTLB_PERSIST.")
    assert said(always | BackendFeature.IOTLB_PERSIST, always) == ""
    assert said(separate, separate) == ""


@pytest.mark.parametrize("content", ["", "{}\n", "\x00\x01", '{"schema": "pyvhostvdpa/trace/recorder/1"}\n'])
def test_file_that_is_not_a_recording_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "other"
    path.write_text(content)
    assert main(["report", str(path)]) == 1
    err = capsys.readouterr().err
    assert "is not a recording" in err
    assert "next: vhost-vdpa watch --trace FILE.jsonl" in err
    assert main(["report", str(tmp_path / "missing")]) == 1


def test_recording_is_a_row_of_the_ladder(recording: Path) -> None:
    trace, about = read(str(recording))
    summary = summarize(trace, about)
    row = measured_row("ours", "own.jsonl", summary)
    (migration,) = summary.found.migrations
    assert row.dt1_ms == migration.dt1_ms
    assert row.stop_to_run_ms == migration.stop_to_run_ms
    assert row.counts["dt1"].ioctls > 10
    assert row.to_dict()["lost_events"] == 0


def test_ladder_refuses_a_recording_without_a_migration_before_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "empty.jsonl"
    with path.open("w") as file:
        records.write(Trace(), file)
    assert main(["ladder", "--with", f"QEMU={path}"]) == 1
    assert "has no migration" in capsys.readouterr().err


def test_watch_reports_what_is_missing_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pyvhostvdpa.trace.tracefs._PLACES", ())
    monkeypatch.setattr("pyvhostvdpa.trace.tracefs._MOUNTS", tmp_path / "none")
    assert main(["watch", "--for", "1"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 2
    assert "next: " in err


def test_open_files_of_a_process_are_those_of_vhost_vdpa(tmp_path: Path) -> None:
    folder = tmp_path / "77" / "fd"
    folder.mkdir(parents=True)
    for fd, target in (("3", "/dev/vhost-vdpa-1"), ("4", "/dev/null"), ("5", "/dev/vhost-vdpa-0")):
        (folder / fd).symlink_to(target)
    assert live.open_files(77, tmp_path) == [(3, "/dev/vhost-vdpa-1"), (5, "/dev/vhost-vdpa-0")]
    assert live.holders(tmp_path) == [("/dev/vhost-vdpa-0", 77), ("/dev/vhost-vdpa-1", 77)]


class Recording:
    """Stands for a recording, of which a kernel would have to be part."""

    reloaded = False

    def __init__(self, *_: object) -> None:
        self.forms: dict[str, str] = {}
        self.unfinished: list[tuple[int, str, str]] = []
        self.trace = Trace()
        self.busy: set[str] = set()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def events(self) -> list[Event]:
        return []

    def stop(self) -> list[Event]:
        return []


def test_recording_that_fails_is_saved_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Recording):
        def events(self) -> list[Event]:
            if self.trace.events:
                raise OSError(5, "Input/output error")
            opened = Event(1, 2, "/dev/vhost-vdpa-0", "", "open", {"pid": 1, "comm": "qemu"}, 0)
            self.trace.append(opened)
            return [opened]

    monkeypatch.setattr(live, "Watch", Failing)
    saved = tmp_path / "saved.jsonl"
    assert main(["watch", "--trace", str(saved)]) == 1
    assert "/dev/vhost-vdpa-0" in saved.read_text()


def test_driver_that_was_loaded_again_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Reloaded(Recording):
        reloaded = True

    monkeypatch.setattr(live, "Watch", Reloaded)
    assert main(["watch", "--for", "0.01"]) == 0
    assert "vhost_vdpa was loaded again" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_goes_to_the_command_as_well(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    class Signalled(Recording):
        def events(self) -> list[Event]:
            if not self.busy:
                self.busy = {""}
                os.kill(os.getpid(), number)
            return []

    monkeypatch.setattr(live, "Watch", Signalled)
    assert main(["watch", "--", "sleep", "60"]) == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_recording_in_order_from_its_first_moment(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a terminal that goes away: probes that stay behind slow every call down."""
    closed: list[bool] = []

    class Signalled(Recording):
        def __init__(self, *_: object) -> None:
            super().__init__()
            os.kill(os.getpid(), number)

        def __exit__(self, *_: object) -> None:
            closed.append(True)

    before = signal.signal(number, signal.default_int_handler)
    monkeypatch.setattr(live, "Watch", Signalled)
    try:
        assert main(["watch"]) == 0
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert closed
