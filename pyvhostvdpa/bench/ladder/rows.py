# SPDX-License-Identifier: MIT
"""Rows of the ladder: which optimizations are on, and what a device can do of them.

The names and figures are those of the cover letter of "vdpa-net: improve
migration downtime through descriptor ASID and persistent IOTLB" (Si-Wei Liu,
qemu-devel, 7 December 2023). Its rows are cumulative; here each optimization
is a switch of its own and a row is a set of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...base.errors import MissingFeature
from ...base.uapi import ALL_BACKEND_FEATURES, BackendFeature
from ...device.procedure.base import Procedure
from ...device.procedure.direct import Direct
from ...device.procedure.in_place import InPlace
from ...device.procedure.series import Optimization, Series
from ...device.target import Target

_ALWAYS = BackendFeature.IOTLB_MSG_V2 | BackendFeature.IOTLB_BATCH | BackendFeature.IOTLB_ASID | BackendFeature.SUSPEND
"""What QEMU acknowledges in every row."""
_NONE = Optimization(0)


def spell(value: float | tuple[float, float]) -> str:
    """Return a published figure for people; two numbers are a range."""
    return f"{value[0]:g} to {value[1]:g}" if isinstance(value, tuple) else f"{value:g}"


@dataclass(frozen=True, slots=True)
class Published:
    """What the cover letter says: downtimes in seconds, two numbers for a range.

    ``dt1_explained`` is whether the calls of the row account for its DT1;
    where they do not, a difference says nothing about either side.
    """

    dt1_s: float | tuple[float, float]
    dt2_s: float
    dt1_explained: bool = True

    def to_dict(self) -> dict[str, object]:
        """Return the fields for JSON."""
        dt1: object = list(self.dt1_s) if isinstance(self.dt1_s, tuple) else self.dt1_s
        return {"dt1_s": dt1, "dt2_s": self.dt2_s}


@dataclass(frozen=True, slots=True)
class LadderRow:
    """A row: ``switches`` that are on, of which ``own`` are what the row is about.

    ``procedure`` is a way of the package's own, for a row that is not QEMU's.
    """

    row: str
    title: str
    switches: Optimization = _NONE
    own: Optimization = _NONE
    published: Published | None = None
    procedure: type[Direct] | None = None

    @property
    def use(self) -> BackendFeature:
        """The backend features to acknowledge."""
        if self.procedure is not None:
            return ALL_BACKEND_FEATURES
        wanted = _ALWAYS
        if Optimization.DESC_ASID in self.switches:
            wanted |= BackendFeature.DESC_ASID
        if Optimization.PERSIST in self.switches:
            wanted |= BackendFeature.IOTLB_PERSIST
        return wanted

    def resolve(self, target: Target, keeps_maps: bool = False) -> Resolution:
        """Return what a device can do of it; ``keeps_maps`` if its resets drop no maps whatever they are asked."""
        left_out = {switch: why for switch, why in _lacks(target, keeps_maps).items() if switch in self.switches}
        switches = self.switches
        for switch in left_out:
            switches &= ~switch
        impossible = [why for switch, why in left_out.items() if switch in self.own]
        if self.procedure is InPlace and (lacking := InPlace.lacks(target)):
            impossible.append(lacking)
        return Resolution(self, switches, left_out, "; ".join(impossible))


@dataclass(frozen=True, slots=True)
class Resolution:
    """A row on a device: what is left of its switches, and why each other one is left out.

    ``impossible`` is why the row cannot be run, since what it is about is missing; "" if it can.
    """

    plan: LadderRow
    switches: Optimization
    left_out: Mapping[Optimization, str]
    impossible: str

    def make(self, target: Target) -> Procedure:
        """Return the procedure for a device; that of an impossible row must not be started."""
        if self.plan.procedure is not None:
            return (Direct if self.impossible else self.plan.procedure)(target)
        return Series(target, self.switches)


def _lacks(target: Target, keeps_maps: bool) -> dict[Optimization, str]:
    """Return why a device cannot do an optimization, for each that it cannot."""
    found = {}
    features = target.backend_features
    if not target.separate_descriptors:
        found[Optimization.DESC_ASID] = target.why_not_separate
    if BackendFeature.IOTLB_PERSIST not in features:
        found[Optimization.PERSIST] = "IOTLB_PERSIST is not offered"
    if BackendFeature.IOTLB_BATCH not in features:
        found[Optimization.BATCH_RINGS] = found[Optimization.DEFER_UNMAP] = "IOTLB_BATCH is not offered"
    if not keeps_maps:
        found[Optimization.KEEP_AT_SWITCH] = (
            "a reset drops maps unless IOTLB_PERSIST is acknowledged; only vdpa_hwsim with clean_map=N keeps them"
        )
    return found


_MAPPED_EARLY = Optimization.DEST_PREMAP | Optimization.CAPS_AT_INIT
_APART = _MAPPED_EARLY | Optimization.DESC_ASID
_PERSISTENT = _APART | Optimization.PERSIST
_BATCHED = Optimization.BATCH_RINGS | Optimization.DEFER_UNMAP

LADDER_ROWS = {
    plan.row: plan
    for plan in (
        LadderRow("baseline", "baseline QEMU", _NONE, published=Published((20.0, 30.0), 20.0, dt1_explained=False)),
        LadderRow(
            "iterative_map",
            "+ iterative map at destination",
            _MAPPED_EARLY,
            Optimization.DEST_PREMAP,
            Published(5.0, 20.0, dt1_explained=False),
        ),
        LadderRow(
            "desc_asid_literal",
            "+ SVQ descriptor ASID, maps dropped at resets",
            _APART,
            Optimization.DESC_ASID,
            Published(2.0, 5.0, dt1_explained=False),
        ),
        LadderRow(
            "desc_asid_keep",
            "+ SVQ descriptor ASID, maps kept in a switch",
            _APART | Optimization.KEEP_AT_SWITCH,
            Optimization.DESC_ASID | Optimization.KEEP_AT_SWITCH,
            Published(2.0, 5.0, dt1_explained=False),
        ),
        LadderRow("persist", "+ persistent IOTLB", _PERSISTENT, Optimization.PERSIST, Published(2.0, 2.0)),
        LadderRow("batch", "+ (un)map batching", _PERSISTENT | _BATCHED, _BATCHED, Published(1.7, 1.5)),
        LadderRow("ours", "the package's own procedure", procedure=Direct),
        LadderRow("beyond", "switched in place, without a reset", procedure=InPlace),
    )
}
"""Every row, in the order of the table."""


def ladder_row(name: str) -> LadderRow:
    """Return a row by its name; MissingFeature lists the known ones."""
    if name not in LADDER_ROWS:
        known = ",".join(LADDER_ROWS)
        raise MissingFeature(f"there is no row {name!r}", hint=f"vhost-vdpa ladder --rows takes some of {known}")
    return LADDER_ROWS[name]
