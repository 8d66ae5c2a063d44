# SPDX-License-Identifier: MIT
"""What a map benchmark is to measure, and what cannot be measured on this device and machine, known before."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..base.errors import MapRejected, MissingFeature
from ..base.uapi import Access, IotlbType
from ..chardev.iotlb import Limits
from ..chardev.message import IotlbMessage
from ..memory.guest import DEFAULT_GPA, HUGE_PAGE, PAGE_SIZE
from ..memory.pinned import allow_pinning
from .memory import Backing, Page, PhysicalLayout, unavailable
from .prover import SIZE as RINGS

HOLE = 1 << 30
"""Bytes of IOVA without a map behind each region, with :attr:`PhysicalLayout.HOLES`."""


class Mode(enum.Enum):
    """How messages are sent."""

    BATCH = "batch"
    """All between one BATCH_BEGIN and one BATCH_END."""
    UNBATCHED = "unbatched"
    """One by one: a set_map parent rebuilds its table at each physically contiguous run."""
    PER_REGION = "per-region-batch"
    """Each region in a batch of its own: a rebuild at each region."""


def default_memory(page: Page) -> tuple[int, ...]:
    """Return sizes that take a minute even unbatched and emulated: the cost goes with the number of pages squared."""
    least = {Page.SMALL: 64, Page.LARGE: 16, Page.HUGE: 1}[page]
    return tuple(least * page.bytes << i for i in range(1 if page is Page.HUGE else 4))


@dataclass(frozen=True, slots=True)
class MapBenchOptions:
    """What to measure: every size with every number of regions in every mode. ``memory`` in bytes."""

    memory: tuple[int, ...] = default_memory(Page.SMALL)
    regions: tuple[int, ...] = (16,)
    page: Page = Page.SMALL
    layout: PhysicalLayout = PhysicalLayout.CONTIGUOUS
    backing: Backing = Backing.SHARED
    asid: int = 0
    modes: tuple[Mode, ...] = tuple(Mode)
    repeat: int = 5


@dataclass(frozen=True, slots=True)
class Point:
    """Memory of one size, mapped in one number of regions."""

    bytes: int
    regions: int

    def __str__(self) -> str:
        return f"{in_words(self.bytes)} in {self.regions} region{'s' * (self.regions > 1)}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a point is not measured, and what would make it possible."""

    point: Point
    why: str
    hint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {"bytes": self.point.bytes, "regions": self.point.regions, "why": self.why, "hint": self.hint}


@dataclass(frozen=True, slots=True)
class MapPiece:
    """One region: where it lies in the memory and in the device's address space."""

    offset: int
    size: int
    iova: int


class MessagePlace:
    """Where in an address space the rings and the measured memory go."""

    def __init__(self, limits: Limits, layout: PhysicalLayout) -> None:
        self._limits = limits
        self._layout = layout
        low = -(-max(limits.first, 1) // HUGE_PAGE) * HUGE_PAGE
        # the rings below the memory, no hole between them
        self.base = max(int(DEFAULT_GPA), low + RINGS)
        if self.base + PAGE_SIZE - 1 > limits.last:
            self.base = low + RINGS

    @property
    def rings(self) -> int:
        """The rings' IOVA."""
        return self.base - RINGS

    def pieces(self, point: Point) -> list[MapPiece]:
        """Return a point's regions, by address; of equal size but for the last one."""
        pages = point.bytes // PAGE_SIZE
        cuts = [pages * i // point.regions * PAGE_SIZE for i in range(point.regions + 1)]
        made, iova = [], self.base
        for begin, end in pairwise(cuts):
            made.append(MapPiece(begin, end - begin, iova))
            iova += end - begin
            if self._layout is PhysicalLayout.HOLES:
                iova += HOLE
        return made

    def fits(self, point: Point) -> bool:
        """Whether a point's last byte is within the device's range."""
        last = self.pieces(point)[-1]
        return last.iova + last.size - 1 <= self._limits.last


def in_words(size: int) -> str:
    """Return a size as people write it."""
    for unit, name in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)


def refusal(point: Point, options: MapBenchOptions, limits: Limits, notes: list[str]) -> Refusal | None:
    """Return why a point cannot be measured, None if nothing speaks against it.

    May raise this process's memlock limit; what was changed goes to ``notes``.
    """
    if point.regions * PAGE_SIZE > point.bytes:
        return Refusal(point, f"{point.bytes} bytes have no {point.regions} pages", "fewer --regions")
    why, hint = unavailable(point.bytes, options.page, options.backing)
    if why:
        return Refusal(point, why, hint)
    if not MessagePlace(limits, options.layout).fits(point):
        span = f"{limits.first:#x}-{limits.last:#x}"
        holes = f", with holes of {in_words(HOLE)}" if options.layout is PhysicalLayout.HOLES else ""
        return Refusal(point, f"does not fit into the device's IOVA range {span}{holes}", "less --memory or --regions")
    # what is sure before anything is allocated; runs are counted afterwards
    pages = point.bytes // options.page.bytes
    scattered = options.layout is PhysicalLayout.SCATTERED and limits.pinned
    likely = int(0.95 * pages) if scattered else point.regions
    too_many = entries_refused(point, likely, limits, about="about " if scattered else "")
    if too_many:
        return too_many
    if limits.pinned:
        try:
            note = allow_pinning(point.bytes + RINGS)
        except MapRejected as e:
            return Refusal(point, str(e), e.hint)
        notes.extend([note] if note else [])
    return None


def entries_refused(point: Point, entries: int, limits: Limits, rings: int = 1, about: str = "") -> Refusal | None:
    """Return the refusal of a point that takes more IOTLB entries than there are, the rings' among them."""
    if limits.entries is None or entries + rings <= limits.entries:
        return None
    return Refusal(
        point,
        f"takes {about}{entries} IOTLB entries besides the proof's own, an address space may have {limits.entries}",
        "less --memory, fewer --regions, larger --page; or load vhost_vdpa (and the parent) with a larger "
        "max_iotlb_entries",
    )


def points(options: MapBenchOptions) -> Iterator[Point]:
    """Yield what was asked for, the cheap before the dear."""
    for size in sorted(set(options.memory)):
        for regions in sorted(set(options.regions)):
            yield Point(size, regions)


def check(options: MapBenchOptions, limits: Limits) -> None:
    """Raise :class:`~pyvhostvdpa.MissingFeature` for options with which no point could be measured."""
    if not 0 <= options.asid < limits.as_num:
        raise MissingFeature(
            f"ASID {options.asid}: the device has {limits.as_num} address space{'s' * (limits.as_num > 1)}",
            hint="vhost-vdpa bench map --asid 0",
        )


def messages(mode: Mode, pieces: list[MapPiece], hva: int, asid: int, unmap: bool = False) -> list[IotlbMessage]:
    """Return the messages that map (or unmap) all regions in a mode."""
    kind = IotlbType.INVALIDATE if unmap else IotlbType.UPDATE
    each = [
        IotlbMessage(kind, asid, p.iova, p.size, 0 if unmap else hva + p.offset, 0 if unmap else int(Access.RW))
        for p in pieces
    ]
    begin, end = IotlbMessage(IotlbType.BATCH_BEGIN, asid), IotlbMessage(IotlbType.BATCH_END, asid)
    if mode is Mode.UNBATCHED:
        return each
    if mode is Mode.BATCH:
        return [begin, *each, end]
    return [message for one in each for message in (begin, one, end)]


def work(mode: Mode, entries: int, regions: int) -> int:
    """Return how many entries a set_map parent looks at: what a prediction of time goes by."""
    if mode is Mode.BATCH:
        return 2 * entries
    if mode is Mode.UNBATCHED:
        return entries * (entries + 1) // 2 + 2 * entries
    return entries * (regions + 1) // 2 + 2 * entries
