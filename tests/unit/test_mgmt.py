"""What iproute2's vdpa says of a device's queues, as it is read."""

from __future__ import annotations

from pyvhostvdpa.host.mgmt import parse_vendor_statistics

SAID = """
0 {"vstats":{"vdpa0":{"queue_type":"rx","packets":12,"overruns":1}}}

1 {"vstats":{"vdpa0":{"queue_type":"tx","packets":7}}}
"""


def test_each_queue_has_its_own_numbers() -> None:
    assert parse_vendor_statistics(SAID, "vdpa0") == {0: {"packets": 12, "overruns": 1}, 1: {"packets": 7}}


def test_a_queue_of_which_nothing_was_said_is_left_out() -> None:
    said = SAID.replace('{"vdpa0":{"queue_type":"rx","packets":12,"overruns":1}}', "{}") + "\n2 \n3 not JSON\n"
    assert parse_vendor_statistics(said, "vdpa0") == {1: {"packets": 7}}


def test_another_devices_numbers_are_not_taken() -> None:
    assert parse_vendor_statistics(SAID, "vdpa1") == {}
