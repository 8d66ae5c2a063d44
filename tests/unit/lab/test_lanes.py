"""Jobs side by side on one terminal."""

import threading
import time

import pytest

from labkit import lanes


def test_output_of_the_first_is_live_and_that_of_others_comes_in_one_piece_at_the_end():
    shown = []
    begun = threading.Event()

    def first(sink):
        assert sink is None
        assert begun.wait(10)
        shown.append(b"live")

    def second(sink):
        sink(b"a")
        begun.set()
        sink(b"b")

    lanes.beside([first, second], shown.append)
    assert shown == [b"live", b"ab"]


def test_an_error_of_one_ends_no_other_and_is_raised():
    done = []

    def fails(sink):
        raise ValueError("a job")

    with pytest.raises(ValueError, match="a job"):
        lanes.beside([lambda sink: done.append(1), fails, lambda sink: done.append(2)], done.append)
    assert sorted(done) == [1, 2]


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_neither_ctrl_c_nor_a_signal_waits_for_other_lanes(end):
    def interrupted(sink):
        raise end

    hold = threading.Event()
    begin = time.monotonic()
    with pytest.raises(end):
        lanes.beside([interrupted, lambda sink: hold.wait(20)], bytes)
    hold.set()
    assert time.monotonic() - begin < 10
