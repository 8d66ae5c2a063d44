# SPDX-License-Identifier: MIT
"""What moves beside memory, and its format: shape of the guest, then state of the guest and of each device.

``vhost-vdpa help migration`` documents every field. A section is a head of 8
bytes (kind, version, length of the rest) and fields without padding. A
decoder takes nothing for granted: it raises
:class:`~pyvhostvdpa.StreamCorrupt` and has changed nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise

from ..memory.guest import PAGE_SIZE
from ..net.config import MAX_CONFIG
from ..net.control import MAX_VLAN, RSS_KEY_MAX, ControlModel, Rx
from ..net.features import Feature
from ..virtqueue.layout import MAX_NUM
from .codec import Reader, Writer
from .nic_state import SEEN_BYTES, BadState, ControlDriverState, NicState, PairState, RingPlace

VERSION = 1
"""Of every section. One that is not known is refused: there is no guessing at a guest's state."""
SHAPE_VERSION = 2
"""Of the SHAPE section: 2 has each device's configuration space at its end. Version 1 is read as well, without it."""
SHAPE, GUEST, DEVICE = 1, 2, 3
"""Kinds of sections."""

ID_BYTES = 16
MAX_DEVICES = 64
MAX_PAIRS = 128
_MAX_REGIONS = 512
_MAX_TEXT = 256
_MAX_GAPS = 64
_MAX_TABLE = 64
_MAX_RSS = 8 + 2 * 128 * 256 + RSS_KEY_MAX
_NONE = 0xFFFF


@dataclass(frozen=True, slots=True)
class DeviceShape:
    """What a destination's device must be like: features, pairs, ring size; ``control_index`` None without one.

    ``config`` is the configuration space as the guest's driver knows it, None if that is unknown. It belongs to the
    device below and not to the guest's state, so two shapes are equal without it.
    """

    features: int
    pairs: int
    ring_size: int
    control_index: int | None
    config: bytes | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class GuestShape:
    """What a guest needs of a destination, told before anything moves.

    ``id`` names this migration on both sides, ``source`` is for people:
    host and devices. ``memory`` is (GPA, bytes) of each region.
    """

    id: bytes
    source: str
    memory: tuple[tuple[int, int], ...]
    devices: tuple[DeviceShape, ...]
    hashed: bool

    def encode(self) -> bytes:
        """Return the section."""
        w = Writer()
        w.put(f"{ID_BYTES}s", self.id)
        w.text(self.source)
        w.put("I", PAGE_SIZE)
        w.each(self.memory, lambda region: w.put("QQ", *region))
        w.each(self.devices, lambda d: _put_shape(w, d))
        w.put("B", self.hashed)
        for device in self.devices:
            _put_optional(w, device.config)
        return w.section(SHAPE, SHAPE_VERSION)

    @classmethod
    def decode(cls, data: bytes) -> GuestShape:
        """Return the shape in a section."""
        r = Reader(data, SHAPE, SHAPE_VERSION, "shape of the guest", oldest=1)
        number, source = r.get(f"{ID_BYTES}s"), r.text("source", _MAX_TEXT)
        page = r.get("I")
        if page != PAGE_SIZE:
            raise r.bad(f"pages of {page} bytes, this side has {PAGE_SIZE}")
        shape = cls(
            id=number,
            source=source,
            memory=r.each("memory regions", _MAX_REGIONS, lambda: r.get("QQ")),
            devices=r.each("devices", MAX_DEVICES, lambda: _get_shape(r)),
            hashed=r.flag("hashed"),
        )
        _check_memory(r, shape.memory)
        if not shape.devices:
            raise r.bad("no device")
        if r.version > 1:
            devices = [replace(d, config=_get_optional(r, "configuration space", MAX_CONFIG)) for d in shape.devices]
            shape = replace(shape, devices=tuple(devices))
        r.end()
        return shape


def _put_shape(w: Writer, d: DeviceShape) -> None:
    w.put("QIIH", d.features, d.pairs, d.ring_size, _NONE if d.control_index is None else d.control_index)


def _get_shape(r: Reader) -> DeviceShape:
    features, pairs, ring_size, control = r.get("QIIH")
    if not 1 <= pairs <= MAX_PAIRS or not 1 <= ring_size <= MAX_NUM or ring_size & (ring_size - 1):
        raise r.bad(f"a device with {pairs} pairs of rings of {ring_size}")
    return DeviceShape(features, pairs, ring_size, None if control == _NONE else control)


def _check_memory(r: Reader, regions: tuple[tuple[int, int], ...]) -> None:
    end = 0
    for gpa, size in regions:
        if gpa % PAGE_SIZE or size % PAGE_SIZE or not size or gpa < end or gpa + size > 1 << 56:
            raise r.bad(f"memory region {gpa:#x}+{size:#x}")
        end = gpa + size
    if not regions:
        raise r.bad("no memory")


@dataclass(frozen=True, slots=True)
class GuestState:
    """The guest apart from its devices. ``clock`` is CLOCK_MONOTONIC, ns, as it stopped; the writer's fields
    are :class:`pyvhostvdpa.guest.synthetic.GuestWriter`'s, 0 pages without one.
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
    those it had not taken. All are in guest memory too: a destination
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
        """What a device must be like to go on from this state; BadState without a pair."""
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
            _put_model(w, self.nic.model)
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
            model=_get_model(r) if r.flag("control model") else None,
        )
        if not nic.pairs:
            raise r.bad("pairs: a NIC has at least one")
        r.end()
        return cls(queues, nic)


def check_shapes(found: Sequence[DeviceShape], promised: Sequence[DeviceShape]) -> None:
    """Raise BadState naming the field if devices are not like those of a SHAPE section."""
    if len(found) != len(promised):
        raise BadState(f"{len(found)} devices, the SHAPE section has {len(promised)}")
    for number, (device, shape) in enumerate(zip(found, promised, strict=True)):
        for name in (each.name for each in fields(DeviceShape) if each.compare):
            here, there = getattr(device, name), getattr(shape, name)
            if here != there:
                raise BadState(
                    f"device {number} does not match the SHAPE section: {name} {_shown(here)} here, "
                    f"{_shown(there)} there"
                )


def _shown(value: int | None) -> str:
    return "none" if value is None else hex(value) if value > MAX_NUM else str(value)


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


def _put_optional(w: Writer, data: bytes | None) -> None:
    w.put("B", data is not None)
    if data is not None:
        w.blob(data)


def _get_optional(r: Reader, name: str, limit: int) -> bytes | None:
    return r.blob(name, limit) if r.flag(name) else None


def _put_model(w: Writer, m: ControlModel) -> None:
    w.put("Q", int(m.features))
    _put_optional(w, m.mac)
    for table in (m.unicast, m.multicast):
        w.each(table, lambda mac: w.put("6s", mac))
    w.put("BB", m.unicast_overflow, m.multicast_overflow)
    w.put("B", sum(1 << mode for mode in Rx if m.rx[mode]))
    w.each(sorted(m.vlans), lambda vlan: w.put("H", vlan))
    w.put("H", m.pairs)
    _put_optional(w, None if m.offloads is None else m.offloads.to_bytes(8, "little"))
    _put_optional(w, m.rss)
    _put_optional(w, m.hash_config)
    w.put("B", m.announce)


def _get_model(r: Reader) -> ControlModel:
    features, mac = Feature(r.get("Q")), _get_optional(r, "MAC", 6)
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
    offloads = _get_optional(r, "offloads", 8)
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
        rss=_get_optional(r, "RSS", _MAX_RSS),
        hash_config=_get_optional(r, "hash configuration", _MAX_RSS),
        announce=r.flag("announce"),
    )
