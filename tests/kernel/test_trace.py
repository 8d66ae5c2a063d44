"""What a migration leaves behind in a trace, on a real device."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import lab
import pytest

from pyvhostvdpa import GuestOptions, MigrationOptions, MigrationRefused, Trace, migrate
from pyvhostvdpa.trace.downtime import DT1, DT2, milliseconds
from pyvhostvdpa.trace.spans import downtimes

QUICK = MigrationOptions(GuestOptions(lab.SMALL), lab.SLOW_STREAM, 1.5)


def run(devices: tuple[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    argv = ["vhost-vdpa", "migrate", *devices, "--memory", "32M", "--downtime", "10000", "--seconds", "1.5", *options]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_json_lines_have_qemus_events(devices: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    done = run(devices, "--trace", str(file))
    assert done.returncode == 0, done.stderr
    assert f"{file} (events)" in done.stderr
    head, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert head["schema"] == "pyvhostvdpa/trace/recorder/1"
    assert head["devices"] == list(devices)
    assert {line["event"] for line in lines if line["phase"] == "dt1.start"} >= {
        "vhost_vdpa_set_features",
        "vhost_vdpa_add_status",
        "vhost_vdpa_set_address_space_id",
        "vhost_vdpa_dma_map",
        "vhost_vdpa_map_batch_begin",
        "vhost_vdpa_dma_batch_end",
        "vhost_vdpa_set_dev_vring_base",
        "vhost_vdpa_set_vring_addr",
        "vhost_vdpa_net_load_cmd",
        "vhost_vdpa_net_load_cmd_retval",
        "vhost_vdpa_set_vring_enable_one",
        "vhost_vdpa_dev_start",
    }
    assert {line["event"] for line in lines if line["phase"] == "dt2.stop"} >= {
        "vhost_vdpa_suspend",
        "vhost_vdpa_get_vring_base",
        "vhost_vdpa_reset_device",
        "vhost_vdpa_dma_unmap",
    }
    svq = {line["fields"]["svq"] for line in lines if line["event"] == "vhost_vdpa_get_vring_base"}
    assert svq == {False, True}


def spans_of(result: dict[str, Any], name: str) -> float:
    return sum(span["ms"] for device in result["spans"][name] for span in device["spans"])


def test_the_spans_add_up_to_the_downtimes_of_the_report(devices: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    done = run(devices, "--trace", str(file), "--spans", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert spans_of(result, "dt1") == pytest.approx(result["dt1_ms"]["worst"], abs=0.001)
    assert spans_of(result, "dt2") == pytest.approx(result["dt2_ms"]["sum"], abs=0.001)
    assert {"B", "E", "M", "i", "C"} == {event["ph"] for event in json.loads(file.read_text())["traceEvents"]}


def test_the_spans_are_printed_with_their_sums_and_are_a_format_of_their_own(
    devices: tuple[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "spans"
    done = run(devices, "--spans", "--trace", str(file), "--trace-format", "spans")
    assert done.returncode == 0, done.stderr
    for text in (f"DT1 of {devices[0]}", f"DT2 of {devices[0]}", "VHOST_VDPA_SUSPEND", "control queue replay", "100.0"):
        assert text in done.stdout
    assert json.loads(file.read_text())["schema"] == "pyvhostvdpa/spans/1"


def test_a_file_that_cannot_be_written_is_refused_before_a_device_is_opened(devices: tuple[str, str]) -> None:
    done = run(devices, "--trace", "/nowhere/trace.json")
    assert done.returncode == 1
    assert "/nowhere/trace.json cannot be written" in done.stderr
    assert "opening the source" not in done.stderr


def test_a_migration_that_was_refused_leaves_its_trace(devices: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    done = run(devices, "--pairs", "9", "--trace", str(file))
    assert done.returncode == 1
    assert "queue pairs" in done.stderr
    assert "vhost_vdpa_set_owner" in file.read_text()


def test_the_caller_has_the_trace_of_what_failed(devices: tuple[str, str]) -> None:
    trace = Trace()
    with pytest.raises(MigrationRefused):
        migrate(*devices, MigrationOptions(GuestOptions(lab.SMALL, pairs=9)), trace=trace)
    assert trace.events[0].event == "open"


def test_the_list_of_spans_is_the_downtime(devices: tuple[str, str]) -> None:
    trace = Trace()
    report = migrate(*devices, QUICK, trace=trace)
    source = devices[0]
    found = downtimes(trace)
    for name, phases, reported in (("dt1", DT1, report.dt1_ms), ("dt2", DT2, report.dt2_ms)):
        assert set(found[name]) == {source}
        assert sum(span.ns for span in found[name][source]) / 1e6 == milliseconds(trace, source, phases)
        assert reported[source] == milliseconds(trace, source, phases)
