"""The state that moves from one back-end to another."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from typing import Any

import pytest
from session_rig import rig, running, state, transfer

from pyvhostvdpa.vhost_user.messages import Request


def test_state_moves_from_one_back_end_to_another() -> None:
    with rig() as source:
        source.front.connect()
        source.front.start(pairs=2)
        assert source.device.control is not None
        source.device.control.model.mac = b"\x52\x54\0\1\2\3"
        source.front.stop(4)
        saved, ok = transfer(source, load=False)
        assert ok == 0
        assert json.loads(saved)["pairs"] == 2
    with rig() as destination:
        destination.front.connect()
        assert transfer(destination, load=True, data=saved)[1] == 0
        destination.front.start(pairs=2)
        assert destination.device.control is not None
        assert destination.device.control.model.mac == b"\x52\x54\0\1\2\3"
        assert destination.device.calls[-1].what[1] == dict.fromkeys(range(4), 1)


@pytest.mark.parametrize(
    "edit",
    [
        lambda s: b"",
        lambda s: b"[" * 100_000,
        lambda s: b"[]",
        lambda s: json.dumps(s | {"schema": "other"}).encode(),
        lambda s: json.dumps(s | {"pairs": 99}).encode(),
        lambda s: json.dumps(s | {"pairs": True}).encode(),
        lambda s: json.dumps(s | {"mtu": 9000}).encode(),
        lambda s: json.dumps(s | {"rings": None}).encode(),
        lambda s: json.dumps(s | {"rings": [{"index": 0, "base": 1 << 16}]}).encode(),
        lambda s: json.dumps(s | {"control": {"mac": "zz"}}).encode(),
        lambda s: json.dumps(s | {"control": s["control"] | {"vlans": [4096]}}).encode(),
        lambda s: json.dumps(s | {"control": s["control"] | {"unicast": ["00"]}}).encode(),
        lambda s: json.dumps(s | {"control": s["control"] | {"rx": {}}}).encode(),
        lambda s: json.dumps(s).encode()[:-1],
    ],
)
def test_a_state_that_is_not_one_is_refused(edit: Callable[[dict[str, Any]], bytes]) -> None:
    with rig() as r:
        r.front.connect()
        r.front.start(pairs=2)
        r.front.stop(4)
        saved, _ = transfer(r, load=False)
        assert transfer(r, load=True, data=edit(json.loads(saved)))[1] == 1
        assert transfer(r, load=True, data=saved)[1] == 0


def test_state_of_a_device_that_runs_is_not_moved() -> None:
    with running() as r:
        reading, writing = os.pipe()
        [answer] = struct.unpack("=Q", r.front.ask(Request.SET_DEVICE_STATE_FD, state(0, 0), [writing]))
        assert answer == 257
        os.close(reading)
        os.close(writing)


def test_transfers_whose_outcome_is_never_queried_leave_nothing_open() -> None:
    with rig() as r:
        r.front.connect()
        for _ in range(3):
            reading, writing = os.pipe()
            r.front.ask(Request.SET_DEVICE_STATE_FD, state(0, 0), [writing])
            os.close(writing)
            while os.read(reading, 4096):
                pass
            os.close(reading)
            r.front.barrier()


def test_a_transfer_that_never_ends_does_not_keep_a_session() -> None:
    with rig() as r:
        r.front.connect()
        reading, writing = os.pipe()
        r.front.ask(Request.SET_DEVICE_STATE_FD, state(1, 0), [reading])
        r.disconnect()
        os.close(reading)
        os.close(writing)
