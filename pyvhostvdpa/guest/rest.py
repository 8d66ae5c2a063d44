# SPDX-License-Identifier: MIT
"""What of a NIC's state changes while its guest runs, so that it can be sent only when the guest is paused.

Everything else is in the outline, which goes while the guest runs. C writes
the rest, checks it and takes it over, all pairs of a NIC in one call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .._cdefs import ffi, lib
from ..base.errors import MissingFeature
from ..memory.guest import PAGE_SIZE, GuestMemory
from ..net.control import ControlModel
from .codec import Reader, Writer
from .control_driver import check_indices
from .nic import GuestNic, NicPair
from .nic_state import ControlDriverState, check_model
from .shape import BadState
from .state import VERSION, GuestState, get_model, put_model
from .writer import GuestWriter

REST = 4
"""Kind of the section."""
_MAX_BYTES = 1 << 20
_AROUND = 64
"""Bytes of a section beside its pairs."""

_QUEUE = (
    (lib.REST_FAR_APART, "its used and avail index differ by more than the ring"),
    (lib.REST_INDICES, "its used and avail index in memory are not those that the source left"),
    (lib.REST_HEADS, "its heads in memory are not those that the source left"),
    (lib.REST_DRIVER, "its driver's indices are not those of its ring"),
)
_PAIR = {
    lib.REST_SHORT: "it ends too early or too late",
    lib.REST_SENDING: "sending is neither 0 nor 1",
    lib.REST_RECEIVED: "more frames were received than sent",
    lib.REST_COUNTERS: "a counter has a value that cannot have been counted",
    lib.REST_TIME: "last_rx is not a time",
    lib.REST_FREE: "tx_free: its free TX slots are not slots of its ring",
    lib.REST_SLOTS: "tx_free: there are more TX slots than its ring has",
    lib.REST_SEEN: "seen: its runs are not those of a bitmap of 65,536 bits",
    lib.REST_GAPS: "gaps: wrong number of entries, or an invalid one",
}


def _fault(code: int, pair: int) -> str:
    """Return what a REST_… code of the C code says of a pair."""
    for first, why in _QUEUE:
        if code in (first, first + 1):
            return f"virtqueue {2 * pair + code - first}: {why}"
    return f"pair {pair}: {_PAIR[code]}"


class DriverRest(NamedTuple):
    """The indices of a control queue's driver."""

    avail_idx: int
    used_idx: int
    open: int


@dataclass(frozen=True, slots=True)
class DeviceRest:
    """The rest of a device's state: its pairs' as bytes that C checks; ``model`` if it changed since the outline."""

    pairs: bytes
    control: DriverRest | None
    model: ControlModel | None

    def encode(self) -> bytes:
        """Return the section."""
        w = Writer()
        w.blob(self.pairs)
        w.put("B", self.control is not None)
        if self.control is not None:
            w.put("HHH", self.control.avail_idx, self.control.used_idx, self.control.open)
        w.put("B", self.model is not None)
        if self.model is not None:
            put_model(w, self.model)
        return w.section(REST, VERSION)

    @classmethod
    def decode(cls, data: bytes) -> DeviceRest:
        """Return the rest in a section; what ``pairs`` holds is not looked at."""
        r = Reader(data, REST, VERSION, "rest of a device's state")
        rest = cls(
            pairs=r.blob("length of the pairs", _MAX_BYTES),
            control=DriverRest(*r.get("HHH")) if r.flag("control driver") else None,
            model=get_model(r) if r.flag("control model") else None,
        )
        r.end()
        return rest


class NicRest:
    """Writes and loads the rest of one NIC's state; what that needs is allocated here.

    ``model`` is the state set through the NIC's control queue, None without one.
    """

    def __init__(self, nic: GuestNic, model: ControlModel | None) -> None:
        self._nic, self._model = nic, model
        self.known = copy.deepcopy(model)
        """The model as it is now, for the outline: what is the same in the end is not sent again."""
        pairs: Sequence[NicPair] = nic.pairs
        self._pairs: Any = ffi.new("struct nic_pair *[]", [pair.c for pair in pairs])
        self._count = len(pairs)
        self._room = sum(lib.nic_rest_room(pair.rx.num, pair.tx.num) for pair in pairs)
        self._buffer: Any = ffi.new("uint8_t[]", self._room)
        self._wrong: Any = ffi.new("uint32_t *")
        self._checked: ControlDriverState | None = None

    @property
    def changed(self) -> bool:
        """Whether the control queue has set something since the outline."""
        return self._model != self.known

    def fill(self, c: Any) -> None:
        """Put the NIC into a ``struct nic_rest``."""
        c.pairs, c.count = self._pairs, self._count
        c.control = ffi.NULL if self._nic.control is None else self._nic.control.c

    @property
    def room(self) -> int:
        """Bytes that its section takes at most."""
        return int(self._room) + _AROUND

    def get(self) -> DeviceRest:
        """Return the rest; the guest is paused, and its device has stopped.

        Raises :class:`~pyvhostvdpa.MissingFeature` if a ring's indices make no sense.
        """
        length: int = lib.nic_put_rest(self._pairs, self._count, self._buffer, self._room, self._wrong)
        if length < 0:
            raise MissingFeature(
                f"pair {self._wrong[0]}: used and avail index of one of its virtqueues differ by more than the ring"
            )
        control = self._nic.control
        return DeviceRest(
            bytes(ffi.buffer(self._buffer, length)),
            None if control is None else DriverRest(*control.indices()),
            self._model if self.changed else None,
        )

    def check(self, memory: GuestMemory, rest: DeviceRest) -> None:
        """Raise BadState unless the NIC can resume from this; its memory must be there."""
        pairs = rest.pairs
        code: int = lib.nic_check_rest(self._pairs, self._count, pairs, len(pairs), self._wrong)
        if code:
            raise BadState(_fault(code, int(self._wrong[0])))
        if (rest.control is None) != (self._nic.control is None):
            raise BadState("control queue: in the outline or in the rest, and not in both")
        self._checked = self._driver(rest)
        if self._checked is not None:
            check_indices(memory, self._checked)
        if rest.model is not None:
            if self._model is None:
                raise BadState("control model: the outline has none")
            check_model(rest.model, self._nic.features, self._count)

    def apply(self, rest: DeviceRest) -> None:
        """Resume from a state that :meth:`check` accepted."""
        lib.nic_apply_rest(self._pairs, self._count, rest.pairs, len(rest.pairs))
        if self._checked is not None and self._nic.control is not None:
            self._nic.control.load(self._checked)
        if rest.model is not None:
            # the same object: a device that stands by knows it
            vars(self._model).update(vars(rest.model))

    def _driver(self, rest: DeviceRest) -> ControlDriverState | None:
        if rest.control is None or self._nic.control is None:
            return None
        known = rest.control
        return replace(self._nic.control.state(), avail_idx=known.avail_idx, used_idx=known.used_idx, open=known.open)


class RestSections:
    """What a guest has beside its outline, for C; see :class:`~pyvhostvdpa.guest.protocol.Sections`.

    Of a guest that arrives ``used`` is the memory that its NICs use, (GPA, bytes), and ``load_own`` takes its own
    section, decoded.
    """

    def __init__(
        self,
        memory: GuestMemory,
        rests: Sequence[NicRest],
        writer: GuestWriter | None,
        used: Sequence[tuple[int, int]],
        load_own: Callable[[GuestState], None],
    ) -> None:
        # C gets to them by pointers, which keep nothing
        self._kept = memory, tuple(rests), writer
        self._nics: Any = ffi.new("struct nic_rest[]", len(rests))
        for c, rest in zip(self._nics, rests, strict=True):
            rest.fill(c)
        self._used: Any = ffi.new("struct page_run[]", list(used))
        self._guest: Any = ffi.new("struct guest_rest *", {"nics": self._nics, "count": len(rests)})
        g = self._guest
        if writer is not None:
            g.writer, g.writer_gpa = writer.c, writer.gpa
        g.memory, g.used, g.used_count, g.page_size = memory.c_map, self._used, len(used), PAGE_SIZE
        self._load_own = load_own
        self.room = _AROUND + sum(rest.room for rest in rests)
        self.c: Any = ffi.new("struct guest_sections *", {"of": g, "count": len(rests)})
        self.c.put, self.c.fits, self.c.take = (
            ffi.addressof(lib, name) for name in ("guest_put", "guest_fits", "guest_take")
        )

    def prepare(self, own: Callable[[], bytes]) -> None:
        """Make the guest's CPU, if it has one; see :meth:`~pyvhostvdpa.guest.protocol.Sections.prepare`."""
        if self._guest.writer_comes:
            self._load_own(GuestState.decode(own()))
