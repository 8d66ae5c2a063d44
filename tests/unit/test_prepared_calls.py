"""A list of requests that C makes in one go: the order, the record, and what an error leaves."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from pyvhostvdpa import KernelError
from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.chardev.calls import PreparedCalls
from pyvhostvdpa.trace.recorder import Trace

FIONREAD = 0x541B


class Door:
    """What a list needs of a chardev; its descriptor is a pipe's, to which a vhost request means nothing."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self.path = "/dev/null"
        self.events = Trace()
        self.trace = self.events.device(self.path)

    def fileno(self) -> int:
        return self.read_end


@pytest.fixture
def door() -> Any:
    made = Door()
    yield made
    os.close(made.read_end)
    os.close(made.write_end)


def test_an_error_names_its_call_and_leaves_the_rest_undone(door: Door) -> None:
    calls = PreparedCalls(door)  # type: ignore[arg-type]
    calls.set_vring_base(3, 7)
    calls.resume()
    with pytest.raises(KernelError, match="VHOST_SET_VRING_BASE") as raised:
        calls.run()
    assert raised.value.errno == errno.ENOTTY
    assert "index=3" in str(raised.value)
    assert calls.done == 0
    [event] = door.events.events
    assert (event.event, event.result, event.fields) == ("VHOST_SET_VRING_BASE", -errno.ENOTTY, {"index": 3, "num": 7})
    assert 0 < event.t_begin <= event.t_end


def test_requests_are_made_in_order_until_one_fails(door: Door) -> None:
    os.write(door.write_end, b"12345")
    answers = ffi.new("int[3]", [-1, -1, -1])
    calls = ffi.new("struct prepared_call[3]")
    for number, call in enumerate(calls):
        call.request = FIONREAD if number != 1 else 0xAF00
        call.argument = int(ffi.cast("uintptr_t", answers + number))
    assert lib.calls_run(door.read_end, calls, 3) == 1
    assert list(answers) == [5, -1, -1]
    assert [call.result for call in calls] == [0, -errno.ENOTTY, 0]
    # a request takes longer than the clock's resolution
    assert 0 < calls[0].begin < calls[0].end <= calls[1].begin < calls[1].end
    assert calls[2].begin == 0


def test_prepared_request_arguments_can_be_changed_between_runs(door: Door) -> None:
    calls = PreparedCalls(door)  # type: ignore[arg-type]
    place = calls.set_vring_base(1, 0)
    calls.put(place, 9)
    assert calls.got(place) == 9
    for _ in range(2):
        with pytest.raises(KernelError):
            calls.run()
    assert [event.fields["num"] for event in door.events.events] == [9, 9]
    calls.put(place, 10)
    assert [event.fields["num"] for event in door.events.events] == [9, 9]


def test_an_empty_list_makes_no_request(door: Door) -> None:
    PreparedCalls(door).run()  # type: ignore[arg-type]
    assert not door.events.events
