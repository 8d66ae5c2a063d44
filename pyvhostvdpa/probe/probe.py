# SPDX-License-Identifier: MIT
"""What a device is and can do: advertised, usable, proved.

Opening the chardev resets the device, so a device in use is refused;
:func:`look` returns what is known without opening.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..base.errors import DeviceBusy, KernelError, MissingFeature
from ..base.uapi import ALL_BACKEND_FEATURES, VIRTIO_ID_NET, BackendFeature, Status, name_list, names
from ..chardev.door import VhostVdpa, check_path
from ..chardev.iotlb import Limits
from ..device.groups import ring_sizes
from ..host import mgmt
from ..host.mgmt import VdpaDevice
from ..host.parents import Parent, check_served, parent_of, unserved
from ..net.config import NetConfig, control_index
from ..net.features import REQUIRED, Feature, negotiate
from .proofs import MUST_MOVE_S, Proof, Subject, prove

SCHEMA = "pyvhostvdpa/probe/probe/1"
_STARTED = Status.ACKNOWLEDGE | Status.DRIVER
_LACKING = (errno.EOPNOTSUPP, errno.ENOTTY)
_MAX_PROOF_RING = 64
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BackendColumns:
    """Backend features in three columns.

    ``usable`` is the part of ``advertised`` that the rest of the device lets one use,
    ``proved`` what was seen to work, None if nothing was tried. ``why`` has,
    by the feature's name, why it is not usable or what was seen.
    """

    advertised: BackendFeature
    usable: BackendFeature
    proved: BackendFeature | None
    why: dict[str, str]

    @property
    def best(self) -> BackendFeature:
        """The most that is known to work: proved if tried, usable if not."""
        return self.usable if self.proved is None else self.proved

    def to_dict(self) -> dict[str, Any]:
        """Return the columns for JSON, as hex strings."""
        return {
            "advertised": hex(self.advertised),
            "usable": hex(self.usable),
            "proved": None if self.proved is None else hex(self.proved),
            "why": self.why,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """Yes or no, and why."""

    yes: bool
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Return both for JSON."""
        return {"yes": self.yes, "why": self.why}


@dataclass(frozen=True, slots=True)
class Probe:
    """Everything that a device reports of itself.

    ``device`` is its entry on the vdpa bus, ``parent`` the driver behind it,
    ``virtio_id`` the kind of device (VHOST_VDPA_GET_DEVICE_ID), ``status`` the
    status that it had, ``features`` what it offers (VHOST_GET_FEATURES) and
    ``accepted`` what it took of a driver that wants all of them. ``config`` is
    the configuration space (virtio 1.3, 5.1.4), ``vqs_count`` the number of
    queues, ``vring_num`` the largest ring, ``group_num`` and ``as_num`` the
    numbers of groups and address spaces, ``iova_range`` the first and the last
    address. ``vring_sizes``, ``vring_groups`` and ``vring_desc_groups`` are by
    queue, None where the parent does not report them. ``backend`` has the
    backend features that are advertised, usable and proved.
    """

    device: VdpaDevice
    parent: Parent
    virtio_id: int
    status: Status
    features: Feature
    accepted: Feature
    config: NetConfig
    vqs_count: int
    vring_num: int
    vring_sizes: list[int] | None
    group_num: int
    as_num: int
    vring_groups: list[int] | None
    vring_desc_groups: list[int] | None
    iova_range: tuple[int, int]
    backend: BackendColumns

    @property
    def control_queue(self) -> int | None:
        """The control queue's index, None without one."""
        return control_index(self.accepted, self.config.max_pairs) if self.virtio_id == VIRTIO_ID_NET else None

    @property
    def data_queues(self) -> list[int]:
        """The indices of all other queues."""
        return [index for index in range(self.vqs_count) if index != self.control_queue]

    def to_dict(self) -> dict[str, Any]:
        """Return the probe for JSON, schema "pyvhostvdpa/probe/probe/1"."""
        return {
            "schema": SCHEMA,
            "opened": True,
            "device": self.device.to_dict(),
            "parent": {
                "module": self.parent.module,
                "pinned": self.parent.pinned,
                "unknown": self.parent.why or None,
                "max_iotlb_entries": self.parent.max_iotlb_entries,
            },
            "virtio_id": self.virtio_id,
            "status": _bits(self.status),
            "features": _bits(self.features),
            "accepted_features": _bits(self.accepted),
            "config": self.config.to_dict() if self.virtio_id == VIRTIO_ID_NET else {"raw": self.config.raw.hex()},
            "vqs_count": self.vqs_count,
            "vring_num": self.vring_num,
            "vring_sizes": self.vring_sizes,
            "group_num": self.group_num,
            "as_num": self.as_num,
            "vring_groups": self.vring_groups,
            "vring_desc_groups": self.vring_desc_groups,
            "control_queue": self.control_queue,
            "iova_range": {"first": hex(self.iova_range[0]), "last": hex(self.iova_range[1])},
            "backend_features": self.backend.to_dict(),
            "enables": {name: answer.to_dict() for name, answer in self.enables().items()},
            "migratable": not self.blockers(),
            "blockers": self.blockers(),
        }

    def enables(self) -> dict[str, Answer]:
        """Return what the backend features make possible for a migration, by name, each with its reason."""
        best, unsure = self.backend.best, self.backend.proved is None

        def needs(feature: BackendFeature, gain: str, loss: str) -> Answer:
            if feature in best:
                return Answer(True, gain)
            reason = self.backend.why.get(feature.name or "", "")
            return Answer(False, f"{loss}: no {feature.name}" + (f" ({reason})" if reason else ""))

        return {
            "iterative_map": Answer(True, "guest memory can be mapped before the guest arrives, in the background"),
            "batch": needs(BackendFeature.IOTLB_BATCH, "many maps cost one rebuild of the device's table", "one each"),
            "persist": needs(
                BackendFeature.IOTLB_PERSIST, "guest memory stays mapped over the reset", "each reset maps all again"
            ),
            "desc_asid": needs(
                BackendFeature.DESC_ASID,
                "shadow rings come and go without touching guest memory's maps",
                "shadow rings share the guest's address space",
            ),
            "resume": needs(
                BackendFeature.RESUME, "a cancelled migration just resumes", "a cancelled migration has to reset"
            ),
            "enable_after_driver_ok": needs(
                BackendFeature.ENABLE_AFTER_DRIVER_OK,
                "the control queue's state can be restored before the data queues run",
                "all queues start together",
            ),
            "cvq_isolation": self._isolation(unsure),
        }

    def _isolation(self, unsure: bool) -> Answer:
        control, groups = self.control_queue, self.vring_groups
        if control is None:
            return Answer(False, "no control queue")
        if groups is None or control >= len(groups):
            return Answer(False, "the parent has no groups: the control queue shares the data queues'")
        if groups[control] in {groups[index] for index in self.data_queues}:
            return Answer(False, f"the control queue shares group {groups[control]} with data queues")
        if BackendFeature.IOTLB_ASID not in self.backend.best:
            return Answer(
                False, self.backend.why.get("IOTLB_ASID", "its group cannot have an address space of its own")
            )
        by = "by its group number" if unsure else "ASIDs separate, shown with the data queues"
        return Answer(True, f"queue {control} is alone in group {groups[control]} ({by})")

    def blockers(self) -> list[str]:
        """Return what keeps a guest on this device from being migrated, one line each; empty if nothing does."""
        found = []
        if self.virtio_id != VIRTIO_ID_NET:
            return [f"virtio id {self.virtio_id}: only net devices (1) can be migrated by this package"]
        if missing := REQUIRED & ~self.features:
            found.append(f"it lacks {names(missing)}: its queues cannot be shadowed")
        if BackendFeature.SUSPEND not in self.backend.best:
            reason = self.backend.why.get("SUSPEND", "")
            found.append("no SUSPEND: its queues cannot be stopped without loss" + (f" ({reason})" if reason else ""))
        for feature in (BackendFeature.IOTLB_MSG_V2, BackendFeature.IOTLB_BATCH):
            if feature not in self.backend.best:
                found.append(f"no working {feature.name}: {self.backend.why.get(feature.name or '', 'not advertised')}")
        if self.control_queue is not None and not (isolated := self.enables()["cvq_isolation"]).yes:
            found.append(f"a guest's control queue cannot be shadowed: {isolated.why}")
        return found

    def lies(self) -> list[str]:
        """Return the features that are usable by all appearances and failed their proof."""
        if self.backend.proved is None:
            return []
        failed = self.backend.usable & ~self.backend.proved
        return [f"{f.name}: {self.backend.why.get(f.name or '', '')}" for f in BackendFeature if f in failed]


def _bits(flags: enum.IntFlag) -> dict[str, Any]:
    return {"bits": hex(flags), "names": name_list(flags)}


def probe(path: str | os.PathLike[str], verify: bool = False, patience: float = MUST_MOVE_S) -> Probe:
    """Open ``path``, ask everything, and leave the device reset.

    ``verify`` proves each usable feature with descriptors of its own (net
    devices only); the device may take ``patience`` seconds to finish one.
    Raises :class:`~pyvhostvdpa.DeviceBusy` naming the holder,
    :class:`~pyvhostvdpa.MissingFeature` if nothing can be
    proved, and whatever the kernel refuses.
    """
    check_path(path)
    check_served(path)
    device = device_of(path)
    try:
        opened = VhostVdpa(path)
    except DeviceBusy as e:
        raise mgmt.busy(path, "vhost-vdpa probe DEV --no-open prints what is known without opening it") from e
    with opened as chardev:
        chardev.set_owner()
        try:
            return _ask(chardev, device, patience if verify else None)
        finally:
            chardev.set_status(Status(0))


def device_of(path: str | os.PathLike[str]) -> VdpaDevice:
    """Return what the management side knows of a chardev's device."""
    name = mgmt.name_of(path)
    found = next((device for device in mgmt.list_devices() if device.name == name), None)
    if found is None:
        raise MissingFeature(f"{os.fspath(path)}: sysfs has no vDPA device for it", hint="vhost-vdpa list")
    return found


def _ask(c: VhostVdpa, device: VdpaDevice, patience: float | None) -> Probe:
    status, virtio_id = c.get_status(), c.get_device_id()
    offered = Feature(c.get_features())
    advertised = c.get_backend_features()
    c.set_backend_features(advertised & ALL_BACKEND_FEATURES)
    accepted = _accept(c, offered)
    config = NetConfig.parse(c.get_config(0, c.get_config_size()), accepted)
    count = c.get_vqs_count()
    groups = _each(count, c.get_vring_group)
    desc_groups = _each(count, c.get_vring_desc_group)
    as_num = c.get_as_num()
    first, last = c.get_iova_range()
    parent = parent_of(c.path)
    usable, why = _usable(c, advertised, groups, desc_groups, as_num)
    backend = BackendColumns(advertised, usable, None, why)
    limits = Limits(first, last, as_num, parent.pinned, parent.max_iotlb_entries)
    result = Probe(
        device, parent, virtio_id, status, offered, accepted, config, count, c.get_vring_num(),
        _each(count, c.get_vring_size), c.get_group_num(), as_num, groups, desc_groups, (first, last), backend,
    )  # fmt: skip
    return result if patience is None else _verified(c, result, limits, patience)


def _accept(c: VhostVdpa, offered: Feature) -> Feature:
    """Negotiate: all that is offered, or what this package's driver needs, or nothing.

    Some parents know their queues' groups only afterwards
    (drivers/vdpa/mlx5/net/mlx5_vnet.c:ctrl_vq_idx).
    """
    for wanted in (offered, offered & ~Feature.RING_PACKED, offered & REQUIRED):
        c.set_status(Status(0))
        c.set_status(_STARTED)
        try:
            c.set_features(int(wanted))
        except KernelError:
            continue
        c.set_status(_STARTED | Status.FEATURES_OK)
        if c.get_status() & Status.FEATURES_OK:
            return wanted
    return Feature(0)


def _each(count: int, ask: Callable[[int], T]) -> list[T] | None:
    try:
        return [ask(index) for index in range(count)]
    except KernelError as e:
        if e.errno in _LACKING:
            return None
        raise


def _usable(
    c: VhostVdpa, advertised: BackendFeature, groups: list[int] | None, desc: list[int] | None, as_num: int
) -> tuple[BackendFeature, dict[str, str]]:
    """Return what of ``advertised`` the rest of the device lets one use, and why the rest is not."""
    why = {f.name or "": "not advertised" for f in BackendFeature if f not in advertised}
    if reason := _no_asids(c, as_num):
        why["IOTLB_ASID"] = reason
    if BackendFeature.DESC_ASID in advertised:
        if "IOTLB_ASID" in why:
            why["DESC_ASID"] = f"needs IOTLB_ASID: {why['IOTLB_ASID']}"
        elif desc is None or groups is None or desc == groups:
            why["DESC_ASID"] = "descriptors are in their queues' own groups"
    if BackendFeature.RESUME in advertised and BackendFeature.SUSPEND not in advertised:
        why["RESUME"] = "nothing to resume from without SUSPEND"
    unusable = sum(BackendFeature[name] for name in why)
    return advertised & ALL_BACKEND_FEATURES & ~BackendFeature(unusable), why


def _no_asids(c: VhostVdpa, as_num: int) -> str:
    """Return why separate address spaces are not usable; "" if they are. The bit is always set."""
    if as_num < 2:
        return "the device has one address space"
    try:
        c.set_group_asid(0, 1)
        c.set_group_asid(0, 0)
    except KernelError as e:
        return str(e)
    return ""


def _verified(c: VhostVdpa, found: Probe, limits: Limits, patience: float) -> Probe:
    if found.virtio_id != VIRTIO_ID_NET:
        raise MissingFeature(
            f"{c.path} is not a net device (virtio id {found.virtio_id}): there is no driver to prove things with",
            hint="vhost-vdpa probe without --verify",
        )
    # rings of the first pair only; the others' groups do not matter to a proof
    pair = slice(0, 2)
    subject = Subject(
        chardev=c,
        features=negotiate(found.features),
        usable=found.backend.usable,
        limits=limits,
        data_groups=frozenset((found.vring_groups or [])[pair]),
        desc_groups=frozenset((found.vring_desc_groups or [])[pair]),
        ring_size=min(_MAX_PROOF_RING, *ring_sizes(c, found.vqs_count)[pair]),
        patience=patience,
    )
    return _with_proofs(found, list(prove(subject)))


def _with_proofs(found: Probe, proofs: list[Proof]) -> Probe:
    proved = BackendFeature(sum(proof.feature for proof in proofs if proof.holds))
    seen = {proof.feature.name or "": proof.seen for proof in proofs}
    old = found.backend
    return replace(found, backend=BackendColumns(old.advertised, old.usable, proved, {**old.why, **seen}))


def look(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what is known of a device without opening it, schema "pyvhostvdpa/probe/probe/1" with ``opened`` false.

    For a device in use: the management side's view, the features that its
    user negotiated, and its holders.
    """
    check_path(path)
    device = device_of(path)
    parent = parent_of(path)
    wrong = unserved(device.name, parent)
    config = mgmt.net_config(device.name)
    shown = mgmt.vdpa_json("dev", "show", device.name).get("dev", {}).get(device.name, {})
    return {
        "schema": SCHEMA,
        "opened": False,
        "device": device.to_dict(),
        "parent": {
            "module": parent.module,
            "pinned": parent.pinned,
            "unknown": parent.why or None,
            "max_iotlb_entries": parent.max_iotlb_entries,
        },
        "virtio_id": device.virtio_id,
        "vqs_count": shown.get("max_vqs"),
        "vring_num": shown.get("max_vq_size"),
        "negotiated_features": config.get("negotiated_features"),
        "unserved": None if wrong is None else wrong[0],
        "config": config,
    }
