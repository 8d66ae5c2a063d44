# SPDX-License-Identifier: MIT
"""A trace as JSON lines: QEMU's trace events, under its names and with its fields.

Sources: QEMU's ``hw/virtio/trace-events`` and ``net/trace-events``, and
patches 19, 22 to 25 and 35 to 40 of "vdpa-net: improve migration downtime
through descriptor ASID and persistent IOTLB". What QEMU has no event for
keeps the kernel's name. Where QEMU prints a pointer, the device's name stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TextIO

from ..base.uapi import IotlbType, MessageFormat, Status
from .recorder import Event, Trace

SCHEMA = "pyvhostvdpa/trace/recorder/1"

SHADOW_VQS = "shadow_vqs"
"""The note that says which queues are shadowed from now on: ``queues``, their indices with spaces between."""


class _Name(NamedTuple):
    """QEMU's counterpart of an event: its name, what it calls the device, and its fields by this package's names."""

    event: str
    device: str
    fields: Mapping[str, str]


_VRING = {"index": "index", "num": "num"}
_FILE = {"index": "index", "fd": "fd"}
_MESSAGE = {"asid": "asid", "iova": "iova", "size": "size", "uaddr": "uaddr", "perm": "perm"}
_ADDRESSES = {"index": "index", "desc": "desc_user_addr", "used": "used_user_addr", "avail": "avail_user_addr"}
_CONFIG = {"off": "offset", "len": "size"}

_NAMES = {
    "IOTLB_UPDATE": _Name("vhost_vdpa_dma_map", "vdpa", _MESSAGE),
    "IOTLB_INVALIDATE": _Name("vhost_vdpa_dma_unmap", "vdpa", _MESSAGE),
    "IOTLB_BATCH_BEGIN": _Name("vhost_vdpa_map_batch_begin", "v", _MESSAGE),
    "IOTLB_BATCH_END": _Name("vhost_vdpa_dma_batch_end", "v", _MESSAGE),
    "VHOST_GET_FEATURES": _Name("vhost_vdpa_get_features", "dev", {"features": "features"}),
    "VHOST_SET_FEATURES": _Name("vhost_vdpa_set_features", "dev", {"features": "features"}),
    "VHOST_SET_OWNER": _Name("vhost_vdpa_set_owner", "dev", {}),
    "VHOST_SET_MEM_TABLE": _Name("vhost_vdpa_set_mem_table", "dev", {"nregions": "nregions"}),
    "VHOST_SET_VRING_NUM": _Name("vhost_vdpa_set_vring_num", "dev", _VRING),
    "VHOST_SET_VRING_BASE": _Name("vhost_vdpa_set_dev_vring_base", "dev", _VRING),
    "VHOST_GET_VRING_BASE": _Name("vhost_vdpa_get_vring_base", "dev", _VRING),
    "VHOST_SET_VRING_ADDR": _Name("vhost_vdpa_set_vring_addr", "dev", _ADDRESSES),
    "VHOST_SET_VRING_KICK": _Name("vhost_vdpa_set_vring_kick", "dev", _FILE),
    "VHOST_SET_VRING_CALL": _Name("vhost_vdpa_set_vring_call", "dev", _FILE),
    "VHOST_VDPA_GET_DEVICE_ID": _Name("vhost_vdpa_get_device_id", "dev", {"device_id": "device_id"}),
    "VHOST_VDPA_GET_CONFIG": _Name("vhost_vdpa_get_config", "dev", {"off": "offset", "len": "config_len"}),
    "VHOST_VDPA_SET_CONFIG": _Name("vhost_vdpa_set_config", "dev", _CONFIG),
    "VHOST_VDPA_SET_CONFIG_CALL": _Name("vhost_vdpa_set_config_call", "dev", {"fd": "fd"}),
    "VHOST_VDPA_SET_VRING_ENABLE": _Name(
        "vhost_vdpa_set_vring_enable_one", "dev", {"index": "idx", "num": "enable", "result": "r"}
    ),
    "VHOST_VDPA_GET_IOVA_RANGE": _Name("vhost_vdpa_get_iova_range", "dev", {"first": "first", "last": "last"}),
    "VHOST_VDPA_SET_GROUP_ASID": _Name("vhost_vdpa_set_address_space_id", "v", {"index": "vq_group", "num": "asid"}),
    "VHOST_VDPA_SUSPEND": _Name("vhost_vdpa_suspend", "dev", {}),
}
_NET_CLIENT = "vhost_vdpa_net_"
"""QEMU's net client calls itself ``s``, not ``dev``."""
_DEV_START = "vhost_vdpa_dev_start"
"""Follows from a call that is written as well."""


@dataclass
class _Device:
    """What has to be remembered of a device to fill in QEMU's fields."""

    fd: int = -1
    status: int = 0
    shadowed: frozenset[int] = frozenset()


def _follow(devices: dict[str, _Device], event: Event) -> _Device:
    if event.event == "open":
        devices[event.device] = _Device(int(event.fields.get("fd", -1)))
    device = devices.setdefault(event.device, _Device())
    if event.event == SHADOW_VQS:
        device.shadowed = frozenset(map(int, str(event.fields["queues"]).split()))
    return device


def records(trace: Trace) -> Iterator[dict[str, Any]]:
    """Yield the events of a trace as JSON objects, in order of completion.

    ``t_ns`` is CLOCK_MONOTONIC at the begin of the call, ``took_ns`` its
    length, ``result`` what it returned (a negative errno if it failed).
    """
    devices: dict[str, _Device] = {}
    for event in trace.events:
        for name, fields in _translate(event, _follow(devices, event)):
            yield {
                "t_ns": event.t_begin,
                "took_ns": 0 if name == _DEV_START else event.t_end - event.t_begin,
                "device": event.device,
                "phase": event.phase,
                "event": name,
                "fields": fields,
                "result": event.result,
            }


def write(trace: Trace, file: TextIO) -> None:
    """Write a line that names the schema and the clock, then a line each event."""
    head = {"schema": SCHEMA, "clock": "CLOCK_MONOTONIC", "devices": trace.devices()}
    for line in (head, *records(trace)):
        file.write(json.dumps(line) + "\n")


def _translate(event: Event, device: _Device) -> Iterator[tuple[str, dict[str, Any]]]:
    if event.event == "VHOST_VDPA_SET_STATUS":
        yield from _status(event, device)
        return
    if event.event == "VHOST_VDPA_SUSPEND":
        yield _DEV_START, {"dev": event.device, "started": False}
    if event.result is None:
        yield event.event, {_device_of_note(event.event): event.device, **event.fields}
        return
    if event.event not in _NAMES:
        yield event.event, {"dev": event.device, **event.fields}
        return
    name = _NAMES[event.event]
    known = {**event.fields, "result": event.result}
    fields = {theirs: known[ours] for ours, theirs in name.fields.items() if ours in known}
    yield name.event, {name.device: event.device, **_constants(event, device), **fields}


def _constants(event: Event, device: _Device) -> dict[str, Any]:
    """What QEMU's event has and the call has not, or not as an argument of its own."""
    if event.event.startswith("IOTLB_"):
        kind = IotlbType[event.event.removeprefix("IOTLB_")]
        return {"fd": device.fd, "msg_type": int(MessageFormat.V2), "type": int(kind)}
    if event.event == "VHOST_SET_VRING_ADDR":
        return {"flags": 0, "log_guest_addr": 0}
    if event.event == "VHOST_SET_VRING_BASE":
        return {"svq": event.fields["index"] in device.shadowed}
    return {"svq": False} if event.event == "VHOST_GET_VRING_BASE" else {}


def _device_of_note(event: str) -> str:
    return "s" if event.startswith(_NET_CLIENT) else "dev"


def _status(event: Event, device: _Device) -> Iterator[tuple[str, dict[str, Any]]]:
    """QEMU has an event for a reset, and one for bits that are added; started is what DRIVER_OK is added to."""
    status = int(event.fields["status"])
    added = status & ~device.status
    if (event.result or 0) >= 0:
        device.status = status
    if not status:
        yield "vhost_vdpa_reset_device", {"dev": event.device}
        return
    if added & Status.DRIVER_OK:
        yield _DEV_START, {"dev": event.device, "started": True}
    yield "vhost_vdpa_add_status", {"dev": event.device, "status": added}
