"""A hostile source without a device: any state, from its bytes to a guest whose driver runs against memory.

    hostile_state.py -r COUNT [SEED]     random inputs, the same for the same seed
    hostile_state.py FILE...             inputs that were found before
    hostile_state.py --fuzz [OPTION...]  libFuzzer (atheris); its options and corpus folders follow

HOSTILE_STATE_ONLY_CRASHES=1 counts errors other than StreamCorrupt and goes on: it looks for crashes alone.

An input is a list of edits of an honest source's state: of a field, of a
byte of a section, of a word of guest memory. The only error allowed is
StreamCorrupt. A state that is accepted has to run: the clock is shifted as a
GO frame asks for, the control queue is replayed and used, the threads of the
NIC and of the CPU run. Guest memory has guard pages around it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import logging
import os
import random
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--fuzz" in sys.argv:
    import atheris

    with atheris.instrument_imports(include=["pyvhostvdpa"]):
        for module in ("pyvhostvdpa.guest.synthetic", "pyvhostvdpa.net.control_queue"):
            importlib.import_module(module)

from pyvhostvdpa._cdefs import ffi, lib
from pyvhostvdpa.base.errors import StreamCorrupt
from pyvhostvdpa.guest.arena import GuestArena
from pyvhostvdpa.guest.nic import GuestNic, NicOptions
from pyvhostvdpa.guest.nic_state import RingPlace
from pyvhostvdpa.guest.state import DeviceState, GuestState
from pyvhostvdpa.guest.synthetic import GuestWriter, SyntheticGuest
from pyvhostvdpa.memory.guest import DEFAULT_GPA, Gpa, GuestMemory, SharedMemory
from pyvhostvdpa.net.control import OK, VQ_PAIRS_SET, Class, ControlModel, command
from pyvhostvdpa.net.control_queue import ControlArea, ControlOptions, ControlQueue
from pyvhostvdpa.net.features import CONTROL, RING, SUPPORTED, Feature, ring_bits
from pyvhostvdpa.virtqueue.layout import SplitLayout

LAYOUT = ((DEFAULT_GPA, 1 << 20), (Gpa(DEFAULT_GPA + (4 << 20)), 1 << 18))
_PIECE, _PIECES = 1 << 14, 256
"""Of the guards, in all more than the largest ring's tables take."""
MAX_EDITS = 16
WRITER_RATE = 10_000_000
"""Pages a second that are enough here: more would only take longer."""

_ADDRESSES = {"desc", "command", "answer", "rx_gpa", "tx_gpa", "tx_table_gpa", "writer_gpa"}
_TIMES = {"clock", "last_rx"}
_OPTIONAL = {"control", "model", "mac", "offloads", "rss", "hash_config"}
_SIZES = (0, 1, 16, 1 << 12, 1 << 14, 1 << 15, 1 << 16, 1 << 17)
_BUCKETS = 17
_MARKS, _BRANCHES = 1 << 12, 32
_WIDTHS = (64, 63, 32, 16, 8, 1)

Path_ = tuple[Any, ...]


class Input:
    """Takes numbers from an input; 0 behind its end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int = 1) -> int:
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "little")


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
        self.shapes = guest.shapes()
        self.content = [bytes(region.memory.buffer) for region in self.memory.regions]
        guest.let_go()
        self.fields = [list(self._fields(part)) for part in self._parts()]

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


def branches(first: int, behind: int, indent: str = " ") -> str:
    """Return code with a branch of its own for each number in a range."""
    if behind - first == 1:
        return f"{indent}return {first}\n"
    middle = (first + behind) // 2
    low, high = branches(first, middle, indent + " "), branches(middle, behind, indent + " ")
    return f"{indent}if number < {middle}:\n{low}{indent}else:\n{high}"


def marker(first: int, behind: int) -> Callable[[int], object]:
    """Return a function whose coverage tells libFuzzer the number that it was called with."""
    made: dict[str, Any] = {}
    exec(f"def mark(number):\n{branches(first, behind)}", made)
    return atheris.instrument_func(made["mark"])  # type: ignore[no-any-return]


def bucket(kind: str, value: Any, memory: GuestMemory) -> int:
    """Return which kind of value of a field it is, below :data:`_BUCKETS`."""
    if kind == "address":
        sizes = [region.end - value for region in memory.regions]
        return next((_SIZES.index(size) for size in sizes if size in _SIZES), len(_SIZES))
    return value.bit_length() % _BUCKETS if isinstance(value, int) else 0


class Fuzzer:
    """Both worlds, and the way of an input through one of them.

    ``mark`` is told a number for each field that an accepted state has
    changed, and how: libFuzzer keeps inputs that reach a new one.
    """

    def __init__(self, mark: Callable[[int], object] | None = None) -> None:
        self._mark = mark
        self.worlds = [World(plain), World(full)]
        self._own = SharedMemory("control", 1 << 16)
        self._area = ControlArea(SplitLayout(64), self._own.hva, 1 << 20)
        self.accepted = self.count = 0
        self.errors: dict[str, int] = {}
        self._only_crashes = bool(os.environ.get("HOSTILE_STATE_ONLY_CRASHES"))

    def one_input(self, data: bytes) -> None:
        """Be the source that an input describes, and then the destination."""
        self.count += 1
        source = Input(data)
        choice, part = source.take(), source.take()
        world = self.worlds[choice & 1]
        world.reset()
        parts = {"guest": world.guest, "device": world.device}
        patches: list[tuple[int, int, int]] = []
        clock = 0
        for _ in range(MAX_EDITS):
            if not source:
                break
            operation = source.take()
            if operation < 0xC0:
                edit(world, parts, part, source)
            elif operation < 0xD0:
                part = source.take()
            elif operation < 0xE0:
                patches.append((operation & 1, source.take(2), source.take()))
            elif operation < 0xF8:
                write(world.memory, source.take(3), source.take(2))
            else:
                clock = source.take(8) - (1 << 63)
        try:
            sections = [bytearray(parts["guest"].encode()), bytearray(parts["device"].encode())]
        except (struct.error, OverflowError):
            return
        if not choice & 2:
            cohere(world.memory, parts["device"])
        for section, at, value in patches:
            sections[section][8 + at % (len(sections[section]) - 8)] = value
        try:
            self._arrive(world, bytes(sections[0]), bytes(sections[1]), clock)
        except Exception as error:
            if not self._only_crashes:
                raise
            name = type(error).__name__
            self.errors[name] = self.errors.get(name, 0) + 1

    def _arrive(self, world: World, guest_section: bytes, device_section: bytes, clock: int) -> None:
        try:
            own, device = GuestState.decode(guest_section), DeviceState.decode(device_section)
            guest = SyntheticGuest.restore(world.memory, own, [device])
        except StreamCorrupt:
            return
        try:
            if guest.shapes() == world.shapes:
                self.accepted += 1
                if self._mark is not None:
                    self._report(self._mark, world, {"guest": own, "device": device})
                guest.shift_clock(time.monotonic_ns() - clock)
                self._drive(guest)
        finally:
            guest.let_go()

    def _report(self, mark: Callable[[int], object], world: World, found: dict[str, Any]) -> None:
        honest = {"guest": world.guest, "device": world.device}
        every = [field for fields in world.fields for field in fields]
        for number, field in enumerate(every):
            name, *path = field.path
            value = get(found[name], tuple(path))
            if field.kind != "part" and value != get(honest[name], tuple(path)):
                mark(number * _BUCKETS + bucket(field.kind, value, world.memory))

    def _drive(self, guest: SyntheticGuest) -> None:
        for nic, control in zip(guest.nics, guest.controls, strict=True):
            if nic.control is not None and control is not None:
                self._control(guest, nic, control)
        if guest.writer is not None:
            guest.writer.c.rate = min(guest.writer.c.rate, WRITER_RATE)
        guest.run()
        guest.pause()
        guest.counts()
        guest.longest_gap(0, time.monotonic_ns())
        if guest.writer is not None:
            guest.writer.bad_pages()
        guest.state()[1][0].encode()

    def _control(self, guest: SyntheticGuest, nic: GuestNic, control: Any) -> None:
        """Replay the state, and have the driver send a command, which the queue serves then."""
        queue = ControlQueue(control, guest.memory, self._area, ControlOptions(ring=ring_bits(nic.features)))
        queue._send = lambda commands: bytes([OK] * len(commands))  # type: ignore[method-assign]
        try:
            queue.replay()
            data = command(Class.MQ, VQ_PAIRS_SET, len(nic.pairs).to_bytes(2, "little"))
            try:
                nic.control.send(data, 0.0)  # type: ignore[union-attr]
            except TimeoutError:
                queue._serve_pending()
        finally:
            queue.close()


def edit(world: World, parts: dict[str, Any], part: int, source: Input) -> None:
    """Set one field of a part of the state to a value that may matter to it."""
    fields = world.fields[part % len(world.fields)]
    if not fields:
        return
    field = fields[source.take() % len(fields)]
    name, *path = field.path
    try:
        old = get(parts[name], tuple(path))
    except (AttributeError, IndexError, TypeError):
        return
    parts[name] = put(parts[name], tuple(path), changed(field, old, world.memory, source))


def changed(field: Field, old: Any, memory: GuestMemory, source: Input) -> Any:
    choice = source.take()
    if field.kind == "flag":
        return not old
    if field.kind == "part":
        return None if choice & 7 == 0 else old
    if field.kind == "bytes":
        return old[: choice % 64] + bytes([source.take()]) * (choice >> 6)
    if field.kind == "items":
        return (old[:-1], old + old[:1], (), old[1:] + old[:1])[choice % 4]
    number = {"address": address, "ring": ring_size, "time": moment}.get(field.kind, any_number)
    return signed(number(choice, old, memory, source), field.bits)


def signed(value: int, bits: int) -> int:
    if bits != 63:
        return value & ((1 << bits) - 1)
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def address(choice: int, old: int, memory: GuestMemory, source: Input) -> int:
    region = memory.regions[choice >> 2 & 1]
    if choice & 1:
        return region.end - _SIZES[choice >> 3 & 7]
    if choice & 2:
        return old + 16 * (source.take() - 128)
    return source.take(8) if choice >> 3 == 0 else region.gpa + (source.take() << 12)


def ring_size(choice: int, old: int, memory: GuestMemory, source: Input) -> int:
    return source.take(2) if choice & 0xF == 0xF else 1 << (choice & 0xF)


def moment(choice: int, old: int, memory: GuestMemory, source: Input) -> int:
    return (0, 1, -1, -(1 << 63), (1 << 63) - 1, 1 << 62, old + 1, source.take(8))[choice & 7]


def any_number(choice: int, old: int, memory: GuestMemory, source: Input) -> int:
    if choice & 7 < 4:
        return source.take((1, 2, 2, 8)[choice & 7])
    return (1 << (choice >> 3), (1 << (choice >> 3)) - 1, old + 1, old - 1)[choice & 3]


def write(memory: GuestMemory, at: int, value: int) -> None:
    region = memory.regions[at >> 23]
    offset = at % (region.size - 2)
    region.memory.buffer[offset : offset + 2] = value.to_bytes(2, "little")


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


def random_inputs(count: int, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    for _ in range(count):
        yield chance.randbytes(chance.randrange(1, 40))


def main(words: list[str]) -> int:
    logging.disable(logging.WARNING)
    if words and words[0] == "--fuzz":
        marks = [marker(first, first + _BRANCHES) for first in range(0, _MARKS, _BRANCHES)]
        fuzzer = Fuzzer(lambda number: marks[number // _BRANCHES](number))
        atheris.Setup([sys.argv[0], *words[1:]], fuzzer.one_input)
        atheris.Fuzz()
        return 0
    fuzzer = Fuzzer()
    if words and words[0] == "-r":
        inputs = random_inputs(int(words[1]), int(words[2]) if len(words) > 2 else 1)
    else:
        inputs = iter([Path(word).read_bytes() for word in words])
    for number, data in enumerate(inputs):
        try:
            fuzzer.one_input(data)
        except BaseException:
            print(f"input {number}: {data.hex()}", flush=True)
            raise
    print(f"{fuzzer.count} inputs, {fuzzer.accepted} of them accepted and run", *fuzzer.errors.items())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
