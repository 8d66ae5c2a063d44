"""A trace as JSON lines: QEMU's events, its names, its fields."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import traces
from traces import A, Recorder

from pyvhostvdpa.trace import events
from pyvhostvdpa.trace.recorder import Trace


def written(trace: Trace) -> list[dict[str, Any]]:
    file = io.StringIO()
    events.write(trace, file)
    return [json.loads(line) for line in file.getvalue().splitlines()]


def one(event: str, result: int = 0, **fields: int | str) -> dict[str, Any]:
    """What one call alone becomes."""
    trace = Trace()
    trace.device(A).record(5, 9, event, fields, result)
    *_, last = written(trace)
    return last


MESSAGE = {"vdpa": A, "fd": -1, "msg_type": 2, "asid": 1, "iova": 0x1000, "size": 0x2000}
CASES: dict[str, tuple[tuple[str, dict[str, int | str]], dict[str, Any]]] = {
    "vhost_vdpa_dma_map": (
        ("IOTLB_UPDATE", {"asid": 1, "iova": 0x1000, "size": 0x2000, "uaddr": 0x7F0000, "perm": 3}),
        {**MESSAGE, "uaddr": 0x7F0000, "perm": 3, "type": 2},
    ),
    "vhost_vdpa_dma_unmap": (
        ("IOTLB_INVALIDATE", {"asid": 1, "iova": 0x1000, "size": 0x2000}),
        {**MESSAGE, "type": 3},
    ),
    "vhost_vdpa_map_batch_begin": (
        ("IOTLB_BATCH_BEGIN", {"asid": 1}),
        {"v": A, "fd": -1, "msg_type": 2, "type": 5, "asid": 1},
    ),
    "vhost_vdpa_dma_batch_end": (
        ("IOTLB_BATCH_END", {"asid": 0}),
        {"v": A, "fd": -1, "msg_type": 2, "type": 6, "asid": 0},
    ),
    "vhost_vdpa_add_status": (("VHOST_VDPA_SET_STATUS", {"status": 3}), {"dev": A, "status": 3}),
    "vhost_vdpa_reset_device": (("VHOST_VDPA_SET_STATUS", {"status": 0}), {"dev": A}),
    "vhost_vdpa_suspend": (("VHOST_VDPA_SUSPEND", {}), {"dev": A}),
    "vhost_vdpa_set_vring_enable_one": (
        ("VHOST_VDPA_SET_VRING_ENABLE", {"index": 2, "num": 1}),
        {"dev": A, "idx": 2, "enable": 1, "r": 0},
    ),
    "vhost_vdpa_set_vring_addr": (
        ("VHOST_SET_VRING_ADDR", {"index": 1, "desc": 16, "avail": 32, "used": 48}),
        {
            "dev": A,
            "index": 1,
            "flags": 0,
            "desc_user_addr": 16,
            "used_user_addr": 48,
            "avail_user_addr": 32,
            "log_guest_addr": 0,
        },
    ),
    "vhost_vdpa_set_vring_num": (
        ("VHOST_SET_VRING_NUM", {"index": 1, "num": 256}),
        {"dev": A, "index": 1, "num": 256},
    ),
    "vhost_vdpa_set_vring_kick": (("VHOST_SET_VRING_KICK", {"index": 1, "fd": 9}), {"dev": A, "index": 1, "fd": 9}),
    "vhost_vdpa_set_vring_call": (("VHOST_SET_VRING_CALL", {"index": 1, "fd": 9}), {"dev": A, "index": 1, "fd": 9}),
    "vhost_vdpa_set_config_call": (("VHOST_VDPA_SET_CONFIG_CALL", {"fd": -1}), {"dev": A, "fd": -1}),
    "vhost_vdpa_set_features": (("VHOST_SET_FEATURES", {"features": 1 << 33}), {"dev": A, "features": 1 << 33}),
    "vhost_vdpa_set_address_space_id": (
        ("VHOST_VDPA_SET_GROUP_ASID", {"index": 2, "num": 1}),
        {"v": A, "vq_group": 2, "asid": 1},
    ),
    "vhost_vdpa_set_dev_vring_base": (
        ("VHOST_SET_VRING_BASE", {"index": 0, "num": 4}),
        {"dev": A, "index": 0, "num": 4, "svq": False},
    ),
    "vhost_vdpa_get_vring_base": (
        ("VHOST_GET_VRING_BASE", {"index": 0, "num": 4}),
        {"dev": A, "index": 0, "num": 4, "svq": False},
    ),
    "vhost_vdpa_get_iova_range": (
        ("VHOST_VDPA_GET_IOVA_RANGE", {"first": 0, "last": 9}),
        {"dev": A, "first": 0, "last": 9},
    ),
    "vhost_vdpa_set_owner": (("VHOST_SET_OWNER", {}), {"dev": A}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_call_is_written_as_qemus_event(name: str) -> None:
    (call, fields), expected = CASES[name]
    line = one(call, **fields)
    assert (line["event"], line["fields"]) == (name, expected)
    assert (line["t_ns"], line["took_ns"], line["device"], line["result"]) == (5, 4, A, 0)


def test_the_first_line_names_schema_and_clock() -> None:
    assert written(traces.migration())[0] == {
        "schema": "pyvhostvdpa/trace/recorder/1",
        "clock": "CLOCK_MONOTONIC",
        "devices": [traces.A, traces.B],
    }


def test_no_call_is_left_out_and_each_has_its_phase() -> None:
    trace = traces.migration()
    lines = [line for line in written(trace)[1:] if line["event"] != "vhost_vdpa_dev_start"]
    assert [(line["t_ns"], line["phase"]) for line in lines] == [(e.t_begin, e.phase) for e in trace.events]


def test_event_unknown_to_qemu_keeps_the_kernels_name() -> None:
    line = one("VHOST_VDPA_GET_VQS_COUNT", vqs_count=5)
    assert (line["event"], line["fields"]) == ("VHOST_VDPA_GET_VQS_COUNT", {"dev": A, "vqs_count": 5})


def test_status_is_what_was_added() -> None:
    added = [
        line["fields"]["status"] for line in written(traces.migration()) if line.get("event") == "vhost_vdpa_add_status"
    ]
    assert added[:3] == [3, 8, 4]


def test_a_status_that_was_refused_adds_nothing() -> None:
    trace = Trace()
    recorder = Recorder(trace.device(A), 0)
    recorder.call("VHOST_VDPA_SET_STATUS", result=-22, status=3)
    recorder.call("VHOST_VDPA_SET_STATUS", status=3)
    assert [line["fields"]["status"] for line in written(trace)[1:]] == [3, 3]


def test_the_device_starts_with_driver_ok_and_stops_with_suspend() -> None:
    lines = written(traces.migration())
    of_first = [line for line in lines if line.get("device") == A]
    started = [line["fields"]["started"] for line in of_first if line["event"] == "vhost_vdpa_dev_start"]
    assert started == [True, False, True, False]


def test_vring_base_events_have_the_svq_flag() -> None:
    lines = [line for line in written(traces.migration()) if line.get("device") == A]
    bases = [
        (line["event"], line["fields"]["index"], line["fields"]["num"], line["fields"]["svq"])
        for line in lines
        if line["event"].endswith("vring_base")
    ]
    assert bases == [
        ("vhost_vdpa_get_vring_base", 0, 100, False),
        ("vhost_vdpa_get_vring_base", 1, 101, False),
        ("vhost_vdpa_set_dev_vring_base", 0, 0, True),
        ("vhost_vdpa_set_dev_vring_base", 1, 0, True),
        ("vhost_vdpa_get_vring_base", 0, 7, True),
        ("vhost_vdpa_get_vring_base", 1, 7, True),
    ]


def test_decisions_have_qemus_fields() -> None:
    found = {line["event"]: line for line in written(traces.migration()) if line.get("result", 0) is None}
    assert {name: line["fields"] for name, line in found.items() if "flush" in name or "load" in name} == {
        "vhost_vdpa_net_data_eval_flush": {"s": traces.B, "qindex": 0, "svq_switch": 0, "flush_map": True},
        "vhost_vdpa_maybe_flush_map": {
            "dev": traces.B,
            "registered": True,
            "flush_map": True,
            "iotlb_persistent": False,
        },
        "vhost_vdpa_net_load_mq": {"s": traces.B, "ncurqps": 1},
        "vhost_vdpa_net_load_cmd": {"s": traces.B, "class": 4, "cmd": 0, "data_num": 1, "data_size": 2},
        "vhost_vdpa_net_load_cmd_retval": {"s": traces.B, "class": 4, "cmd": 0, "r": 0},
    }


def test_the_descriptor_is_the_one_that_open_returned() -> None:
    maps = [line for line in written(traces.migration()) if line.get("event") == "vhost_vdpa_dma_map"]
    assert {line["fields"]["fd"] for line in maps} == {7}


def test_a_failed_call_has_its_errno() -> None:
    assert one("VHOST_VDPA_SET_VRING_ENABLE", -95, index=0, num=1)["fields"]["r"] == -95
    assert one("IOTLB_UPDATE", -14, asid=0, iova=0, size=1, uaddr=0, perm=3)["result"] == -14
