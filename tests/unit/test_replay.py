"""The control queue's replay without a device: what it notes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.memory.guest import DEFAULT_GPA, HUGE_PAGE, GuestMemory
from pyvhostvdpa.memory.mapped import SharedMemory
from pyvhostvdpa.net.control import ControlModel
from pyvhostvdpa.net.control_queue import ControlFailed, ControlOptions, ControlQueue, NetControlArea, NetGuestControl
from pyvhostvdpa.net.features import CONTROL, Feature
from pyvhostvdpa.trace.recorder import Trace
from pyvhostvdpa.virtqueue.layout import SplitLayout

Make = Callable[..., tuple[ControlQueue, Trace]]


@pytest.fixture
def make() -> Iterator[Make]:
    with GuestMemory([(DEFAULT_GPA, 4 << 20)]) as memory, SharedMemory("ours", HUGE_PAGE) as own:
        nic = GuestNic(memory, NicOptions(ring_size=16, features=CONTROL, control_index=2))
        assert nic.control is not None
        guest, made, trace = nic.control.queue, [], Trace()

        def build(num: int = 64, **state: object) -> tuple[ControlQueue, Trace]:
            model = ControlModel(CONTROL, **state)  # type: ignore[arg-type]
            area = NetControlArea(SplitLayout(num), own.hva, 0x1000)
            queue = ControlQueue(NetGuestControl(guest, model), memory, area, ControlOptions(0.01), trace.device("a"))
            made.append(queue)
            return queue, trace

        yield build
        for queue in made:
            queue.close()
        nic.close()


def test_a_command_longer_than_its_buffer_is_refused(make: Make) -> None:
    queue, _ = make(rss=bytes(5000))
    queue.model.features &= ~Feature.MQ
    with pytest.raises(ControlFailed, match="of 5002 bytes does not fit"):
        queue.replay()


def test_a_ring_without_room_for_a_command_is_refused(make: Make) -> None:
    queue, _ = make(num=1)
    with pytest.raises(ControlFailed, match="does not fit a queue of 1"):
        queue.replay()


def test_commands_are_noted_before_they_are_sent(make: Make) -> None:
    queue, trace = make(pairs=3)
    with pytest.raises(ControlFailed, match="did not answer"):
        queue.replay()
    assert [(event.event, dict(event.fields)) for event in trace.events] == [
        ("vhost_vdpa_net_load_mq", {"ncurqps": 3}),
        ("vhost_vdpa_net_load_cmd", {"class": 4, "cmd": 0, "data_num": 1, "data_size": 2}),
    ]
    assert all(event.result is None for event in trace.events)


def test_wait_beyond_the_deadline_reports_its_duration(make: Make) -> None:
    queue, _ = make(pairs=3)
    with pytest.raises(
        ControlFailed, match=r"a: the device did not answer 1 control commands within 0\.01 s"
    ) as failed:
        queue.replay()
    assert "--control-deadline" in failed.value.hint
    assert queue.died


def test_a_long_wait_is_logged_before_the_deadline(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pyvhostvdpa.net.control_queue._SLOW", 0.005)
    queue, _ = make(pairs=3)
    with pytest.raises(ControlFailed):
        queue.replay()
    [record] = caplog.records
    assert record.getMessage() == "a: the device has not answered 1 control commands for 0.005 s; waiting up to 0.01 s"


@pytest.mark.parametrize(("num", "groups"), [(2, [1, 1, 1, 1, 1]), (4, [2, 2, 1]), (64, [5])])
def test_commands_are_sent_in_groups_that_the_ring_holds(make: Make, num: int, groups: list[int]) -> None:
    queue, _ = make(num=num)
    assert [len(group) for group in queue._fitting([b"\0\0\0"] * 5)] == groups
