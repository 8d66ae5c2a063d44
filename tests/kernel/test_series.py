"""The rows of the ladder make exactly the calls of QEMU with those patches, in their order, and the device counts them.

Letters: Q pairs, V = 2 Q data queues, N = V + 1 queues, H = Q + 1 net clients, R regions of guest memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from row_rig import Count, Rig

from pyvhostvdpa import State
from pyvhostvdpa.bench.ladder.rows import LADDER_ROWS, LadderRow
from pyvhostvdpa.device.procedure.series import Optimization


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def build(plan: LadderRow, pairs: int = 2, pieces: int = 4) -> Rig:
        rigs.append(Rig(plan, pairs, pieces))
        return rigs[-1]

    yield build
    for rig in rigs:
        rig.close()


EARLY = Optimization.DEST_PREMAP | Optimization.CAPS_AT_INIT
BATCHED = Optimization.BATCH_RINGS | Optimization.DEFER_UNMAP
OTHERS = {
    plan.row: plan
    for plan in (
        LadderRow("persist_only", "", EARLY | Optimization.PERSIST),
        LadderRow("persist_batch", "", EARLY | Optimization.PERSIST | BATCHED),
    )
}
ROWS = {row: plan for row, plan in {**LADDER_ROWS, **OTHERS}.items() if plan.procedure is None}
SIZES = [(1, 4), (2, 4), (4, 4), (8, 6)]


def dt1(row: str, q: int, r: int) -> Count:
    v, n, h = 2 * q, 2 * q + 1, q + 1
    groups = 3 if row not in ("baseline", "iterative_map", *OTHERS) else 0
    ioctls = v + 6 * n + 2 * h + 12 + groups + (h + 1 if row == "baseline" else 0)
    return {
        "desc_asid_keep": Count(2 * n + 6, 2 * n + 6, 0, ioctls),
        "persist": Count(2 * n + 6, 2 * n + 6, 0, ioctls),
        "batch": Count(6 * q + 14, q + 3, 0, ioctls),
        "persist_batch": Count(2 * r + 6 * q + 18, q + 5, 2, ioctls),
    }.get(row, Count(2 * r + 2 * n + 10, 2 * n + 8, 2, ioctls))


def dt2(row: str, q: int, r: int) -> Count:
    n, ioctls = 2 * q + 1, 5 + q + 1
    return {
        "baseline": Count(2 * n + r + 4, 2 * n + 3, 2 * n + 1, ioctls),
        "iterative_map": Count(2 * n + r + 4, 2 * n + 3, 2 * n + 1, ioctls),
        "desc_asid_literal": Count(2 * n + r + 4, 2 * n + 3, 1, ioctls),
        "desc_asid_keep": Count(2 * n + r + 4, 2 * n + 3, 1, ioctls),
        "persist": Count(2 * n + 2, 2 * n + 2, 0, ioctls),
        "batch": Count(2 * n + 4, 1, 0, ioctls),
        "persist_only": Count(2 * n + 2, 2 * n + 2, 2 * n + 2, ioctls),
        "persist_batch": Count(2 * n + 4, 1, 1, ioctls),
    }[row]


def dest(row: str, q: int, r: int) -> Count:
    n, h = 2 * q + 1, q + 1
    ioctls = 6 * n + h + 9
    return {
        "baseline": Count(r + 6, 5, 1, ioctls + h + 1),
        "batch": Count(8, 2, 0, ioctls),
        "persist_batch": Count(8, 2, 0, ioctls),
    }.get(row, Count(4, 4, 0, ioctls))


def cancel(row: str, q: int, r: int) -> Count | None:
    n = 2 * q + 1
    return {
        "baseline": Count(2 * r + 2 * n + 10, 2 * n + 8, 2 * n + 2),
        "iterative_map": Count(2 * r + 2 * n + 10, 2 * n + 8, 2 * n + 2),
        "desc_asid_literal": Count(2 * r + 2 * n + 10, 2 * n + 8, 2),
        "persist": Count(2 * n + 6, 2 * n + 6, 0),
        "batch": Count(2 * n + 12, 3, 0),
    }.get(row)


@pytest.mark.parametrize(("q", "r"), SIZES)
@pytest.mark.parametrize("row", ROWS)
def test_row_makes_as_many_calls_as_its_formulas_predict(make: Callable[..., Rig], row: str, q: int, r: int) -> None:
    rig = make(ROWS[row], q, r)
    rig.start(State.PASSTHROUGH)
    assert rig.count(lambda: rig.to(State.SHADOW)) == dt1(row, q, r)
    counted = rig.count(lambda: rig.to(State.PASSTHROUGH))
    expected = cancel(row, q, r)
    assert expected is None or counted[:3] == expected[:3]
    rig.to(State.SHADOW)
    assert rig.count(rig.device.stop) == dt2(row, q, r)
    rig.device.close()
    rig.open()
    assert rig.count(lambda: rig.start(State.PASSTHROUGH)) == dest(row, q, r)


def test_the_formulas_give_the_published_worked_example() -> None:
    assert [dt1(row, 2, 4) for row in ("baseline", "desc_asid_literal", "persist", "batch")] == [
        (28, 18, 2, 56),
        (28, 18, 2, 55),
        (16, 16, 0, 55),
        (26, 5, 0, 55),
    ]
    assert [dt2(row, 2, 4) for row in ("baseline", "desc_asid_literal", "persist", "batch")] == [
        (18, 13, 11, 8),
        (18, 13, 1, 8),
        (12, 12, 0, 8),
        (14, 1, 0, 8),
    ]
    assert (dt1("persist_only", 2, 4), dt1("persist_batch", 2, 4)) == ((28, 18, 2, 52), (38, 7, 2, 52))
    assert (dt1("baseline", 8, 6), dt1("batch", 8, 6)) == ((56, 42, 2, 158), (62, 11, 0, 151))


STATUS = ["GET_STATUS", "SET_STATUS", "GET_STATUS"]
RESET = ["SET_STATUS", *STATUS]
GUEST = 4
UNMAP_GUEST = ["B0", *["I0"] * GUEST, "E0"]
MAP_GUEST = ["B0", *["U0"] * GUEST, "E0"]
CAPS = ["GET_BACKEND_FEATURES", "SET_BACKEND_FEATURES"]
FEATURES = ["SET_FEATURES", *STATUS]
ENABLES = ["ENABLE4", "ENABLE0", "ENABLE1", "ENABLE2", "ENABLE3"]
OWN_CONTROL = ["GET_VRING_GROUP4", "GROUP1=1"]


def ring(index: int, asid: int) -> list[str]:
    """A shadow ring set up and mapped."""
    return [f"BASE{index}", f"KICK{index}", f"CALL{index}", f"U{asid}", f"U{asid}", f"ADDR{index}"]


def guest_ring(index: int) -> list[str]:
    return [f"NUM{index}", f"BASE{index}", f"ADDR{index}", f"KICK{index}", f"CALL{index}"]


def bases(first: int) -> list[str]:
    return [f"GET_VRING_BASE{first}", f"GET_VRING_BASE{first + 1}", "CONFIG-"]


STOPPED = ["SUSPEND", *bases(0), *bases(2)]
SWITCHES = {
    "baseline": [
        *STOPPED,
        *["I1", "I1", *RESET, *UNMAP_GUEST, "CONFIG-", "I1", "I1"],
        *[*FEATURES, *CAPS, "NUM0", "NUM1", *ring(0, 0), *ring(1, 0), "CONFIG"],
        *[CAPS[0], "NUM2", "NUM3", *ring(2, 0), *ring(3, 0), "CONFIG"],
        *["U0", "U0", CAPS[0], "NUM4", *ring(4, 0), *MAP_GUEST, *STATUS, "CONFIG", *ENABLES],
    ],
    "desc_asid_literal": [
        *STOPPED,
        *["I1", "I1", *RESET, *UNMAP_GUEST, "CONFIG-", "I1", "I1"],
        *["GROUP2=1", *FEATURES, "NUM0", "NUM1", *ring(0, 1), *ring(1, 1), "CONFIG"],
        *["NUM2", "NUM3", *ring(2, 1), *ring(3, 1), "CONFIG"],
        *[*OWN_CONTROL, "U1", "U1", "NUM4", *ring(4, 1), *MAP_GUEST, *STATUS, "CONFIG", *ENABLES],
    ],
    "persist": [
        *STOPPED,
        *["I1", "I1", *RESET, "CONFIG-", "I1", "I1"],
        *["GROUP2=1", *FEATURES, "NUM0", "NUM1", *ring(0, 1), *ring(1, 1), "CONFIG"],
        *["NUM2", "NUM3", *ring(2, 1), *ring(3, 1), "CONFIG"],
        *[*OWN_CONTROL, "U1", "U1", "NUM4", *ring(4, 1), *STATUS, "CONFIG", *ENABLES],
    ],
    "batch": [
        *STOPPED,
        *[*RESET, "CONFIG-", "B1", "I1", "I1", "I1", "I1", "E1"],
        *["GROUP2=1", *FEATURES, "NUM0", "NUM1", "B1", *ring(0, 1), *ring(1, 1), "E1", "CONFIG"],
        *["NUM2", "NUM3", "B1", *ring(2, 1), *ring(3, 1), "E1", "CONFIG"],
        *[*OWN_CONTROL, "B1", "U1", "U1", "E1", "NUM4", "B1", *ring(4, 1), "E1", *STATUS, "CONFIG", *ENABLES],
    ],
}
SWITCHES["iterative_map"] = [call for call in SWITCHES["baseline"] if call not in CAPS]
SWITCHES["desc_asid_keep"] = SWITCHES["persist"]

STOPS = {
    "baseline": [
        *["SUSPEND", *["I0"] * 4, "CONFIG-", *["I0"] * 4, "CONFIG-"],
        *["I0", "I0", *RESET, *UNMAP_GUEST, "CONFIG-", "I0", "I0"],
    ],
    "desc_asid_literal": [
        *["SUSPEND", *["I1"] * 4, "CONFIG-", *["I1"] * 4, "CONFIG-"],
        *["I1", "I1", *RESET, *UNMAP_GUEST, "CONFIG-", "I1", "I1"],
    ],
    "persist": [
        *["SUSPEND", *["I1"] * 4, "CONFIG-", *["I1"] * 4, "CONFIG-"],
        *["I1", "I1", *RESET, "CONFIG-", "I1", "I1"],
    ],
    "batch": ["SUSPEND", "CONFIG-", "CONFIG-", *RESET, "CONFIG-", "B1", *["I1"] * 12, "E1"],
}
STOPS["iterative_map"] = STOPS["baseline"]
STOPS["desc_asid_keep"] = STOPS["desc_asid_literal"]

_DATA = [*guest_ring(0), *guest_ring(1), "CONFIG", *guest_ring(2), *guest_ring(3), "CONFIG"]
STARTS = {
    "baseline": [
        *[*FEATURES, *CAPS, *_DATA[:11], CAPS[0], *_DATA[11:]],
        *[*OWN_CONTROL, "U1", "U1", CAPS[0], "NUM4", *ring(4, 1), *MAP_GUEST, *STATUS, "CONFIG", *ENABLES],
    ],
    "persist": [
        *[*FEATURES, *_DATA],
        *[*OWN_CONTROL, "U1", "U1", "NUM4", *ring(4, 1), *STATUS, "CONFIG", *ENABLES],
    ],
    "batch": [
        *[*FEATURES, *_DATA],
        *[*OWN_CONTROL, "B1", "U1", "U1", "E1", "NUM4", "B1", *ring(4, 1), "E1", *STATUS, "CONFIG", *ENABLES],
    ],
}
for _row in ("iterative_map", "desc_asid_literal", "desc_asid_keep"):
    STARTS[_row] = STARTS["persist"]


@pytest.mark.parametrize("row", SWITCHES)
def test_a_row_makes_its_calls_in_qemus_order(make: Callable[..., Rig], row: str) -> None:
    rig = make(LADDER_ROWS[row])
    rig.start(State.PASSTHROUGH)
    assert rig.calls(lambda: rig.to(State.SHADOW)) == SWITCHES[row]
    assert rig.calls(rig.device.stop) == STOPS[row]
    rig.device.close()
    rig.open()
    assert rig.calls(lambda: rig.start(State.PASSTHROUGH)) == STARTS[row]


def test_a_cancelled_migration_binds_the_descriptors_back(make: Callable[..., Rig]) -> None:
    rig = make(LADDER_ROWS["batch"])
    rig.start(State.PASSTHROUGH)
    rig.to(State.SHADOW)
    assert rig.calls(lambda: rig.to(State.PASSTHROUGH)) == [*STOPS["batch"], "GROUP2=0", *STARTS["batch"]]


@pytest.mark.parametrize("row", ROWS)
def test_the_guests_frames_flow_in_every_state_of_a_row(make: Callable[..., Rig], row: str) -> None:
    rig = make(ROWS[row])
    for mode in (State.PASSTHROUGH, State.SHADOW, State.PASSTHROUGH, State.SHADOW):
        if rig.device.state is State.RESET:
            rig.start(mode)
        else:
            rig.to(mode)
        rig.receives(50)
    rig.device.stop()
    rig.start(State.PASSTHROUGH)
    rig.receives(50)
    rig.settle()


def test_a_translated_layout_that_was_kept_is_replaced_when_the_guest_goes_back(make: Callable[..., Rig]) -> None:
    """A stop in shadow mode keeps maps with PERSIST; they are of no use to passthrough."""
    rig = make(ROWS["persist_only"])
    rig.start(State.SHADOW)
    assert rig.count(rig.device.stop).messages == 2 * 5 + 2
    made = rig.calls(lambda: rig.start(State.PASSTHROUGH))
    assert made[: len(UNMAP_GUEST)] == UNMAP_GUEST
    assert made.count("U0") == GUEST
    rig.receives(50)
