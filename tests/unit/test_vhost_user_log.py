"""The dirty log of a vhost-user session: switches, what is logged, and what cannot be."""

from __future__ import annotations

import os

import pytest
from session_rig import MINIMAL, MODERN, OLD, marks_of_all, memory_of, refuse_a_stop, rig, running
from vhost_front_end import Refused

from pyvhostvdpa.base.errors import QueueBroken
from pyvhostvdpa.device.net import State
from pyvhostvdpa.vhost_user.messages import ProtocolFeature


@pytest.mark.parametrize("use", [MODERN, OLD, MINIMAL], ids=["modern", "old", "minimal"])
def test_logging_switches_in_place_within_the_answer_and_a_cancel_switches_back(use: ProtocolFeature) -> None:
    with running(use) as r:
        r.device.forget()
        os.close(r.front.start_logging())
        r.front.barrier()
        assert [call.name for call in r.device.calls if call.name in ("set_log", "stop", "start")] == [
            "set_log",
            "stop",
            "start",
        ]
        assert r.device.state is State.SHADOW
        r.front.stop_logging()
        assert r.device.state is State.PASSTHROUGH
        assert r.device.log is None
        os.close(r.front.start_logging())
        r.front.barrier()
        assert r.device.state is State.SHADOW


def test_a_migration_ends_with_the_device_stopped_and_ready_to_continue() -> None:
    with running() as r:
        os.close(r.front.start_logging())
        r.front.stop()
        assert r.backend.migration.keys() >= {"switch_ms", "stop_ms"}
        # the migration failed at its very end: the source runs again
        r.front.start(share=False)
        assert r.device.state is State.PASSTHROUGH
        assert r.device.log is None


def test_a_log_is_replaced_while_the_device_runs() -> None:
    with running() as r:
        os.close(r.front.start_logging())
        first = r.device.log
        os.close(r.front.log())
        assert r.device.log is not None
        assert r.device.log is not first
        assert r.device.state is State.SHADOW


def test_a_device_started_while_logging_is_in_shadow_mode_and_its_early_pages_are_not_lost() -> None:
    with rig(OLD) as r:
        r.front.connect()
        r.front.acknowledge(r.front.offered, log=True)
        r.front.start(log=True)
        assert r.device.state is State.SHADOW
        marked = marks_of_all(r)
        os.close(r.front.log())
        assert marked, "what was written before there was a log is unknown"


def test_a_log_that_is_too_small_is_refused_where_qemu_looks() -> None:
    with running() as r:
        with memory_of(r), pytest.raises(Refused):
            r.front.log(1)
        with pytest.raises(Refused):
            r.front.acknowledge(log=True, ack=True)
        assert r.device.state is State.PASSTHROUGH


def test_a_bad_log_while_logging_ends_the_connection() -> None:
    with running() as r:
        os.close(r.front.start_logging())
        with memory_of(r), pytest.raises(ConnectionError):
            r.front.log(1)
        r.join()
        assert r.device.state is State.RESET


def test_a_device_that_cannot_be_switched_stays_in_passthrough_and_all_is_dirty() -> None:
    with running() as r:
        marked = marks_of_all(r)
        refuse_a_stop(r)
        os.close(r.front.start_logging())
        assert r.device.state is State.PASSTHROUGH
        assert r.backend.dirty_log.inexact
        assert marked
        marked.clear()
        r.front.stop()
        assert marked, "what was written after the last look has to be marked behind the stop"


def test_a_switch_whose_start_fails_goes_back_to_passthrough_and_all_is_dirty() -> None:
    with running() as r:
        r.device.fails["start"] = QueueBroken("no room")
        os.close(r.front.start_logging())
        assert r.device.state is State.PASSTHROUGH
        assert r.backend.dirty_log.inexact


def test_a_switch_that_loses_the_device_is_reported_and_not_refused() -> None:
    with running() as r:
        r.device.fails["stop"] = QueueBroken("an invalid used ring")
        os.close(r.front.start_logging())
        assert r.device.state is State.RESET
        assert r.backend.failed
        assert "device-failed" in r.names()
