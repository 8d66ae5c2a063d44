# SPDX-License-Identifier: MIT
"""What moves of the synthetic guest beside memory, and its format: state of the guest, then of each device.

``vhost-vdpa help migration`` documents every field. A section is a head of 8
bytes (kind, version, length of the rest) and fields without padding. A
decoder takes nothing for granted: it raises
:class:`~pyvhostvdpa.StreamCorrupt` and has changed nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..net.control import MAX_VLAN, RSS_KEY_MAX, ControlModel, Rx
from ..net.features import Feature
from ..virtqueue.layout import MAX_NUM
from .codec import Reader, Writer
from .nic_state import SEEN_BYTES, ControlDriverState, NicState, PairState, RingPlace
from .shape import MAX_PAIRS, BadState, DeviceShape

VERSION = 1
"""Of every section. One that is not known is refused: there is no guessing at a guest's state."""
GUEST, DEVICE = 2, 3
"""Kinds of sections."""

_MAX_GAPS = 64
_MAX_TABLE = 64
_MAX_RSS = 8 + 2 * 128 * 256 + RSS_KEY_MAX


@dataclass(frozen=True, slots=True)
class GuestState:
    """The guest apart from its devices. ``clock`` is CLOCK_MONOTONIC, ns, as it stopped; the writer's fields
    are :class:`pyvhostvdpa.guest.writer.GuestWriter`'s, 0 pages without one.
    """

    clock: int
    writer_gpa: int = 0
    writer_pages: int = 0
    writer_rate: int = 0
    writer_written: int = 0

    def encode(self) -> bytes:
        """Return the section."""
        w = Writer()
        w.put("qQQQQ", self.clock, self.writer_gpa, self.writer_pages, self.writer_rate, self.writer_written)
        return w.section(GUEST, VERSION)

    @classmethod
    def decode(cls, data: bytes) -> GuestState:
        """Return the state in a section."""
        r = Reader(data, GUEST, VERSION, "state of the guest")
        state = cls(*r.get("qQQQQ"))
        r.end()
        return state


@dataclass(frozen=True, slots=True)
class QueueState:
    """A data queue as its device left it: the indices of its rings, and the heads between them, oldest first.

    ``heads`` are the descriptors in flight, which the device had, and then
    those it had not yet taken. All are in guest memory too: a destination
    compares before it starts.
    """

    index: int
    used: int
    avail: int
    heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device and the NIC driver on it."""

    queues: tuple[QueueState, ...]
    nic: NicState

    @property
    def shape(self) -> DeviceShape:
        """What a device must be like to resume from this state; BadState without a pair."""
        rings = [place.num for pair in self.nic.pairs for place in (pair.rx, pair.tx)]
        if not rings:
            raise BadState("pairs: a NIC has at least one")
        control = self.nic.control
        return DeviceShape(self.nic.features, len(self.nic.pairs), max(rings), control.ring.index if control else None)

    def encode(self) -> bytes:
        """Return the section."""
        w = Writer()
        w.each(self.queues, lambda q: _put_queue(w, q))
        w.put("Q", self.nic.features)
        w.each(self.nic.pairs, lambda pair: _put_pair(w, pair))
        w.put("B", self.nic.control is not None)
        if self.nic.control is not None:
            _put_driver(w, self.nic.control)
        w.put("B", self.nic.model is not None)
        if self.nic.model is not None:
            put_model(w, self.nic.model)
        return w.section(DEVICE, VERSION)

    @classmethod
    def decode(cls, data: bytes) -> DeviceState:
        """Return the state in a section."""
        r = Reader(data, DEVICE, VERSION, "state of a device")
        queues = r.each("queues", 2 * MAX_PAIRS, lambda: _get_queue(r))
        nic = NicState(
            features=r.get("Q"),
            pairs=r.each("pairs", MAX_PAIRS, lambda: _get_pair(r)),
            control=_get_driver(r) if r.flag("control driver") else None,
            model=get_model(r) if r.flag("control model") else None,
        )
        if not nic.pairs:
            raise r.bad("pairs: a NIC has at least one")
        r.end()
        return cls(queues, nic)


def _put_queue(w: Writer, q: QueueState) -> None:
    w.put("HHH", q.index, q.used, q.avail)
    w.numbers("H", q.heads)


def _get_queue(r: Reader) -> QueueState:
    index, used, avail = r.get("HHH")
    heads = r.numbers("heads", MAX_NUM, "H")
    if (avail - used) & 0xFFFF != len(heads):
        raise r.bad(f"virtqueue {index}: {len(heads)} heads between used {used} and avail {avail}")
    return QueueState(index, used, avail, heads)


def _put_place(w: Writer, p: RingPlace) -> None:
    w.put("HHQQQ", p.index, p.num, p.desc, p.avail, p.used)


def _get_place(r: Reader) -> RingPlace:
    return RingPlace(*r.get("HHQQQ"))


def _put_pair(w: Writer, p: PairState) -> None:
    _put_place(w, p.rx)
    _put_place(w, p.tx)
    w.put("QQQHIII6s6sB", p.rx_gpa, p.tx_gpa, p.tx_table_gpa, p.tx_descs, p.frame_size, p.window, p.flow, p.dst,
          p.src, p.sending)  # fmt: skip
    w.put("HHHH", p.rx_avail, p.rx_used, p.tx_avail, p.tx_used)
    w.numbers("H", p.tx_free)
    w.put("QQQQQQQq", p.sent, p.received, p.duplicated, p.corrupted, p.reordered, p.highest, p.ring_errors, p.last_rx)
    w.put(f"{SEEN_BYTES}s", p.seen)
    w.numbers("q", [at for gap in p.gaps for at in gap], each=2)


def _get_pair(r: Reader) -> PairState:
    rx, tx = _get_place(r), _get_place(r)
    rx_gpa, tx_gpa, table, descs, frame, window, flow, dst, src = r.get("QQQHIII6s6s")
    sending = r.flag("sending")
    rx_avail, rx_used, tx_avail, tx_used = r.get("HHHH")
    free = r.numbers("free slots", MAX_NUM, "H")
    sent, received, duplicated, corrupted, reordered, highest, errors, last_rx = r.get("QQQQQQQq")
    return PairState(
        rx=rx, tx=tx, rx_gpa=rx_gpa, tx_gpa=tx_gpa, tx_table_gpa=table, tx_descs=descs, frame_size=frame,
        window=window, flow=flow, dst=dst, src=src, sending=sending,
        rx_avail=rx_avail, rx_used=rx_used, tx_avail=tx_avail, tx_used=tx_used, tx_free=free,
        sent=sent, received=received, duplicated=duplicated, corrupted=corrupted, reordered=reordered,
        highest=highest, ring_errors=errors, last_rx=last_rx,
        seen=r.get(f"{SEEN_BYTES}s"), gaps=_in_pairs(r.numbers("gaps", _MAX_GAPS, "q", each=2)),
    )  # fmt: skip


def _in_pairs(numbers: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _put_driver(w: Writer, c: ControlDriverState) -> None:
    _put_place(w, c.ring)
    w.put("QQHHH", c.command, c.answer, c.avail_idx, c.used_idx, c.open)


def _get_driver(r: Reader) -> ControlDriverState:
    return ControlDriverState(_get_place(r), *r.get("QQHHH"))


def put_model(w: Writer, m: ControlModel) -> None:
    """Add what a control queue has set."""
    w.put("Q", int(m.features))
    w.optional(m.mac)
    for table in (m.unicast, m.multicast):
        w.each(table, lambda mac: w.put("6s", mac))
    w.put("BB", m.unicast_overflow, m.multicast_overflow)
    w.put("B", sum(1 << mode for mode in Rx if m.rx[mode]))
    w.each(sorted(m.vlans), lambda vlan: w.put("H", vlan))
    w.put("H", m.pairs)
    w.optional(None if m.offloads is None else m.offloads.to_bytes(8, "little"))
    w.optional(m.rss)
    w.optional(m.hash_config)
    w.put("B", m.announce)


def get_model(r: Reader) -> ControlModel:
    """Take what :func:`put_model` added; StreamCorrupt for what cannot have been set."""
    features, mac = Feature(r.get("Q")), r.optional("MAC", 6)
    if mac is not None and len(mac) != 6:
        raise r.bad(f"a MAC of {len(mac)} bytes")
    unicast = list(r.each("unicast addresses", _MAX_TABLE, lambda: bytes(r.get("6s"))))
    multicast = list(r.each("multicast addresses", _MAX_TABLE, lambda: bytes(r.get("6s"))))
    overflows = r.flag("unicast overflow"), r.flag("multicast overflow")
    modes = r.number("B", "receive modes", (1 << len(Rx)) - 1)
    vlans = r.each("VLANs", MAX_VLAN, lambda: r.number("H", "VLAN", MAX_VLAN - 1))
    if any(a >= b for a, b in pairwise(vlans)):
        raise r.bad("VLANs that are not in order")
    pairs = r.number("H", "pairs in use", MAX_PAIRS)
    offloads = r.optional("offloads", 8)
    if offloads is not None and len(offloads) != 8:
        raise r.bad(f"offloads of {len(offloads)} bytes")
    return ControlModel(
        features=features,
        mac=mac,
        unicast=unicast,
        multicast=multicast,
        unicast_overflow=overflows[0],
        multicast_overflow=overflows[1],
        rx={mode: bool(modes >> mode & 1) for mode in Rx},
        vlans=set(vlans),
        pairs=pairs,
        offloads=None if offloads is None else int.from_bytes(offloads, "little"),
        rss=r.optional("RSS", _MAX_RSS),
        hash_config=r.optional("hash configuration", _MAX_RSS),
        announce=r.flag("announce"),
    )
