"""Running another program: its output and status, or a time limit."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from pyvhostvdpa.base.record import Record
from pyvhostvdpa.host.command import outcome


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> set[str]:
    found: set[str] = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):
            found.update(Path(f"/proc/self/task/{thread}/children").read_text().split())
    return found


def test_status_and_both_outputs_are_returned() -> None:
    assert outcome(["sh", "-c", "echo said; echo wrong >&2; exit 3"], 10) == (3, "said\n", "wrong\n")
    assert outcome(["sh", "-c", "kill -9 $$"], 10) == (-9, "", "")


def test_more_than_a_pipe_holds_is_read_from_both() -> None:
    script = "head -c 300000 /dev/zero | tr '\\0' x; head -c 300000 /dev/zero | tr '\\0' y >&2"
    status, said, complained = outcome(["sh", "-c", script], 30)
    assert (status, len(said), len(complained)) == (0, 300_000, 300_000)


def test_a_program_that_does_not_end_is_killed_in_time() -> None:
    # the first process of a container has orphans of other tests as well
    before, others, begin = open_descriptors(), children(), time.monotonic()
    with pytest.raises(TimeoutError):
        outcome(["sleep", "60"], 0.2)
    assert time.monotonic() - begin < 10
    assert open_descriptors() == before
    while children() - others:
        assert time.monotonic() - begin < 10, "it is left as a zombie"
        time.sleep(0.01)


def test_a_program_that_does_not_exist_leaves_no_descriptor() -> None:
    before = open_descriptors()
    with pytest.raises(FileNotFoundError):
        outcome(["/nonexistent/vdpa"], 1)
    assert open_descriptors() == before


class Fact(Record):
    """A record for these tests."""

    name: str
    size: int = 4
    tags: tuple[str, ...] = ()

    @property
    def twice(self) -> int:
        return 2 * self.size


def test_a_record_is_a_named_tuple() -> None:
    fact = Fact("a", tags=("x",))
    assert fact == ("a", 4, ("x",))
    assert (fact.name, fact.size, fact.twice) == ("a", 4, 8)
    assert repr(fact) == "Fact(name='a', size=4, tags=('x',))"
    assert fact._replace(size=5) == Fact("a", 5, ("x",))
    assert hash(fact) == hash(Fact("a", 4, ("x",)))
    name, *_ = fact
    assert name == "a"
    with pytest.raises(AttributeError):
        fact.size = 7  # type: ignore[misc]


def test_a_record_with_wrong_fields_is_a_type_error() -> None:
    for make in (Fact, lambda: Fact("a", 1, (), 2), lambda: Fact("a", other=1), lambda: Fact("a", name="b")):
        with pytest.raises(TypeError):
            make()  # type: ignore[no-untyped-call]
