"""A hostile source without a device: any state, from its bytes to a guest whose driver runs against memory.

    hostile_state.py -r COUNT [SEED]     random inputs, the same for the same seed
    hostile_state.py FILE...             inputs that were found before
    hostile_state.py --fuzz [OPTION...]  libFuzzer (atheris); its options and corpus folders follow

HOSTILE_STATE_ONLY_CRASHES=1 counts errors other than StreamCorrupt and continues: it looks for crashes alone.

An input is a list of edits of an honest source's state (hostile_edits.py): of a
field, of a ring's indices together, of a byte of a section, of a word of guest
memory. The only error allowed is StreamCorrupt. A state that is accepted has to run: the clock is shifted as a
GO frame asks for, the control queue is replayed and used, the threads of the
NIC and of the CPU run. Guest memory has guard pages around it.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import random
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# it is run as a program too, and PYTHONSAFEPATH keeps its own folder out of sys.path
sys.path.insert(0, str(Path(__file__).parent))

if "--fuzz" in sys.argv:
    import atheris

    with atheris.instrument_imports(include=["pyvhostvdpa"]):
        for module in ("pyvhostvdpa.guest.synthetic", "pyvhostvdpa.net.control_queue"):
            importlib.import_module(module)

from hostile_edits import (
    ADVANCE,
    CLOCK,
    FROM_OUTLINE,
    INCOHERENT,
    OF_OUTLINE,
    PATCH,
    STRETCH,
    WRITE,
    Edit,
    crossed,
    edits_of,
    head_of,
    mutated,
    random_input,
)
from hostile_world import Field, World, cohere, full, get, plain, put

from pyvhostvdpa.base.errors import StreamCorrupt
from pyvhostvdpa.guest.nic import GuestNic
from pyvhostvdpa.guest.state import DeviceState, GuestState
from pyvhostvdpa.guest.synthetic import SyntheticGuest
from pyvhostvdpa.memory.guest import GuestMemory
from pyvhostvdpa.memory.mapped import SharedMemory
from pyvhostvdpa.net.control import OK, VQ_PAIRS_SET, Class, command
from pyvhostvdpa.net.control_queue import ControlOptions, ControlQueue, NetControlArea, NetGuestControl
from pyvhostvdpa.net.features import ring_bits
from pyvhostvdpa.virtqueue.layout import SplitLayout

WRITER_RATE = 10_000_000
"""Pages per second, enough here: more would only take longer."""

_SIZES = (0, 1, 16, 1 << 12, 1 << 14, 1 << 15, 1 << 16, 1 << 17)
_BUCKETS = 17
_MARKS, _BRANCHES = 1 << 12, 32


def branches(first: int, behind: int, indent: str = " ") -> str:
    """Return code with a branch of its own for each number in a range."""
    if behind - first == 1:
        return f"{indent}return {first}\n"
    middle = (first + behind) // 2
    low, high = branches(first, middle, indent + " "), branches(middle, behind, indent + " ")
    return f"{indent}if number < {middle}:\n{low}{indent}else:\n{high}"


def marker(first: int, behind: int) -> Callable[[int], object]:
    """Return a function whose coverage shows libFuzzer the number that it was called with."""
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

    ``mark`` is called with a number for each field that an accepted state
    has changed, and how: libFuzzer keeps inputs that reach a new one.
    """

    def __init__(self, mark: Callable[[int], object] | None = None) -> None:
        self._mark = mark
        self.worlds = [World(plain), World(full)]
        for world in self.worlds:
            world.learn_ends()
        self._own = SharedMemory("control", 1 << 16)
        self._area = NetControlArea(SplitLayout(64), self._own.hva, 1 << 20)
        self.accepted = self.count = 0
        self.errors: dict[str, int] = {}
        self._only_crashes = bool(os.environ.get("HOSTILE_STATE_ONLY_CRASHES"))

    def one_input(self, data: bytes) -> None:
        """Be the source that an input describes, and then the destination."""
        self.count += 1
        head = head_of(data)
        world = self.worlds[head & 1]
        world.reset()
        from_outline, of_outline = bool(head & FROM_OUTLINE), head & OF_OUTLINE == OF_OUTLINE
        parts = {"guest": world.guest, "device": world.outline if of_outline else world.device}
        patches: list[Edit] = []
        clock = 0
        for each in edits_of(data):
            if each.kind < STRETCH:
                edit(world, parts, each)
            elif each.kind < ADVANCE:
                stretch(world, parts, each)
            elif each.kind < PATCH:
                parts["device"] = advance(world, parts["device"], each)
            elif each.kind < WRITE:
                patches.append(each)
            elif each.kind < CLOCK:
                write(world.memory, each.value & 0xFFFFFF, each.value >> 24 & 0xFFFF)
            else:
                clock = each.value - (1 << 63)
        try:
            sections = [bytearray(parts["guest"].encode()), bytearray(parts["device"].encode())]
        except (struct.error, OverflowError):
            return
        if not head & INCOHERENT:
            cohere(world.memory, world.device if of_outline else parts["device"])
        for patch in patches:
            section = sections[patch.part & 1]
            section[8 + patch.value % (len(section) - 8)] = patch.choice
        own, device, outline = bytes(sections[0]), bytes(sections[1]), world.outline.encode()
        if of_outline:
            device, outline = world.device.encode(), device
        try:
            self._arrive(world, own, device, outline if from_outline else b"", clock)
        except Exception as error:
            if not self._only_crashes:
                raise
            name = type(error).__name__
            self.errors[name] = self.errors.get(name, 0) + 1

    def _arrive(
        self, world: World, guest_section: bytes, device_section: bytes, outline_section: bytes, clock: int
    ) -> None:
        try:
            own, device = GuestState.decode(guest_section), DeviceState.decode(device_section)
            if outline_section:
                guest = self._expected(world, own, device, DeviceState.decode(outline_section))
            else:
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
            guest.detach()

    def _expected(self, world: World, own: GuestState, device: DeviceState, outline: DeviceState) -> SyntheticGuest:
        """Be a destination that stands by: it knows the outline while memory is empty, and the state later."""
        content = [bytes(region.memory.buffer) for region in world.memory.regions]
        for region in world.memory.regions:
            region.memory.buffer[:] = bytes(region.size)
        guest = SyntheticGuest.expect(world.memory, [outline], world.shapes)
        try:
            for nic, control in zip(guest.nics, guest.controls, strict=True):
                if control is not None:
                    with self._queue(guest, nic, control) as queue:
                        queue.replay()
            for region, held in zip(world.memory.regions, content, strict=True):
                region.memory.buffer[:] = held
            guest.load(own, [device], world.shapes)
        except BaseException:
            guest.detach()
            raise
        return guest

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

    @contextmanager
    def _queue(self, guest: SyntheticGuest, nic: GuestNic, control: NetGuestControl) -> Iterator[ControlQueue]:
        """The destination's side of a control queue, on a device that accepts everything."""
        queue = ControlQueue(control, guest.memory, self._area, ControlOptions(ring=ring_bits(nic.features)))
        queue._send = lambda commands: bytes([OK] * len(commands))  # type: ignore[method-assign]
        try:
            yield queue
        finally:
            queue.close()

    def _control(self, guest: SyntheticGuest, nic: GuestNic, control: NetGuestControl) -> None:
        """Replay the state, and have the driver send a command, which the queue serves then."""
        with self._queue(guest, nic, control) as queue:
            queue.replay()
            data = command(Class.MQ, VQ_PAIRS_SET, len(nic.pairs).to_bytes(2, "little"))
            try:
                nic.control.send(data, 0.0)  # type: ignore[union-attr]
            except TimeoutError:
                queue._serve_pending()


def edit(world: World, parts: dict[str, Any], what: Edit) -> None:
    """Set one field of a part of the state to a value that may matter to it."""
    fields = world.fields[what.part % len(world.fields)]
    if fields:
        field = fields[what.field % len(fields)]
        set_field(parts, field, lambda old: changed(field, old, world, what))


def stretch(world: World, parts: dict[str, Any], what: Edit) -> None:
    """Have rings of a part as large, and its buffers as far at the end of a region, as its value has bits for them."""
    region = what.choice >> 4 & 1
    for number, field in enumerate(world.fields[what.part % len(world.fields)]):
        if what.value >> number & 1 and field.kind in ("address", "ring"):
            value = world.end_for(field, region) if field.kind == "address" else 1 << (what.choice & 0xF)
            set_field(parts, field, lambda _, value=value: value)


def set_field(parts: dict[str, Any], field: Field, change: Callable[[Any], Any]) -> None:
    """Give a field another value, if it is still there."""
    name, *path = field.path
    try:
        old = get(parts[name], tuple(path))
    except (AttributeError, IndexError, TypeError):
        return
    parts[name] = put(parts[name], tuple(path), change(old))


def changed(field: Field, old: Any, world: World, what: Edit) -> Any:
    choice, value = what.choice, what.value
    if field.kind == "flag":
        return not old
    if field.kind == "part":
        return None if choice & 7 == 0 else old
    if field.kind == "bytes":
        return old[: choice % 64] + bytes([value & 0xFF]) * (choice >> 6)
    if field.kind == "items":
        return (old[:-1], old + old[:1], (), old[1:] + old[:1])[choice % 4]
    if field.kind == "address":
        return signed(address(field, old, world, what), field.bits)
    number = {"ring": ring_size, "time": moment}.get(field.kind, any_number)
    return signed(number(choice, old, value), field.bits)


def signed(value: int, bits: int) -> int:
    if bits != 63:
        return value & ((1 << bits) - 1)
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def address(field: Field, old: int, world: World, what: Edit) -> int:
    choice, number = what.choice, what.choice >> 2 & 1
    region = world.memory.regions[number]
    if choice & 3 == 0:
        return world.end_for(field, number)
    if choice & 3 == 1:
        return region.end - _SIZES[choice >> 3 & 7]
    if choice & 3 == 2:
        return old + 16 * ((what.value & 0xFF) - 128)
    return what.value if choice >> 3 == 0 else region.gpa + ((what.value & 0xFF) << 12)


def ring_size(choice: int, old: int, value: int) -> int:
    return value & 0xFFFF if choice & 0xF == 0xF else 1 << (choice & 0xF)


def moment(choice: int, old: int, value: int) -> int:
    return (0, 1, -1, -(1 << 63), (1 << 63) - 1, 1 << 62, old + 1, value)[choice & 7]


def any_number(choice: int, old: int, value: int) -> int:
    if choice & 7 < 4:
        return value & ((1 << (8, 16, 16, 64)[choice & 7]) - 1)
    return (1 << (choice >> 3), (1 << (choice >> 3)) - 1, old + 1, old - 1)[choice & 3]


def advance(world: World, device: DeviceState, what: Edit) -> DeviceState:
    """Let the driver and the device of one ring advance together: as many buffers made available as used."""
    nic, steps = device.nic, what.value & 0xFFFF
    number = world.ring_of(what)
    if number is None:
        if nic.control is None:
            return device
        indices = {name: getattr(nic.control, name) + steps & 0xFFFF for name in ("avail_idx", "used_idx")}
        return put(device, ("nic", "control"), dataclasses.replace(nic.control, **indices))  # type: ignore[no-any-return]
    if number // 2 >= len(nic.pairs):
        return device
    pair, ring = nic.pairs[number // 2], ("rx", "tx")[number % 2]
    indices = {name: getattr(pair, name) + steps & 0xFFFF for name in (f"{ring}_avail", f"{ring}_used")}
    device = put(device, ("nic", "pairs", number // 2), dataclasses.replace(pair, **indices))
    if number >= len(device.queues):
        return device
    queue = device.queues[number]
    moved = dataclasses.replace(queue, avail=queue.avail + steps & 0xFFFF, used=queue.used + steps & 0xFFFF)
    return put(device, ("queues", number), moved)  # type: ignore[no-any-return]


def write(memory: GuestMemory, at: int, value: int) -> None:
    region = memory.regions[at >> 23]
    offset = at % (region.size - 2)
    region.memory.buffer[offset : offset + 2] = value.to_bytes(2, "little")


def random_inputs(count: int, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    for _ in range(count):
        yield random_input(chance)


def main(words: list[str]) -> int:
    logging.disable(logging.WARNING)
    if words and words[0] == "--fuzz":
        marks = [marker(first, first + _BRANCHES) for first in range(0, _MARKS, _BRANCHES)]
        fuzzer = Fuzzer(lambda number: marks[number // _BRANCHES](number))
        ways = {
            "custom_mutator": lambda data, size, seed: mutated(data, seed)[:size],
            "custom_crossover": lambda one, other, size, seed: crossed(one, other, seed)[:size],
        }
        atheris.Setup([sys.argv[0], *words[1:]], fuzzer.one_input, **ways)
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
