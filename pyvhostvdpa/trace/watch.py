# SPDX-License-Identifier: MIT
"""Records of the kernel's probes, put together to events of a trace: every call on a device, of any process.

Begin and end of a call are matched by thread: a thread is in one call at a time. An event is the same as if the
process had recorded itself, by the names and fields of :mod:`pyvhostvdpa.chardev.door`; what differs is ``open``, which
names the process, and the note :data:`CALLER`, which says that another process makes the calls from now on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from ctypes import sizeof
from dataclasses import dataclass, field

from ..base.uapi import (
    IOCTLS,
    Argument,
    Ioctl,
    IotlbType,
    IovaRange,
    VdpaConfig,
    VhostMemory,
    VringAddr,
    VringFile,
    VringState,
)
from .probes import RDEV_WIDTH
from .recorder import Event, Fields
from .ringbuffer import Record, Value

CALLER = "caller"
"""A note: the calls that follow are made by process ``pid``, which did not open the device."""
WRITE = "write"
"""A write() that the kernel refused before it was taken for a message; ``size`` is its length."""

_BY_REQUEST = {row.request: row for row in IOCTLS.values()}
_WORDS = struct.Struct("=4Q")
_NUMBERS = {
    "VHOST_GET_FEATURES": "features",
    "VHOST_SET_FEATURES": "features",
    "VHOST_GET_BACKEND_FEATURES": "backend_features",
    "VHOST_SET_BACKEND_FEATURES": "backend_features",
    "VHOST_VDPA_GET_DEVICE_ID": "device_id",
    "VHOST_VDPA_GET_STATUS": "status",
    "VHOST_VDPA_SET_STATUS": "status",
    "VHOST_VDPA_GET_VRING_NUM": "vring_num",
    "VHOST_VDPA_SET_CONFIG_CALL": "fd",
    "VHOST_VDPA_GET_CONFIG_SIZE": "config_size",
    "VHOST_VDPA_GET_AS_NUM": "as_num",
    "VHOST_VDPA_GET_VQS_COUNT": "vqs_count",
    "VHOST_VDPA_GET_GROUP_NUM": "group_num",
    "VHOST_SET_FORK_FROM_OWNER": "fork_from_owner",
    "VHOST_GET_FORK_FROM_OWNER": "fork_from_owner",
}
"""What a request's only number is called, as the door calls it."""


def _state(row: Ioctl, argument: bytes, failed: bool) -> Fields:
    state = VringState.from_buffer_copy(argument)
    reads = row.direction == "RW" or row.method.startswith("get")
    return {"index": int(state.index)} if failed and reads else {"index": int(state.index), "num": int(state.num)}


def _file(row: Ioctl, argument: bytes, failed: bool) -> Fields:
    file = VringFile.from_buffer_copy(argument)
    return {"index": int(file.index), "fd": int(file.fd)}


def _addresses(row: Ioctl, argument: bytes, failed: bool) -> Fields:
    # its last word, the address of a log, is not recorded and means nothing here
    ring = VringAddr.from_buffer_copy(argument.ljust(sizeof(VringAddr), b"\0"))
    return {
        "index": int(ring.index),
        "desc": int(ring.desc_user_addr),
        "avail": int(ring.avail_user_addr),
        "used": int(ring.used_user_addr),
    }


def _config(row: Ioctl, argument: bytes, failed: bool) -> Fields:
    config = VdpaConfig.from_buffer_copy(argument)
    return {"off": int(config.off), "len": int(config.len)}


def _range(row: Ioctl, argument: bytes, failed: bool) -> Fields:
    both = IovaRange.from_buffer_copy(argument)
    return {} if failed else {"first": int(both.first), "last": int(both.last)}


def _table(row: Ioctl, argument: bytes, failed: bool) -> Fields:
    return {"nregions": int(VhostMemory.from_buffer_copy(argument).nregions)}


_DECODERS: dict[Argument, Callable[[Ioctl, bytes, bool], Fields]] = {
    VringState: _state,
    VringFile: _file,
    VringAddr: _addresses,
    VdpaConfig: _config,
    IovaRange: _range,
    VhostMemory: _table,
}


def decode(row: Ioctl, argument: bytes | None, result: int, before: bool = False) -> Fields:
    """Return a request's fields from its argument as it is after the call; None if that was not recorded.

    What a failed request would have read is left out, and what any would if the argument is that of ``before``.
    """
    if before:
        result = min(result, -1)
    if argument is None or row.argument is None:
        return {}
    if row.name in _NUMBERS:
        if result < 0 and row.direction == "R":
            return {}
        scalar = row.argument.from_buffer_copy(argument)
        return {_NUMBERS[row.name]: int(getattr(scalar, "value"))}  # noqa: B009
    decoder = _DECODERS.get(row.argument)
    return decoder(row, argument, result < 0) if decoder else {"argument": argument[: row.size].hex()}


@dataclass(slots=True)
class _Call:
    """A call that has begun."""

    kind: str
    t: int
    device: str
    values: dict[str, Value]
    message: dict[str, Value] = field(default_factory=dict)


@dataclass(slots=True)
class Surroundings:
    """What has to be asked of the system while it is recorded."""

    process_of: Callable[[int], int]
    """Of a thread."""
    device_of: Callable[[int, int], str]
    """Of a process and the kernel's address of an open file, where the kernel records no more; "" if unknown."""
    wanted: Callable[[str, int], bool] = lambda device, pid: True
    """Whether to record the calls of a process on a device."""
    forget: Callable[[int], None] = lambda file: None
    """A file was closed: the kernel may give its address to another one."""


class Assembler:
    """Records in order of time to events in order of completion."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._ask = surroundings
        self._calls: dict[int, _Call] = {}
        self._processes: dict[int, int] = {}
        self._callers: dict[str, int] = {}
        self._threads: set[int] = set()
        self.unmatched = 0
        """Calls of which begin or end is missing, since its record did not fit."""
        self.begun_before = 0
        """Calls that were under way when the recording began."""

    def events(self, records: Iterable[Record]) -> Iterator[Event]:
        """Yield what the records complete."""
        for record in records:
            if record.name == "message":
                call = self._calls.get(record.thread)
                if call is not None:
                    call.message = record.values
            elif record.name.endswith("_end"):
                yield from self._ended(record, record.name.removesuffix("_end"))
            else:
                self._begun(record)

    def unfinished(self) -> list[tuple[int, str, str]]:
        """Return calls that have begun and not ended: thread, device, name."""
        return [(thread, call.device, self._name(call)) for thread, call in self._calls.items()]

    def _begun(self, record: Record) -> None:
        if self._calls.pop(record.thread, None) is not None:
            self.unmatched += 1
        self._threads.add(record.thread)
        device = self._device(record)
        self._calls[record.thread] = _Call(record.name, record.t, device, record.values)
        if record.name == "open":
            # a thread's number may be another process's by now
            self._processes.pop(record.thread, None)

    def _device(self, record: Record) -> str:
        values = record.values
        if "rdev" in values:
            return f"/dev/vhost-vdpa-{int(values['rdev']) & ((1 << RDEV_WIDTH) - 1)}"
        if values.get("name"):
            return f"/dev/{_printable(values['name'])}"
        file = int(values.get("file", 0))
        return self._ask.device_of(self._process(record.thread), file) or f"file {file:#x}"

    def _process(self, thread: int) -> int:
        if thread not in self._processes:
            self._processes[thread] = self._ask.process_of(thread)
        return self._processes[thread]

    def _ended(self, record: Record, kind: str) -> Iterator[Event]:
        call = self._calls.pop(record.thread, None)
        if call is None and record.thread not in self._threads:
            self._threads.add(record.thread)
            self.begun_before += 1
            return
        if call is None or call.kind != kind:
            self.unmatched += 1
            return
        pid = self._process(record.thread)
        device, result = call.device, int(record.values["ret"])
        if "file" in call.values and (kind == "release" or (kind == "open" and result < 0)):
            self._ask.forget(int(call.values["file"]))
        if not self._ask.wanted(device, pid):
            return
        if kind == "write" and result >= 0 and not call.message:
            # the kernel took a message of which the record is missing
            self.unmatched += 1
        name, fields = self._described(call, record, result, pid)
        if kind == "open" and result >= 0:
            self._callers[device] = pid
        elif kind != "open" and self._callers.get(device) != pid:
            self._callers[device] = pid
            yield Event(call.t, call.t, device, "", CALLER, {"pid": pid}, None)
        yield Event(call.t, record.t, device, "", name, fields, result)

    def _described(self, call: _Call, end: Record, result: int, pid: int) -> tuple[str, Fields]:
        if call.kind == "open":
            return "open", {"pid": pid, "comm": _printable(call.values.get("comm", ""))}
        if call.kind == "release":
            return "close", {}
        if call.kind == "mmap":
            return "mmap", {"index": int(call.values.get("index", 0))}
        if call.kind == "write":
            return self._message(call)
        row = _BY_REQUEST.get(int(call.values["cmd"]))
        if row is None:
            return self._name(call), {}
        after = _words(end)
        return row.name, decode(row, after or _words(call), result, before=after is None)

    def _message(self, call: _Call) -> tuple[str, Fields]:
        values = call.message
        if not values:
            return WRITE, {"size": int(call.values.get("count", 0))}
        kind = int(values["type"])
        fields: dict[str, int | str] = {"asid": int(values["asid"])}
        if kind not in (IotlbType.BATCH_BEGIN, IotlbType.BATCH_END):
            fields |= {"iova": int(values["iova"]), "size": int(values["size"])}
        if kind == IotlbType.UPDATE:
            fields |= {"uaddr": int(values["uaddr"]), "perm": int(values["perm"])}
        known = kind in IotlbType._value2member_map_
        return f"IOTLB_{IotlbType(kind).name if known else kind}", fields

    def _name(self, call: _Call) -> str:
        if call.kind != "ioctl":
            return call.kind
        cmd = int(call.values["cmd"])
        return _BY_REQUEST[cmd].name if cmd in _BY_REQUEST else f"ioctl {cmd:#x}"


def _words(recorded: _Call | Record) -> bytes | None:
    """Return the 32 bytes at a request's argument, where they were recorded: at its end if the kernel can do that."""
    values = recorded.values
    if "a3" not in values:
        return None
    return _WORDS.pack(*(int(values[f"a{place}"]) for place in range(4)))


def _printable(name: Value) -> str:
    """Return a name that some process chose, with nothing in it that would move a terminal's cursor."""
    return "".join(each if each.isprintable() else "?" for each in str(name))
