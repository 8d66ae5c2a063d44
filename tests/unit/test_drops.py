"""Which of a parent's counters mean a lost frame."""

from __future__ import annotations

import pytest

from pyvhostvdpa.migration.report import means_loss


@pytest.mark.parametrize(
    "name",
    [
        "drops",
        "rx overruns",
        "errors",
        "rx_err",
        "filtered",
        "down",
        "rx_discards",
        "rx_missed",
        "rx.no_buf",
        "rx-lost",
    ],
)
def test_means_loss_of_a_counter_of_lost_frames_is_true(name: str) -> None:
    assert means_loss(name)


@pytest.mark.parametrize(
    "name", ["packets", "bytes", "kicks", "calls", "chains", "received_desc", "shutdowns", "mirror"]
)
def test_means_loss_of_any_other_counter_is_false(name: str) -> None:
    assert not means_loss(name)
