"""A guest as an honest source hands it over, in memory with guards around it, and the fields that can be changed."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hostile_edits import Edit

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.errors import StreamCorrupt
from pyvhostvdpa.guest.arena import GuestArena
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.nic_state import RingPlace
from pyvhostvdpa.guest.state import DeviceState
from pyvhostvdpa.guest.synthetic import SyntheticGuest
from pyvhostvdpa.guest.writer import GuestWriter
from pyvhostvdpa.memory.guest import DEFAULT_GPA, Gpa, GuestMemory
from pyvhostvdpa.net.control import ControlModel
from pyvhostvdpa.net.features import CONTROL, RING, SUPPORTED, Feature

LAYOUT = ((DEFAULT_GPA, 1 << 20), (Gpa(DEFAULT_GPA + (4 << 20)), 1 << 18))
_PIECE, _PIECES = 1 << 14, 256
"""Of the guards, in all more than the largest ring's tables take."""
_ADDRESSES = {"desc", "command", "answer", "rx_gpa", "tx_gpa", "tx_table_gpa", "writer_gpa"}
_TIMES = {"clock", "last_rx"}
_OPTIONAL = {"control", "model", "mac", "offloads", "rss", "hash_config"}
_END_BITS = 18
_WIDTHS = (64, 63, 32, 16, 8, 1)

Path_ = tuple[Any, ...]


@dataclass(frozen=True)
class Field:
    """An integer of the state, and how many bits of it can be encoded."""

    path: Path_
    kind: str
    bits: int


def get(thing: Any, path: Path_) -> Any:
    for key in path:
        thing = thing[key] if isinstance(key, int) else getattr(thing, key)
    return thing


def put(thing: Any, path: Path_, value: Any) -> Any:
    """Return ``thing`` with another value at ``path``."""
    if not path:
        return value
    key, *rest = path
    if isinstance(key, int):
        return type(thing)([*thing[:key], put(thing[key], tuple(rest), value), *thing[key + 1 :]])
    return dataclasses.replace(thing, **{key: put(getattr(thing, key), tuple(rest), value)})


def walk(thing: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Yield the path of every value in ``thing``, and of what holds them."""
    if path:
        yield path
    if dataclasses.is_dataclass(thing):
        for each in dataclasses.fields(thing):
            yield from walk(getattr(thing, each.name), (*path, each.name))
    elif isinstance(thing, tuple) and len(thing) < 8:
        for number, item in enumerate(thing):
            yield from walk(item, (*path, number))


def kind_of(whole: Any, path: Path_) -> str:
    value, name = get(whole, path), path[-1]
    if isinstance(value, bool):
        return "flag"
    if isinstance(value, int):
        if name in _ADDRESSES or (isinstance(get(whole, path[:-1]), RingPlace) and name in ("avail", "used")):
            return "address"
        return "time" if name in _TIMES or isinstance(name, int) else "ring" if name == "num" else "number"
    if isinstance(value, tuple):
        return "items"
    if isinstance(value, bytes):
        return "bytes"
    return "part" if name in _OPTIONAL else ""


def width(whole: Any, path: Path_) -> int:
    """Return how many bits of an integer field there is room for."""
    for bits in _WIDTHS:
        try:
            put(whole, path, (1 << bits) - 1).encode()
        except (struct.error, OverflowError):
            continue
        return bits
    return 0


class World:
    """A guest as an honest source would hand it over, in memory with guards around it."""

    def __init__(self, make: Callable[[GuestMemory], SyntheticGuest]) -> None:
        self.memory = GuestMemory(LAYOUT)
        for region in self.memory.regions:
            guard(region.memory.hva - _PIECE, -_PIECE)
            guard(region.memory.hva + region.size, _PIECE)
        guest = make(self.memory)
        for nic in guest.nics:
            for pair in nic.pairs:
                lib.nic_run(pair.c, 0)
        self.guest, [self.device] = guest.state()
        [self.outline] = guest.outline()
        self.shapes = guest.shapes()
        self.content = [bytes(region.memory.buffer) for region in self.memory.regions]
        guest.detach()
        self.parts = self._parts()
        self.fields = [list(self._fields(part)) for part in self.parts]
        self._ends: dict[Path_, list[int]] = {}

    def _parts(self) -> list[tuple[str, Path_]]:
        """What an edit chooses from first, so that a large part does not hide a small one."""
        paths: list[tuple[str, Path_]] = [("guest", ()), ("device", ("queues",)), ("device", ("nic", "features"))]
        paths += [("device", ("nic", "pairs", number)) for number in range(len(self.device.nic.pairs))]
        if self.device.nic.control is not None:
            paths += [("device", ("nic", "control")), ("device", ("nic", "model"))]
        return [*paths, ("device", ("nic",))]

    def _fields(self, part: tuple[str, Path_]) -> Iterator[Field]:
        name, start = part
        whole = getattr(self, name)
        for path in walk(get(whole, start), start):
            kind = kind_of(whole, path) if path else ""
            numeric = kind in ("number", "ring", "address", "time")
            if kind:
                yield Field((name, *path), kind, width(whole, path) if numeric else 0)

    def learn_ends(self) -> None:
        """Find for each address the last that is accepted in each region: a check that is one byte off fails there."""
        for field in [field for fields in self.fields for field in fields if field.kind == "address"]:
            self._ends[field.path] = [self._last(field, region.end) for region in self.memory.regions]

    def _last(self, field: Field, end: int) -> int:
        for bits in range(_END_BITS):
            if self._accepts(field, end - (1 << bits)):
                return end - (1 << bits)
        return end - (1 << _END_BITS)

    def _accepts(self, field: Field, value: int) -> bool:
        name, *path = field.path
        parts = {"guest": self.guest, "device": self.device}
        parts[name] = put(parts[name], tuple(path), value)
        self.reset()
        cohere(self.memory, parts["device"])
        try:
            SyntheticGuest.restore(self.memory, parts["guest"], [parts["device"]]).detach()
        except StreamCorrupt:
            return False
        return True

    def ring_of(self, what: Edit) -> int | None:
        """Return the data queue that an edit of its part is about; None: the control queue."""
        _, path = self.parts[what.part % len(self.parts)]
        if path[:2] == ("nic", "pairs"):
            return 2 * path[2] + what.field % 2
        number = what.field % (2 * len(self.device.nic.pairs) + 1)
        return None if path == ("nic", "control") or number == 2 * len(self.device.nic.pairs) else number

    def end_for(self, field: Field, region: int) -> int:
        """Return the last address in a region that a field may have, the rest of the state being honest."""
        return self._ends[field.path][region]

    def reset(self) -> None:
        for region, content in zip(self.memory.regions, self.content, strict=True):
            region.memory.buffer[:] = content


def guard(begin: int, step: int) -> None:
    """Let nothing lie around memory, from ``begin`` in steps: a driver that leaves guest memory dies.

    What lies there already stays, so that is to come first in a process.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    for at in range(begin, begin + step * _PIECES, step):
        # PROT_NONE; MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE
        libc.mmap(ctypes.c_void_p(at), ctypes.c_size_t(_PIECE), 0, 0x100022, -1, ctypes.c_long(0))


def plain(memory: GuestMemory) -> SyntheticGuest:
    guest = SyntheticGuest(memory)
    guest.add(GuestNic(memory, NicOptions(ring_size=16, features=SUPPORTED)), None)
    return guest


def full(memory: GuestMemory) -> SyntheticGuest:
    """Two pairs, a control queue, indirect tables, indices for notifications, a CPU that writes."""
    features = SUPPORTED | CONTROL | RING | Feature.GUEST_CSUM
    arena = GuestArena(memory, DEFAULT_GPA, 1 << 20)
    guest = SyntheticGuest(memory)
    nic = GuestNic(memory, NicOptions(pairs=2, ring_size=16, features=features, control_index=4), arena)
    rss = struct.pack("<IHHHHHB", 0x3F, 1, 0, 0, 2, 2, 40) + bytes(40)
    model = ControlModel(features, mac=b"\2abcde", multicast=[b"\3mmmmm"], vlans={1, 7}, pairs=2, rss=rss)
    model.offloads = int(Feature.GUEST_CSUM)
    guest.add(nic, model)
    guest.writer = GuestWriter(memory, LAYOUT[1][0], 64, 100, 70)
    return guest


def cohere(memory: GuestMemory, device: DeviceState) -> None:
    """Have memory say of each ring what the state says, as a source with a plan would."""
    places = [place for pair in device.nic.pairs for place in (pair.rx, pair.tx)]
    for queue, place in zip(device.queues, places, strict=False):
        set_word(memory, place.avail + 2, queue.avail)
        set_word(memory, place.used + 2, queue.used)
        for number, head in enumerate(queue.heads[: place.num]):
            set_word(memory, place.avail + 4 + 2 * ((queue.used + number) % max(place.num, 1)), head)
    control = device.nic.control
    if control is not None:
        set_word(memory, control.ring.avail + 2, control.avail_idx)
        set_word(memory, control.ring.used + 2, control.used_idx)


def set_word(memory: GuestMemory, gpa: int, value: int) -> None:
    try:
        ffi.memmove(ffi.cast("char *", memory.hva(gpa, 2)), value.to_bytes(2, "little"), 2)
    except (ValueError, OverflowError):
        return
