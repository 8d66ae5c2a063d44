"""What is reported about the time that sending the rest of memory takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvhostvdpa.memory.guest import DEFAULT_GPA, GUEST_PAGE, GuestMemory
from pyvhostvdpa.migration.convergence import Convergence, duration
from pyvhostvdpa.migration.dirty import PageSet


@pytest.fixture
def left() -> Iterator[PageSet]:
    """260 pages, as in README's demo."""
    with GuestMemory([(DEFAULT_GPA, 4 << 20)]) as memory:
        pages = PageSet(memory)
        pages.add(DEFAULT_GPA, 260 * GUEST_PAGE)
        yield pages


FIRST_ROUND = 262 * GUEST_PAGE / 9.59
"""Bytes per second of a round that was 261,882 pages of zeros and 262 others."""


def test_a_round_of_zeros_gives_no_estimate(left: PageSet) -> None:
    rule = Convergence(downtime=1.0)
    assert rule.words(left, FIRST_ROUND, measured=False) == "how long that takes to send is not known yet"
    assert not rule.done(left, FIRST_ROUND)


def test_measured_rate_that_suffices_is_reported_as_at_most(left: PageSet) -> None:
    rule = Convergence(downtime=1.0)
    enough = 260 * GUEST_PAGE / 0.5
    assert rule.words(left, enough, measured=False) == "at most 500 ms to send"
    assert rule.done(left, enough)


def test_a_round_of_written_pages_gives_an_estimate(left: PageSet) -> None:
    rate = 260 * GUEST_PAGE / 0.19
    assert Convergence(downtime=1.0).words(left, rate, measured=True) == "190 ms to send"
    assert Convergence(downtime=0.01).words(left, rate, measured=True) == "190 ms to send"


def test_empty_page_set_takes_0_ms_to_send(left: PageSet) -> None:
    with GuestMemory([(DEFAULT_GPA, 2 << 20)]) as memory:
        assert Convergence(downtime=1.0).words(PageSet(memory), None, measured=False) == "0 ms to send"
    assert "not known" in Convergence(downtime=1.0).words(left, None, measured=False)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0604, "60 ms"), (1.9, "1900 ms"), (12.34, "12.3 s"), (1800, "30 min"), (40_000, "11 h"), (1e8, "27,778 h")],
)
def test_times_have_the_unit_that_people_would_choose(seconds: float, text: str) -> None:
    assert duration(seconds) == text
