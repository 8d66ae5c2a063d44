"""A trace that another process recorded is read back as it was."""

from __future__ import annotations

import io

import pytest

from pyvhostvdpa.base.errors import VhostVdpaError
from pyvhostvdpa.base.uapi import IotlbType, Status
from pyvhostvdpa.trace import events, records
from pyvhostvdpa.trace.recorder import Trace


def recorded() -> Trace:
    trace = Trace()
    device = trace.device("/dev/vhost-vdpa-0")
    with device.in_phase("dest.start"):
        device.record(1, 2, "VHOST_VDPA_SET_STATUS", {"status": Status.DRIVER_OK}, 0)
        device.record(3, 4, "IOTLB_UPDATE", {"type": IotlbType.UPDATE, "iova": 1 << 40, "size": 4096}, -14)
        device.note("shadow_vqs", queues="0 1")
    return trace


def written(trace: Trace) -> io.StringIO:
    file = io.StringIO()
    records.write(trace, file)
    file.seek(0)
    return file


def test_every_field_comes_back() -> None:
    trace = recorded()
    assert records.read(written(trace)) == trace.events


def test_records_read_back_can_be_exported() -> None:
    here, there = Trace(), recorded()
    here.events += records.read(written(there))
    said = io.StringIO(), io.StringIO()
    for trace, file in zip((here, there), said, strict=True):
        events.write(trace, file)
    assert said[0].getvalue() == said[1].getvalue()


@pytest.mark.parametrize("text", ["", "{}\n", '{"schema": "other/1"}\n', "no JSON\n", '{"schema": "SCHEMA"}\n[1, 2]\n'])
def test_anything_else_is_refused(text: str, tmp_path: object) -> None:
    path = f"{tmp_path}/records"
    with open(path, "w+", encoding="utf-8") as file:
        file.write(text.replace("SCHEMA", records.SCHEMA))
        file.seek(0)
        with pytest.raises(VhostVdpaError, match=f"{path} is not a recording"):
            records.read(file)
