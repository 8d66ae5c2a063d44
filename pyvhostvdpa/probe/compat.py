# SPDX-License-Identifier: MIT
"""Whether a guest on one device can move to another one, from what ``probe --json`` printed of both.

No device is opened: the two files may come from two hosts. The rules are those
of a migration (:mod:`pyvhostvdpa.migration.admission`): the configuration
space is compared by the same function, :func:`pyvhostvdpa.net.fit.misfits`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..base.errors import MissingFeature
from ..base.uapi import BackendFeature, names
from ..memory.guest import DEFAULT_GPA
from ..net.config import NetConfig, control_index
from ..net.features import CONTROL, IMPLEMENTED, REQUIRED, SUPPORTED, Feature
from ..net.fit import misfits, unknown_fields

SCHEMA = "pyvhostvdpa/compat/1"
PROBED = "pyvhostvdpa/probe/probe/"
_GUEST_RING = 256
"""Descriptors in each ring of the guest of ``vhost-vdpa migrate``."""


@dataclass(frozen=True, slots=True)
class GuestDemands:
    """The guest that is to move.

    ``everything`` stands for one that uses all that the source offers and this
    package can move; otherwise it is that of ``vhost-vdpa migrate``, with so
    many ``pairs`` (None: all that the source has). ``memory`` is its size in
    bytes, None if that is not compared.
    """

    everything: bool = True
    pairs: int | None = None
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What keeps the guest from moving: the field, both values in words, why it matters, what mends it."""

    field: str
    source: str
    destination: str
    why: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the fields for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What stands in the way, what is worth knowing though it does not, and the command that makes it fit."""

    source: str
    destination: str
    obstacles: tuple[Obstacle, ...]
    notes: tuple[str, ...]
    command: str

    @property
    def fits(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.obstacles

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison for JSON, schema "pyvhostvdpa/compat/1"."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "destination": self.destination,
            "fits": self.fits,
            "obstacles": [obstacle.to_dict() for obstacle in self.obstacles],
            "notes": list(self.notes),
            "command": self.command or None,
        }


def require_probe(found: Mapping[str, Any], name: str) -> None:
    """Raise :class:`~pyvhostvdpa.MissingFeature`, which begins with ``name``, if ``found`` is no probe.

    A probe is what ``vhost-vdpa probe --json`` prints of a device that it opened.
    """
    schema = str(found.get("schema", ""))
    if not schema.startswith(PROBED) or not found.get("opened"):
        raise MissingFeature(
            f"{name} is not what 'vhost-vdpa probe --json' prints of an opened device (schema {schema or 'none'})",
            hint="vhost-vdpa probe DEV --json > FILE",
        )


class _Side:
    """One device, as its probe describes it."""

    def __init__(self, probed: Mapping[str, Any]) -> None:
        require_probe(probed, "one of the two")
        self.name = str(probed["device"]["name"])
        self.mgmtdev = probed["device"].get("mgmtdev")
        self.net = probed["virtio_id"] == 1
        self.offered = Feature(int(probed["features"]["bits"], 16))
        self.accepted = Feature(int(probed["accepted_features"]["bits"], 16))
        self.raw = bytes.fromhex(probed["config"]["raw"])
        self.rings: list[int] | None = probed["vring_sizes"]
        self.max_ring = int(probed["vring_num"])
        self.last = int(probed["iova_range"]["last"], 16)
        self.first = int(probed["iova_range"]["first"], 16)
        self.entries: int | None = probed["parent"]["max_iotlb_entries"]
        self.pinned: bool | None = probed["parent"]["pinned"]
        backend = probed["backend_features"]
        best = backend["proved"] if backend["proved"] is not None else backend["usable"]
        self.backend = BackendFeature(int(best, 16))
        self.blockers = [str(each) for each in probed["blockers"]]

    def config(self, features: Feature) -> NetConfig:
        """Return the configuration space for a guest with these features."""
        return NetConfig.parse(self.raw, features)

    @property
    def max_pairs(self) -> int:
        """Queue pairs that it has."""
        return self.config(self.accepted).max_pairs or 1

    def largest_ring(self, pairs: int) -> int:
        """Return the largest ring that each queue of so many pairs can have."""
        rings = (self.rings or [])[: 2 * pairs]
        return min(rings, default=self.max_ring)


def compare(source: Mapping[str, Any], destination: Mapping[str, Any], guest: GuestDemands | None = None) -> Comparison:
    """Compare two probes, each a dictionary as ``probe --json`` prints it.

    Raises :class:`~pyvhostvdpa.MissingFeature` for something else, or for a
    probe that did not open its device.
    """
    here, there, guest = _Side(source), _Side(destination), guest or GuestDemands()
    features = here.accepted & (IMPLEMENTED if guest.everything else SUPPORTED | CONTROL)
    found = list(_obstacles(here, there, guest, features))
    return Comparison(
        here.name, there.name, tuple(found), tuple(_notes(here, there, features)), _command(here, there, found)
    )


def _obstacles(here: _Side, there: _Side, guest: GuestDemands, features: Feature) -> Iterator[Obstacle]:
    for role, side in (("source", here), ("destination", there)):
        if not side.net:
            yield Obstacle("virtio id", "", "", f"the {role} is not a net device")
            return
    for blocker in here.blockers:
        yield Obstacle("source", blocker, "", "a guest cannot leave it", "vhost-vdpa help hardware")
    if missing := (REQUIRED | features) & ~there.accepted:
        yield Obstacle(
            "features", names(features), names(there.accepted), f"the destination lacks {names(missing)}", "recreate"
        )
        # which fields of the configuration space mean something depends on the features
        features &= there.accepted
    yield from _queues(here, there, guest, features)
    for misfit in misfits(features, here.raw, there.raw):
        yield Obstacle(misfit.field, misfit.guest, misfit.device, misfit.why, misfit.hint)
    for feature in (BackendFeature.IOTLB_MSG_V2, BackendFeature.IOTLB_BATCH):
        if feature not in there.backend:
            yield Obstacle(f"backend feature {feature.name}", "", "missing", "guest memory cannot be mapped")
    if guest.memory is not None:
        yield from _memory(there, guest.memory)


def _queues(here: _Side, there: _Side, guest: GuestDemands, features: Feature) -> Iterator[Obstacle]:
    pairs = here.max_pairs if guest.pairs is None else guest.pairs
    ring = here.largest_ring(pairs)
    ring = ring if guest.everything else min(_GUEST_RING, ring)
    if there.max_pairs < pairs:
        yield Obstacle("queue pairs", str(pairs), str(there.max_pairs), "the guest uses all of them", "recreate")
    elif there.largest_ring(pairs) < ring:
        yield Obstacle(
            "ring size", str(ring), str(there.largest_ring(pairs)), "the guest's rings are longer than it takes"
        )
    source, destination = (control_index(features, side.config(features).max_pairs) for side in (here, there))
    if source != destination:
        yield Obstacle("control queue", str(source), str(destination), "the guest's driver uses that index", "recreate")


def _memory(there: _Side, memory: int) -> Iterator[Obstacle]:
    end = DEFAULT_GPA + memory - 1
    if there.first > DEFAULT_GPA or there.last < end:
        yield Obstacle(
            "IOVA range",
            f"{DEFAULT_GPA:#x}-{end:#x}",
            f"{there.first:#x}-{there.last:#x}",
            "guest memory is mapped at its own addresses",
        )


def _notes(here: _Side, there: _Side, features: Feature) -> Iterator[str]:
    if unknown := unknown_fields(features, here.raw, there.raw):
        yield f"not compared, unknown on one side: {', '.join(unknown)}"
    if there.blockers:
        yield f"a guest that moved to {there.name} cannot move on: {'; '.join(there.blockers)}"
    for feature in (BackendFeature.DESC_ASID, BackendFeature.IOTLB_PERSIST, BackendFeature.RESUME):
        if feature in here.backend and feature not in there.backend:
            yield f"{there.name} has no {feature.name}, which the source has: the next migration takes longer"
    if there.entries is not None and there.pinned and (here.entries or there.entries) > there.entries:
        yield f"{there.name} takes {there.entries} IOTLB entries per address space, the source {here.entries}"


def _command(here: _Side, there: _Side, found: list[Obstacle]) -> str:
    """Return what creates the destination like the source, if that mends what stands in the way."""
    mended = {"features", "queue pairs", "control queue", "MAC address", "MTU", "max_virtqueue_pairs"}
    if not found or any(obstacle.field not in mended for obstacle in found):
        return ""
    config = here.config(here.accepted)
    words = [f"vdpa dev add name {there.name} mgmtdev {there.mgmtdev or 'MGMTDEV'}"]
    words += [f"mac {config.mac}"] if config.mac else []
    words += [f"mtu {config.mtu}"] if config.mtu and any(each.field == "MTU" for each in found) else []
    words += [f"max_vqp {config.max_pairs}"] if config.max_pairs else []
    if any(each.field == "features" for each in found):
        words.append(f"device_features {int(here.offered):#x}")
    return f"vhost-vdpa dev del {there.name}; {' '.join(words)}"
